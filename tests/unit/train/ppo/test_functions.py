"""Reward functions of users: how they are called, what they may return, and what each fault is told as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import TrainingError, UserError
from gemma_tune.train.ppo.functions import RewardFunction, load_function

PROMPTS = [[{"role": "user", "content": text}] for text in ("one?", "two?", "three?")]
RESPONSES = ["a", "bb", "ccc"]


def written(folder: Path, source: str, name: str = "score") -> str:
    """The name of a function in a file with `source`."""
    (folder / "mine.py").write_text(source)
    return f"{folder}/mine.py:{name}"


def load(folder: Path, source: str, name: str = "score") -> RewardFunction:
    return load_function(written(folder, source, name))


# ----------------------------------------------------------------------------------------------------- how it is called


@pytest.mark.parametrize(
    "source",
    [
        "def score(responses): return [len(text) for text in responses]",
        "def score(texts): return [len(text) for text in texts]",
        "def score(texts, /): return [len(text) for text in texts]",
        "def score(*, responses): return [len(text) for text in responses]",
        "def score(scale=1, responses=()): return [scale * len(text) for text in responses]",
        "def score(responses, scale=1, **more): return [scale * len(text) for text in responses]",
        "def score(*batch): return [len(text) for text in batch[0]]",
        "score = lambda responses: [len(text) for text in responses]",
        "class Score:\n    def __call__(self, responses): return [len(text) for text in responses]\nscore = Score()",
        "from functools import partial\n"
        "def scaled(scale, responses): return [scale * len(text) for text in responses]\n"
        "score = partial(scaled, 1)",
    ],
)
def test_the_responses_are_found_by_name_or_come_first(tmp_path: Path, source: str) -> None:
    found = load(tmp_path, source)(PROMPTS, RESPONSES)
    assert found == [1.0, 2.0, 3.0] and all(type(value) is float for value in found)


@pytest.mark.parametrize(
    "parameters",
    ["responses, prompts", "prompts, responses", "prompts, completions", "responses, *, prompts=None", "r, /, prompts"],
)
def test_the_prompts_come_where_they_are_asked_for(tmp_path: Path, parameters: str) -> None:
    body = "return [len(prompt[-1]['content']) for prompt in prompts]"
    found = load(tmp_path, f"def score({parameters}): {body}")
    assert found(PROMPTS, RESPONSES) == [4.0, 4.0, 6.0]


def test_a_function_without_a_signature_gets_the_responses(tmp_path: Path) -> None:
    found = load(tmp_path, "from operator import methodcaller\nscore = methodcaller('copy')")  # score([x]) is [x]
    with pytest.raises(TrainingError, match=r"returned str 'a', not a number, for response 1 of 3: 'a'"):
        found(PROMPTS, RESPONSES)


def test_what_it_does_to_its_arguments_is_lost(tmp_path: Path) -> None:
    source = (
        "def score(responses, prompts):\n    [p.pop() for p in prompts]\n    responses.clear()\n    return [0, 0, 0]"
    )
    prompts, responses = [[dict(message) for message in prompt] for prompt in PROMPTS], list(RESPONSES)
    assert load(tmp_path, source)(prompts, responses) == [0.0, 0.0, 0.0]
    assert (prompts, responses) == (PROMPTS, RESPONSES)


def test_no_responses_have_no_scores(tmp_path: Path) -> None:
    assert load(tmp_path, "def score(responses): return []")([], []) == []


def test_a_relative_path_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "def score(responses): return [1] * len(responses)")
    monkeypatch.chdir(tmp_path)
    found = load_function("./mine.py:score")
    assert found(PROMPTS, RESPONSES) == [1.0, 1.0, 1.0]
    assert repr(found) == "RewardFunction('mine.py', 'score')"


# --------------------------------------------------------------------------------------------------- what it may return


@pytest.mark.parametrize(
    "returned",
    [
        "[0.5, 1, -2]",
        "(0.5, 1.0, -2)",
        "np.array([0.5, 1, -2])",
        "np.array([0.5, 1, -2], dtype=np.float16)",
        "np.array([0.5, 1, -2], dtype=object)",
        "[np.float32(0.5), np.int64(1), np.array(-2.0)]",
        "torch.tensor([0.5, 1, -2])",
        "torch.tensor([0.5, 1, -2], dtype=torch.bfloat16, requires_grad=True)",
        "[torch.tensor(0.5, requires_grad=True), torch.tensor(1), -2]",
        "[Fraction(1, 2), 1, -2]",
    ],
)
def test_numbers_of_any_kind(tmp_path: Path, returned: str) -> None:
    head = "from fractions import Fraction\nimport numpy as np\nimport torch\n"
    found = load(tmp_path, f"{head}def score(responses): return {returned}")(PROMPTS, RESPONSES)
    assert found == [0.5, 1.0, -2.0] and all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ("None", "returned None, not a list with a number for each response"),
        ("1.0", "returned float 1.0, not a list"),
        ("'abc'", "returned str 'abc', not a list"),
        ("{'a': 1.0}", "returned dict"),
        ("(x for x in (1.0, 2.0, 3.0))", "returned generator"),
        ("torch.tensor(1.0)", "returned float 1.0, not a list"),
        ("[1.0, 2.0]", "returned 2 numbers for 3 responses"),
        ("[1.0] * 4", "returned 4 numbers for 3 responses"),
        ("np.zeros(0)", "returned 0 numbers for 3 responses"),
        ("[1.0, None, 3.0]", "returned None, not a number, for response 2 of 3: 'bb'"),
        ("[1.0, 2.0, '3']", "returned str '3', not a number, for response 3 of 3: 'ccc'"),
        ("[True, 2.0, 3.0]", "returned bool True, not a number, for response 1 of 3: 'a'"),
        ("np.array([True, False, True])", "returned bool True, not a number, for response 1"),
        ("[np.bool_(True), 2.0, 3.0]", "returned bool np.True_, not a number, for response 1"),
        ("torch.tensor([True, False, True])", "returned bool True, not a number, for response 1"),
        ("torch.zeros(3, 1)", "returned list [0.0], not a number, for response 1"),
        ("np.zeros((3, 2))", "returned list [0.0, 0.0], not a number, for response 1"),
        ("[1.0, 1j, 3.0]", "returned complex 1j, not a number, for response 2"),
        ("[1.0, float('nan'), float('inf')]", "returned nan, no finite number of float32, for response 2 of 3: 'bb'"),
        ("[1.0, 2.0, float('inf')]", "returned inf, no finite number of float32, for response 3"),
        ("torch.tensor([1.0, -torch.inf, 3.0])", "returned -inf, no finite number of float32, for response 2"),
        ("np.array([np.nan, 1.0, 2.0])", "returned nan, no finite number of float32, for response 1"),
        ("[1e39, 1.0, 2.0]", "returned 1e+39, no finite number of float32, for response 1"),
        ("[1.0, 10**400, 2.0]", "returned inf, no finite number of float32, for response 2"),
    ],
)
def test_anything_else_names_the_function_and_the_first_bad_response(tmp_path: Path, returned: str, what: str) -> None:
    name = written(tmp_path, f"import numpy as np\nimport torch\ndef score(responses): return {returned}")
    with pytest.raises(TrainingError) as caught:
        load_function(name)(PROMPTS, RESPONSES)
    (problem,) = caught.value.problems
    assert f"the reward function 'score' {what}" in problem.what
    assert problem.where == f"{tmp_path}/mine.py" and "one finite number for each response" in problem.fix


def test_a_long_response_is_shown_by_its_beginning(tmp_path: Path) -> None:
    found = load(tmp_path, "def score(responses): return [None]")
    with pytest.raises(TrainingError) as caught:
        found(PROMPTS[:1], ["x\n" * 5000])
    assert r"x\nx\n" in str(caught.value) and len(str(caught.value)) < 500


# ----------------------------------------------------------------------------------------------------------- its faults

FAILING = """\
import json

def inner(text):
    return {}[text]

def score(responses):
    return [inner(text) for text in responses]

def library(responses):
    return [json.loads(text) for text in responses]

def needs(responses):
    import no_such_module

def interrupted(responses):
    raise KeyboardInterrupt

def leaves(responses):
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("name", "what", "line", "fix"),
    [
        ("score", "KeyError: 'a'", 4, "correct the function"),
        ("library", "JSONDecodeError: Expecting value", 10, "correct the function"),
        ("needs", "it imports no_such_module, which is not installed", 13, "pip install no-such-module"),
        ("leaves", "SystemExit: 3", 19, "correct the function"),
    ],
)
def test_what_it_raises_is_told_with_its_line(tmp_path: Path, name: str, what: str, line: int, fix: str) -> None:
    found = load(tmp_path, FAILING, name)
    with pytest.raises(TrainingError) as caught:
        found(PROMPTS, RESPONSES)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"the reward function '{name}' failed: {what}")
    assert (problem.where, problem.fix) == (f"{tmp_path}/mine.py:{line}", fix)
    assert caught.value.__cause__ is not None and caught.value.exit_code == 4


def test_an_interrupt_is_no_fault_of_the_function(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, FAILING, "interrupted")(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def score(): return []", "takes no responses"),
        ("def score(**more): return []", "takes no responses"),
        ("def score(prompts): return []", "takes no responses"),
        ("def score(responses, labels): return []", "needs 'labels', which nothing gives it"),
        ("def score(responses, labels, *, tokenizer, k=1): return []", "needs 'labels', 'tokenizer', which nothing"),
        ("def score(prompts, /, responses): return []", "needs 'prompts', which nothing gives it"),
    ],
)
def test_other_parameters_are_refused_before_the_training(tmp_path: Path, source: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, source)
    (problem,) = caught.value.problems
    assert what in problem.what and "'score'" in problem.what
    assert problem.where == f"{tmp_path}/mine.py"
    assert problem.fix == "write def score(responses), or def score(responses, prompts)"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("scores", "has no function 'scores'\n  fix: did you mean score?"),
        ("number", "has no function 'number'"),
        ("", "which function of the file?"),
    ],
)
def test_a_function_that_is_not_there(tmp_path: Path, name: str, what: str) -> None:
    path = written(tmp_path, "number = 3\ndef score(responses): return []", name)
    with pytest.raises(UserError) as caught:
        load_function(path.removesuffix(":"))
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def score(:\n", "mine.py:1: SyntaxError"),
        ("\nimport no_such_module\n", "mine.py:2: it imports no_such_module, which is not installed"),
        ("raise KeyError('gone')\n", "mine.py:1: KeyError: 'gone'"),
        ("raise SystemExit('bye')\n", "mine.py:1: SystemExit: bye"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, source: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, source)
    assert what in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_function(f"{tmp_path}/none.py:score")


def test_it_keeps_no_graph_and_switches_no_gradient_off_for_the_training(tmp_path: Path) -> None:
    source = """\
import torch
weight = torch.ones(1, requires_grad=True)
def score(responses):
    found = weight * len(responses[0])
    assert not found.requires_grad
    torch.set_grad_enabled(False)
    return found.expand(len(responses))
"""
    assert load(tmp_path, source)(PROMPTS, RESPONSES) == [float(len(RESPONSES[0]))] * len(RESPONSES)
    assert torch.is_grad_enabled()


def test_errors_of_ours_pass(tmp_path: Path) -> None:
    source = "from gemma_tune.errors import UserError\ndef score(responses): raise UserError('no key', fix='set it')"
    with pytest.raises(UserError, match="no key"):
        load(tmp_path, source)(PROMPTS, RESPONSES)


def test_rows_and_rewards_may_stand_in_one_file(tmp_path: Path) -> None:
    from gemma_tune.data.sources import open_source

    source = "def rows():\n    yield {'prompt': 'q'}\n\ndef score(responses):\n    return [float(n) for n in range(3)]"
    found: Any = load(tmp_path, source)
    (row,) = open_source({"name": f"{tmp_path}/mine.py:rows"}, wanted="prompts")
    assert row.value == {"prompt": "q"} and found(PROMPTS, RESPONSES) == [0.0, 1.0, 2.0]
