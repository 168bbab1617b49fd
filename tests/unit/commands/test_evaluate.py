"""`gemma-tune eval`: how the command line reaches it, and what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_tune import cli
from gemma_tune.commands.evaluate import held_out_lines, talks
from gemma_tune.commands.evaluate_options import Wanted, check_alone, check_files, check_options
from gemma_tune.errors import UserError


@pytest.mark.parametrize(
    ("words", "targets", "wanted"),
    [
        ("eval r", ["r"], Wanted()),
        ("eval a b --compare --recipe x.yaml", ["a", "b"], Wanted(compare=True, recipe="x.yaml")),
        (
            "eval r --tasks a,b,, --shots 0 --limit 9 --include-path t --no-chat",
            ["r"],
            Wanted(tasks=("a", "b"), shots=0, limit=9, include_path="t", chat=False),
        ),
        (
            "eval r --suite gemma-card --chat --memorisation",
            ["r"],
            Wanted(suite="gemma-card", chat=True, memorisation=True),
        ),
        (
            "eval r --no-base --max-new-tokens 7 --output f.json --json",
            ["r"],
            Wanted(base=False, max_new_tokens=7, output="f.json", as_json=True),
        ),
    ],
)
def test_the_options_reach_the_command(
    words: str, targets: list[str], wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    command = SimpleNamespace(run=lambda *given: called.append(given), Wanted=Wanted)
    monkeypatch.setattr(cli, "_command", lambda name: command)
    assert cli.main(words.split()) == 0
    assert called == [(targets, wanted)]


def test_an_empty_list_of_tasks_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "r", "--tasks", ","]) == 2
    assert "no task is named" in capsys.readouterr().err


def test_nothing_else_is_measured_where_one_thing_is_asked_for() -> None:
    assert Wanted().held_out and Wanted(limit=3, recipe="x").held_out
    for one in (Wanted(compare=True), Wanted(tasks=("a",)), Wanted(suite="s"), Wanted(memorisation=True)):
        assert not one.held_out


@pytest.mark.parametrize(
    ("targets", "wanted", "where"),
    [
        (["a"], Wanted(compare=True), "--compare"),
        (["a", "b", "c"], Wanted(compare=True), "--compare"),
        (["a", "b"], Wanted(compare=True, tasks=("t",)), "--compare"),
        (["a", "b"], Wanted(output="x"), "--output"),
        (["a"], Wanted(output="."), "--output"),
        (["a"], Wanted(shots=1), "--shots"),
        (["a"], Wanted(suite="s", shots=1), "--shots"),
        (["a"], Wanted(include_path="."), "--include-path"),
        (["a"], Wanted(chat=False), "--chat"),
        (["a"], Wanted(recipe="r", memorisation=True), "--recipe"),
        (["a"], Wanted(max_new_tokens=3, tasks=("t",)), "--max-new-tokens"),
        (["a", "b"], Wanted(base=False, compare=True), "--no-base"),
    ],
)
def test_what_does_not_go_together(targets: list[str], wanted: Wanted, where: str) -> None:
    with pytest.raises(UserError) as found:
        check_options(targets, wanted)
    assert found.value.problems[0].where == where


def test_what_does_go_together() -> None:
    check_options(["a", "b"], Wanted(compare=True, recipe="r", output="x.json", limit=2))
    check_options(["a", "b"], Wanted(tasks=("t",), suite="s", shots=0, chat=True, include_path="."))


BASE = {"loss": 4.0, "perplexity": 54.6, "token_accuracy": 0.25, "ended": 0, "answers": 4, "format_rate": 0.0}
TUNED = {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.5, "ended": 3, "answers": 4, "format_rate": 0.5}
TUNED |= {"format_faults": {"cut": 1, "role": 1}}  # type: ignore[dict-item]


def test_both_sides_as_a_training_prints_them() -> None:
    assert held_out_lines({"stage": "sft", "rows": 8, "base": BASE, "tuned": TUNED}) == [
        "held-out loss: 4.0000 -> 2.0000 (-50.0 %), perplexity 54.60 -> 7.39, token accuracy 0.250 -> 0.500",
        "answers that end by themselves: 0 -> 3 of 4 prompts",
        "answers that are well-formed: 0 -> 2 of 4 prompts; faults: cut 1, role 1",
    ]


def test_one_side_alone() -> None:
    assert held_out_lines({"stage": "sft", "rows": 8, "tuned": TUNED})[0] == (
        "held out, 8 rows: loss, nats a token 2.0000, perplexity 7.3900, token accuracy 0.5000"
    )
    pairs = {"loss": 0.5, "accuracy": 0.75, "margin": 1.0}
    assert held_out_lines({"stage": "reward", "rows": 8, "tuned": pairs}) == [
        "held out, 8 pairs: loss 0.5000, pairs rated right 0.7500, margin of the rewards 1.0000"
    ]
    assert held_out_lines({"stage": "sft", "rows": 8, "base": {"ended": 1, "answers": 2, "format_rate": 0.5}}) == [
        "answers that end by themselves: 1 of 2 prompts",
        "answers that are well-formed: 1 of 2 prompts",
    ]


@pytest.mark.parametrize(
    ("name", "sources", "expected"),
    [
        ("google/gemma-3-1b-it", None, True),
        ("google/gemma-3-4b-it-qat-q4_0-unquantized", None, True),
        ("/models/gemma-3-1b-it-Q4_K_M.gguf", None, True),
        ("/models/gemma-3-1b-it/", None, True),
        ("google/gemma-3-1b-pt", None, False),
        ("/big-it/gemma-2b", None, False),
        ("me/gemma-italian", None, False),
        ("runs/a", ["messages", "text"], True),
        ("runs/a", ["text"], False),
    ],
)
def test_who_is_asked_in_turns(name: str, sources: list[str] | None, expected: bool) -> None:
    plan = None
    if sources:
        data = {"sources": [{"format": one} for one in sources], "train_on": "model_turns"}
        plan = SimpleNamespace(values=lambda section: data)
    assert talks(SimpleNamespace(name=name, plan=plan, tuned=plan is not None)) is expected  # type: ignore[arg-type]


def test_two_targets_do_not_write_one_file(tmp_path: Path) -> None:
    one, two, three = (SimpleNamespace(name=name, file=tmp_path / file) for name, file in ("ax", "bx", "cy"))
    check_files([one, three], Wanted())  # type: ignore[list-item]
    check_files([one, two], Wanted(compare=True))  # type: ignore[list-item]
    with pytest.raises(UserError, match="written over that of a"):
        check_files([one, two], Wanted())  # type: ignore[list-item]


def test_one_of_several_processes_is_refused() -> None:
    check_alone({})
    check_alone({"WORLD_SIZE": "1"})
    with pytest.raises(UserError, match="2 were started"):
        check_alone({"WORLD_SIZE": "2"})
