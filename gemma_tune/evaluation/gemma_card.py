"""The two tables of Gemma 1.1's model card: each row, Google's figures, and the task of lm-eval that comes nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCE = "model card of google/gemma-1.1-2b-it and google/gemma-1.1-7b-it"
"""Read in copies of it: "Benchmark Results" (pretrained models) and "Evaluation Results", "Gemma 1.1" (tuned models).

The safety table is also table 18 of the Gemma 2 report (arXiv 2408.00118), with the same figures. That has no BOLD, and
says 4-shot for BBQ where the card says 1-shot.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the card, and what is nearest to it in lm-eval.

    Attributes:
        card: its name on the card.
        task: of lm-eval, or ours.
        shots: examples in the prompt; None for the task's own number.
        metric: of the task, as lm-eval's results spell it (`metric` or `metric,filter`).
        figures: the card's, in percent: (2B, 7B); None where the card has a blank.
        stated: what the card says of how it was measured; empty where it says nothing.
        shots_stated: whether that includes the number of shots.
        chat_task: what is run instead where prompts are conversations; the same task where empty.
        safety: whether it is of the table of tuned models; else it is of that of pretrained ones.
        scale: what our figure is multiplied by to be the card's unit.
        note: what is known to differ.
    """

    card: str
    task: str
    shots: int | None
    metric: str
    figures: tuple[float | None, float | None]
    stated: str = ""
    shots_stated: bool = False
    chat_task: str = ""
    safety: bool = False
    scale: float = 100.0
    note: str = ""


def _known(card: str, task: str, shots: int, metric: str, small: float, large: float, stated: str = "") -> Row:
    """A row whose shots the card states."""
    said = stated or f"{shots}-shot"
    return Row(card=card, task=task, shots=shots, metric=metric, figures=(small, large), stated=said, shots_stated=True)


def _safety(card: str, task: str, metric: str, small: float | None, large: float | None, **more: Any) -> Row:
    return Row(card=card, task=task, metric=metric, figures=(small, large), safety=True, **{"shots": None, **more})


GEMMA_CARD: tuple[Row, ...] = (
    _known("MMLU", "mmlu", 5, "acc", 42.3, 64.3, "5-shot, top-1"),
    _known("HellaSwag", "hellaswag", 0, "acc_norm", 71.4, 81.2),
    _known("PIQA", "piqa", 0, "acc_norm", 77.3, 81.2),
    _known("SocialIQA", "social_iqa", 0, "acc", 49.7, 51.8),
    _known("BoolQ", "boolq", 0, "acc", 69.4, 83.2),
    Row(
        card="WinoGrande",
        task="winogrande",
        shots=0,
        metric="acc",
        figures=(65.4, 72.3),
        stated="partial score",
        note="lm-eval scores the part behind the blank, which is partial scoring",
    ),
    _known("CommonsenseQA", "commonsense_qa", 7, "acc", 65.3, 71.3),
    Row(card="OpenBookQA", task="openbookqa", shots=0, metric="acc_norm", figures=(47.8, 52.8)),
    Row(card="ARC-e", task="arc_easy", shots=0, metric="acc_norm", figures=(73.2, 81.5)),
    Row(card="ARC-c", task="arc_challenge", shots=0, metric="acc_norm", figures=(42.1, 53.2)),
    _known("TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace", 53.2, 63.4),
    _known("Natural Questions", "nq_open", 5, "exact_match,remove_whitespace", 12.5, 23.0),
    Row(
        card="HumanEval",
        task="humaneval",
        chat_task="humaneval_instruct",
        shots=None,
        metric="pass@1,create_test",
        figures=(22.0, 32.3),
        stated="pass@1",
    ),
    _known("MBPP", "mbpp", 3, "pass_at_1", 29.2, 44.4),
    Row(
        card="GSM8K",
        task="gsm8k",
        shots=None,
        metric="exact_match,strict-match",
        figures=(17.7, 46.4),
        stated="maj@1",
    ),
    _known("MATH", "minerva_math", 4, "exact_match", 11.8, 24.3),
    Row(card="AGIEval", task="agieval_en", shots=None, metric="acc", figures=(24.2, 41.7)),
    Row(
        card="BIG-Bench",
        task="bbh_cot_fewshot",
        shots=None,
        metric="exact_match,get-answer",
        figures=(35.2, 55.1),
        note="BIG-Bench Hard with chains of thought",
    ),
    _safety(
        "RealToxicity",
        "realtoxicityprompts",
        "perspective_api_toxicity_score",
        7.03,
        8.04,
        stated="average",
        note="each text is sent to Google's Perspective API",
    ),
    _safety("BOLD", "bold", "sentiment", 47.76, None, note="the card does not say what it counts; ours is sentiment"),
    _safety("CrowS-Pairs", "crows_pairs_english", "pct_stereotype", 45.89, 49.67, stated="top-1"),
    _safety("BBQ Ambig", "bbq", "accuracy_amb", 58.97, 86.06, shots=1, stated="1-shot, top-1", shots_stated=True),
    _safety("BBQ Disambig", "bbq", "accuracy_disamb", 53.90, 85.08, shots=1, stated="top-1"),
    _safety("Winogender", "winogender_all", "acc", 50.14, 57.64, stated="top-1"),
    _safety("TruthfulQA", "truthfulqa_mc2", "acc", 44.24, 45.34, note="the Gemma 2 report says MC2"),
    _safety("Winobias 1_2", "winobias_type1", "acc", 55.93, 59.22, note="read as sentences of type 1"),
    _safety("Winobias 2_2", "winobias_type2", "acc", 89.46, 89.2, note="read as sentences of type 2"),
    _safety(
        "Toxigen",
        "toxigen",
        "acc",
        29.64,
        38.75,
        note="the card's is the toxicity of generated text, ours the accuracy of telling hateful statements",
    ),
)
