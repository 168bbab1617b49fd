"""Reward functions of users: a batch of responses in, as many finite numbers out, and every fault of theirs by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from gemma_tune.data.cells import shown
from gemma_tune.errors import GemmaTuneError, TrainingError, UserError
from gemma_tune.recipe.functions import UserFunction, failure, load_user_function

PROMPTS = "prompts"
"""A parameter of this name gets the conversations."""
LARGEST = 1e38
"""Scores are float32; the sum of two such numbers still is one."""

Chat = Sequence[Mapping[str, Any]]
"""Messages of a conversation, each with `role` and `content`."""


class RewardFunction:
    """A user's function as a source of rewards.

    Args:
        function: takes the responses as a list of texts, and the conversations before them in a parameter `prompts`
            where it has one.

    Raises:
        UserError: it cannot be called so.
    """

    def __init__(self, function: UserFunction) -> None:
        self.path, self.name = function.path, function.name
        self._call = _caller(function)

    def __repr__(self) -> str:
        return f"RewardFunction({str(self.path)!r}, {self.name!r})"

    def __call__(self, prompts: Sequence[Chat], responses: Sequence[str]) -> list[float]:
        """A score for each response.

        Args:
            prompts: the conversation that each response answers.
            responses: texts without their stop tokens.

        Raises:
            TrainingError: the function raised something, or returned anything but a finite number for each response.
        """
        # Copies: what the function does to its arguments must reach neither the training nor another function.
        copied = [[dict(message) for message in prompt] for prompt in prompts]
        try:
            with torch.no_grad():  # a model in there needs no graph
                found = self._call(copied, list(responses))
        except GemmaTuneError:
            raise
        except (Exception, SystemExit) as error:
            problem = failure(error, self.path)
            raise TrainingError(
                f"the reward function {self.name!r} failed: {problem.what}", where=problem.where, fix=problem.fix
            ) from error
        return self._checked(found, responses)

    def _checked(self, found: Any, responses: Sequence[str]) -> list[float]:
        if not isinstance(found, (list, tuple)) and hasattr(found, "tolist"):
            found = found.tolist()  # of numpy, torch (on any device) and pandas
        if not isinstance(found, (list, tuple)):
            raise self._wrong(f"{_a(found)}, not a list with a number for each response")
        if len(found) != len(responses):
            raise self._wrong(f"{len(found):,} numbers for {len(responses):,} responses")
        scores: list[float] = []
        for number, (value, response) in enumerate(zip(found, responses, strict=True), 1):
            score = _number(value)
            if score is None or not -LARGEST < score < LARGEST:  # false for NaN as well
                what = f"{_a(value)}, not a number," if score is None else f"{score}, no finite number of float32,"
                raise self._wrong(f"{what} for response {number:,} of {len(responses):,}: {shown(response)}")
            scores.append(score)
        return scores

    def _wrong(self, returned: str) -> TrainingError:
        return TrainingError(
            f"the reward function {self.name!r} returned {returned}",
            where=str(self.path),
            fix="return one finite number for each response, in their order",
        )


def load_function(name: str) -> RewardFunction:
    """The reward function that a recipe names as `./mine.py:score`.

    Raises:
        UserError: there is no such file or function, the file fails, or the function needs other parameters.
    """
    return RewardFunction(load_user_function(name))


def _caller(function: UserFunction) -> Callable[[list[list[dict[str, Any]]], list[str]], Any]:
    """(prompts, responses) -> what the function returns, by the names and places of its parameters."""
    call = function.call
    try:
        parameters = dict(inspect.signature(call).parameters)
    except (ValueError, TypeError):  # one that is written in C and says nothing about itself
        return lambda prompts, responses: call(responses)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    asks = PROMPTS in parameters and parameters[PROMPTS].kind in by_name
    others = {name: one for name, one in parameters.items() if not (asks and name == PROMPTS)}
    chosen = "responses" if "responses" in others else next(iter(others), "")
    needed = [
        name
        for name, one in others.items()
        if name != chosen and one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if not chosen or others[chosen].kind is inspect.Parameter.VAR_KEYWORD or needed:
        fault = f"needs {', '.join(map(repr, needed))}, which nothing gives it" if needed else "takes no responses"
        raise UserError(
            f"the reward function {function.name!r} {fault}",
            where=str(function.path),
            fix=f"write def {function.name}(responses), or def {function.name}(responses, {PROMPTS})",
        )
    if others[chosen].kind in by_name:
        return lambda prompts, responses: call(**{chosen: responses}, **({PROMPTS: prompts} if asks else {}))
    return lambda prompts, responses: call(responses, **({PROMPTS: prompts} if asks else {}))


def _number(value: Any) -> float | None:
    """A number as float, also where it is a tensor without a dimension; None where it is something else."""
    if not isinstance(value, Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond any float
        return math.inf


def _a(value: Any) -> str:
    """A value with its type, in a few words."""
    text = " ".join(repr(value).split())
    return "None" if value is None else f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
