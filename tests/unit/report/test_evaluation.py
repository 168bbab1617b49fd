"""What the report says of tasks."""

from __future__ import annotations

from gemma_tune.report.evaluation import tables


def test_the_cards_figure_stands_beside_its_own_metric_and_what_did_not_run_says_why() -> None:
    card = {"metric": "exact_match,strict", "figure": 0.177, "stated": False}
    values = {"exact_match,strict": 0.1, "exact_match_stderr,strict": 0.02, "exact_match,loose": 0.2}
    tasks = {
        "gsm8k": {"metrics": values, "shots": 5, "items": 10, "card": card},
        "mbpp": {"metrics": {}, "items": 0, "skipped": "no consent", "card": {"metric": "pass_at_1", "figure": 0.292}},
    }
    (table,) = tables({"tasks": tasks})
    assert table.rows == (
        ("gsm8k", "exact_match,strict", "0.1000 ± 0.020", "5", "10", "0.1770 (shots not stated)"),
        ("gsm8k", "exact_match,loose", "0.2000", "5", "10", "–"),
        ("mbpp", "pass_at_1", "left out: no consent", "–", "–", "0.2920"),
    )
