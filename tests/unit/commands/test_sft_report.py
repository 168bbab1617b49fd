"""What `gemma-tune sft` prints at its end."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma_tune import console
from gemma_tune.commands import sft

RESULTS: dict[str, Any] = {
    "base": {"loss": 4.0, "perplexity": 54.6, "token_accuracy": 0.25, "ended": 1, "answers": 3},
    "tuned": {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.5, "ended": 3, "answers": 3},
    "relative_fall": 0.5,
    "answers": [
        {
            "prompt": "Who?\nYou?",
            "base": {"text": "\x1b[31mnobody", "ended": False, "tokens": 4},
            "tuned": {"text": "I.", "ended": True, "tokens": 3},
        },
        {"prompt": "long " * 100, "base": {"text": "x", "ended": True, "tokens": 1}},
    ],
    "steps": 1200,
    "tokens_seen": 34567,
    "train_seconds": 12.34,
    "tokens_per_second": 2801.0,
    "peak_memory": {"rss": 2**30},
    "weights": {"folder": "adapter", "files": {}},
}


def printed(monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], **settings: Any) -> str:
    stream = io.StringIO()
    screen = Console(file=stream, width=200, markup=False, highlight=False, **settings)
    monkeypatch.setattr(console, "stdout", lambda: screen)
    sft.report(results, Path("runs/x"))
    return stream.getvalue()


def test_in_a_pipe_one_line_a_text_and_nothing_drives_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, RESULTS).splitlines()
    assert lines[:3] == ["prompt: Who? You?", r"  base: \x1b[31mnobody [cut]", "  tuned: I."]
    assert lines[3].endswith("...") and lines[5] == "  tuned: -"
    assert lines[6:] == [
        "held-out loss: 4.0000 -> 2.0000 (-50.0 %), perplexity 54.60 -> 7.39, token accuracy 0.250 -> 0.500",
        "answers that end by themselves: 1 -> 3 of 3 prompts",
        "1,200 steps, 34,567 tokens in 12.3 s of training (2,801 tokens/s); peak memory 1.00 GiB rss",
        "result: runs/x/adapter",
        "talk to it: gemma-tune chat runs/x",
    ]


def test_on_a_terminal_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, RESULTS, force_terminal=True)
    assert "base" in text and "tuned" in text and "│" in text and "Who? You?" in text
    assert "\x1b[31m" not in text.replace("\\x1b[31m", "")


def test_without_held_out_rows_there_is_still_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, {"steps": 2, "base": {"answers": 0}, "tuned": {"answers": 0}, "answers": []})
    assert "held-out" not in text and "2 steps" in text


def test_a_package_can_be_hidden_while_others_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with sft.unseen("colorsys"):
        assert find_spec("colorsys") is None
        with pytest.raises(ImportError):
            import colorsys
    import colorsys

    with sft.unseen("colorsys"):
        assert sys.modules["colorsys"] is colorsys, "what is imported already stays"
