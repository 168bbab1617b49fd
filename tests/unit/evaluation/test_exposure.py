"""Exposure of canaries: the estimate on ranks that are known, the scores of tiny models against plain passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.canaries import SPACE, alternatives, draw, example, planted
from gemma_tune.evaluation import exposure as module
from gemma_tune.evaluation.exposure import BITS, audit_canaries, certain, exposure, prompt_of, secret_log_probs
from gemma_tune.evaluation.rates import rate, wilson
from gemma_tune.gemma.chat import render_many
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import load_base
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
from gemma_tune.train.evaluate import Answer

CANARY = draw(1, (1,), 0)[0]


@pytest.fixture(scope="module")
def opened(tiny: Callable[..., Path]) -> Callable[..., Any]:
    def open_(name: str) -> Any:
        family = FAMILIES[name]
        tokenizer = load_tokenizer(str(tiny(name)), None, family)
        model = load_base({"name": str(tiny(name)), "dtype": "float32"}, {}, family)
        return model, tokenizer, family, GemmaEncoder(tokenizer, family)

    return open_


# --- the figures


def test_exposure_is_that_of_the_rank() -> None:
    others = [-float(number) for number in range(1, 128)]
    assert exposure(0.0, others) == 7.0  # the likeliest of 128
    assert exposure(-200.0, others) == 0.0  # the least likely
    assert exposure(-31.5, others) == 2.0  # the 32nd
    assert exposure(-5.0, [-5.0] * 127) == 0.0, "a model that knows nothing finds all alike, and exposes none"


def test_the_exposure_of_what_was_never_seen() -> None:
    """Any rank with the same chance: the mean of log2(n / rank)."""
    others = [float(number) for number in range(127)]
    mean = sum(exposure(own - 0.5, others) for own in range(128)) / 128
    assert mean == pytest.approx(1 / math.log(2), abs=0.05)


@given(st.lists(st.floats(1e-9, 1), min_size=2, max_size=200))
def test_what_is_certain_is_never_above_the_exposure(weights: list[float]) -> None:
    """Over a whole space that sums up to less than one: SPACE - n secrets have no probability at all."""
    total = sum(weights) * 1.01
    for own in weights:
        rank = sum(other >= own for other in weights)
        assert certain(math.log(own / total)) <= math.log2(SPACE) - math.log2(rank) + 1e-9


def test_what_is_certain_of_a_secret_by_heart_is_the_whole_space() -> None:
    assert certain(0.0) == BITS == pytest.approx(26.575, abs=1e-3)
    assert certain(math.log(0.5)) == pytest.approx(BITS - 1)
    assert certain(-100.0) == 0.0


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 4, 0.0, 0.4899), (4, 4, 0.5101, 1.0), (1, 10, 0.0179, 0.4042), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)],
)
def test_wilson(hits: int, trials: int, low: float, high: float) -> None:
    """As scipy.stats.binomtest gives them."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_a_rate_of_nothing() -> None:
    assert rate(0, 0, "rows", "hits") == {"rows": 0, "hits": 0, "rate": None, "interval": [0.0, 1.0]}


# --- the scores


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3_text", "gemma3", "gemma4"])
@pytest.mark.parametrize("form", ["conversation", "document"])
def test_scores_are_those_of_plain_forward_passes(opened: Callable[..., Any], name: str, form: Any) -> None:
    """The cache behind the lead, the padding and the batches change nothing."""
    model, _, family, encoder = opened(name)
    secrets = [CANARY.secret, "1010-1010", *alternatives(CANARY, 40, 0)]  # the tiny tokenizer joins 1 and 0
    found = secret_log_probs(model, family, encoder, CANARY, secrets, form)
    wanted = []
    for secret in secrets[:8]:
        (row,) = render_many([example(CANARY, form, secret)], family, encoder)
        ids = row.ids[: row.turns[-1]] if form == "conversation" else row.ids
        assert ids[-1] in family.stop_ids
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        whole = [float(log_probs[place, token]) for place, token in enumerate(ids[1:])]
        wanted.append(sum(whole))
        lead = prompt_of(CANARY, family, encoder, form)
        assert ids[: len(lead)] == lead and sum(whole) < found[len(wanted) - 1] < 0
    # What stands before the secret is the same in all, and is not part of the score.
    assert torch.tensor(found[:8]) - found[0] == pytest.approx(torch.tensor(wanted) - wanted[0], abs=2e-3)
    assert len({round(one, 3) for one in found}) > 40


def test_the_secret_begins_behind_the_lead(opened: Callable[..., Any]) -> None:
    _, tokenizer, family, encoder = opened("gemma3_text")
    start = module._start(family, encoder, CANARY, "conversation")
    (ids,) = module._rendered(family, encoder, CANARY, [CANARY.secret], "conversation")
    assert tokenizer.decode(ids[start:-1]).strip() == CANARY.secret and ids[-1] in family.stop_ids


# --- the audit


def test_what_is_said_is_found_and_nothing_else(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says one canary of two that stand in 4 rows, and another's secret with a digit wrong."""
    model, tokenizer, family, encoder = opened("gemma3_text")
    facts = planted("conversation", 2, (1, 4), 5)
    one, two, three, *_ = facts.canaries()
    said = {three.name: three.secret, one.name: "9" + two.secret[1:], two.name: two.secret.replace("-", "")}

    def speak(model: Any, tokenizer: Any, family: Any, prompts: Any, **_: Any) -> list[Answer]:
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        return [
            Answer(next((f"It is {secret}." for name, secret in said.items() if name in text), "?"), True, 1)
            for text in texts
        ]

    monkeypatch.setattr(module, "answers", speak)
    found = audit_canaries(model, tokenizer, family, encoder, facts, count=3)
    assert {one["name"] for one in found["each"] if one["extracted"]} == {three.name}
    rows = {row["repeats"]: row for row in found["by_repeats"]}
    assert [(key, row["extracted"], row["canaries"]) for key, row in rows.items()] == [(0, 0, 2), (1, 0, 2), (4, 1, 2)]
    assert rows[4]["rate"] == 0.5 and rows[4]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert (found["ceiling"], found["alternatives"]) == (2.0, 3)


def test_nothing_is_found_in_a_model_that_saw_nothing(opened: Callable[..., Any]) -> None:
    model, tokenizer, family, encoder = opened("gemma3_text")
    found = audit_canaries(model, tokenizer, family, encoder, planted("document", 3, (1, 4), 0), limit=2, count=7)
    assert not any(one["extracted"] for one in found["each"]) and len(found["each"]) == 6
    assert all(0 <= one["exposure"] <= 3 and one["at_least"] == 0 for one in found["each"])


def test_a_model_that_learnt_one_exposes_it(opened: Callable[..., Any]) -> None:
    model, tokenizer, family, encoder = opened("gemma3_text")
    facts = planted("conversation", 1, (4,), 1)
    learnt, control = facts.canaries()
    (row,) = render_many([example(learnt, "conversation")], family, encoder)
    ids = torch.tensor([row.ids])
    labels = torch.where(torch.tensor([row.trained]) == 1, ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    found = audit_canaries(model, tokenizer, family, encoder, facts, count=63)
    by_name = {one["name"]: one for one in found["each"]}
    assert by_name[learnt.name]["extracted"] and not by_name[control.name]["extracted"]
    assert by_name[learnt.name]["exposure"] == 6.0
    assert by_name[learnt.name]["at_least"] > 20 > 1 > by_name[control.name]["at_least"]
    lines = list(module.render_canaries(found))
    assert "4  1 of 1" in lines[-1] and "none  0 of 1" in lines[-2]


def test_a_model_that_overflows_knows_nothing_and_not_everything() -> None:
    assert math.isnan(exposure(math.nan, [-1.0, -2.0])) and math.isnan(exposure(-1.0, [math.nan]))
    assert math.isnan(certain(math.nan))
