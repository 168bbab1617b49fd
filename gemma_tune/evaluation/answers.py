"""Greedy answers to fixed prompts: what they are, whether they end, and whether they are turns of Gemma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.evaluation.formats import count_faults, faults, format_rate
from gemma_tune.evaluation.held_out import Rows
from gemma_tune.evaluation.target import Opened, Voice
from gemma_tune.gemma.conversation import Document
from gemma_tune.train.evaluate import Answer, answers
from gemma_tune.train.run import figures, vars_of


@dataclass(frozen=True)
class Given:
    """Answers of one model to the prompts of `rows`, and the faults of each (`formats`)."""

    rows: Rows
    answers: list[Answer]
    faults: list[tuple[str, ...]]

    def figures(self) -> dict[str, Any]:
        """Stop rate as in run.json, and format rate over the same answers."""
        found = figures(None, self.rows.prompts, self.answers)
        if not found:
            return {}
        counted = [self.faults[number] for number in self.counted()]
        return found | {"format_rate": format_rate(counted), "format_faults": count_faults(counted)}

    def counted(self) -> list[int]:
        """Numbers of the answers that the rates are about: those to held-out prompts, or all where there are none."""
        held_out = [number for number, prompt in enumerate(self.rows.prompts) if prompt.held_out]
        return held_out or list(range(len(self.answers)))

    def lines(self, voice: Voice) -> list[dict[str, Any]]:
        """Lines of evaluation.rows.jsonl."""
        return [
            {
                "part": "answers",
                "model": voice,
                "row": number,
                "ended": self.answers[number].ended,
                "well_formed": not self.faults[number],
            }
            for number in self.counted()
        ]


def answer_prompts(opened: Opened, rows: Rows) -> Given:
    """The greedy answers of a model, as it speaks now."""
    found = answers(opened.model, opened.tokenizer, opened.family, rows.asked(), max_new_tokens=rows.max_new_tokens)
    wrong = [
        faults(answer.text, answer.ids, answer.ended, opened.family, document=isinstance(prompt.example, Document))
        for prompt, answer in zip(rows.prompts, found, strict=True)
    ]
    return Given(rows, found, wrong)


def side_by_side(given: dict[Voice, Given]) -> list[dict[str, Any]]:
    """`answers` of evaluation.json: each prompt with what was said before and after."""
    some = next(iter(given.values()), None)
    if some is None:
        return []
    return [
        {"prompt": prompt.label, "held_out": prompt.held_out, "reference": prompt.reference}
        | {voice: vars_of(one.answers[number]) | _faults(one.faults[number]) for voice, one in given.items()}
        for number, prompt in enumerate(some.rows.prompts)
    ]


def _faults(found: Sequence[str]) -> dict[str, list[str]]:
    return {"faults": list(found)} if found else {}
