"""The held-out rows of a run, built again exactly as the training built them, and the loss of models on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from gemma_tune import console
from gemma_tune.data.build import Prepared
from gemma_tune.data.collate import Collator
from gemma_tune.data.tokens import IGNORED
from gemma_tune.errors import UserError
from gemma_tune.evaluation.target import Opened, Target, Voice, autocast_of
from gemma_tune.gemma.conversation import Document
from gemma_tune.gemma.families import Family
from gemma_tune.models.tokenizer import GemmaEncoder
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.schema import Samples
from gemma_tune.train.evaluate import HeldOut, Prompt, held_out_loss, prompt_ids, sample_prompts
from gemma_tune.train.loss_head import add_scoring_head
from gemma_tune.train.parts import prepared_before
from gemma_tune.train.run import stage_of


@dataclass(frozen=True)
class Rows:
    """Held-out rows of a plan, and what is asked beside them.

    Attributes:
        plan: whose rows they are; its stage says what a row is.
        data: all that was prepared, training rows as well.
        rows: the held-out ones that the run scores, at most `limit`.
        prompts: what the run answers before and after.
        family, encoder: that tokenised them.
        batch_size: rows in one forward pass.
        max_new_tokens: of an answer.
    """

    plan: Plan
    data: Prepared[Any]
    rows: Any
    prompts: list[Prompt]
    family: Family
    encoder: GemmaEncoder
    batch_size: int
    max_new_tokens: int

    @property
    def stage(self) -> str:
        return self.plan.stage

    def asked(self) -> list[list[int]]:
        """The token ids of `prompts`."""
        return prompt_ids(self.prompts, self.family, self.encoder)


def rows_of_run(target: Target, opened: Opened, *, limit: int | None = None, max_new_tokens: int | None = None) -> Rows:
    """The rows that were held out when `target` was trained.

    Args:
        limit: rows and prompts at most; None for as many as the run itself takes.
        max_new_tokens: of an answer; None for the run's.

    Raises:
        UserError: the data are not what they were, nothing is held out, or there is no plan.
    """
    if target.plan is None:
        raise UserError(
            "there is no plan beside it that says which rows were held out",
            where=target.name,
            fix="name a run folder, say whose held-out rows to use with --recipe FILE, or measure --tasks",
        )
    rows = build_rows(target.plan, opened.family, opened.encoder, limit=limit, max_new_tokens=max_new_tokens)
    recorded = (target.run.get("data") or {}).get("fingerprint")
    if recorded is None:
        console.note("run.json does not say what the data were: the held-out rows may be others than in the training")
    elif recorded != rows.data.fingerprint:
        by = (target.run.get("versions") or {}).get("gemma-tune")
        raise UserError(
            "the data are not what they were in the training: rows that were trained on may be held out now",
            where=", ".join(str(source["name"]) for source in target.plan.values("data")["sources"]),
            fix="put the data and their functions back as they were, with the version of gemma-tune that read them "
            f"({by}); or name other held-out rows with --recipe FILE",
        )
    return rows


def build_rows(
    plan: Plan, family: Family, encoder: GemmaEncoder, *, limit: int | None, max_new_tokens: int | None
) -> Rows:
    """The held-out rows and prompts of `plan`, in the tokens of `encoder`.

    Raises:
        UserError: as the stage's data, or nothing is held out.
    """
    prepare, keywords = stage_of(plan).prepare, plan.values("data")
    kept = prepared_before(prepare, family, encoder.sha256, keywords, Console(quiet=True))
    data = kept.prepared if kept else prepare(family, encoder, **keywords)
    if not len(data.held_out):
        raise UserError(
            "no rows are held out: there is nothing to measure on",
            where="data.holdout",
            fix="train with data.holdout above 0; or name other rows with --recipe FILE, or measure --tasks",
        )
    session, trainer = plan.values("session"), plan.values("trainer")
    samples = session.get("samples") or Samples().model_dump()  # a training on TPUs asks nothing
    most = session["evaluation"]["max_rows"]
    if limit is not None:
        most, samples = min(most, limit), {**samples, "held_out": min(samples["held_out"], limit)}
    rows = data.held_out.select(range(min(len(data.held_out), most)))
    answers = stage_of(plan).answers
    return Rows(
        plan,
        data,
        rows,
        sample_prompts(samples["prompts"], data.held_out_examples, samples["held_out"]) if answers else [],
        family,
        encoder,
        trainer.get("per_device_eval_batch_size") or trainer["per_device_train_batch_size"],
        max_new_tokens or samples["max_new_tokens"],
    )


# --- loss over tokens


@dataclass(frozen=True)
class TokenScores:
    """The loss of one model, and what it is made of, one number a row.

    Attributes:
        whole: over all rows.
        nats: sum of -log p of each row, [rows]. `correct`: first guesses that are right. `tokens`: with loss.
    """

    whole: HeldOut
    nats: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray

    def rows(self, voice: Voice) -> list[dict[str, Any]]:
        """Lines of evaluation.rows.jsonl."""
        return [
            {"part": "held_out", "model": voice, "row": row, "nats": nats, "correct": int(right), "tokens": int(count)}
            for row, (nats, right, count) in enumerate(zip(self.nats.tolist(), self.correct, self.tokens, strict=True))
        ]


def token_rows(rows: Rows) -> list[Mapping[str, Any]]:
    """Rows with `input_ids` and `labels`: of pairs the chosen answers, of judged answers the good ones.

    A prompt alone has nothing to be scored: there is no row then.
    """
    if rows.stage == "sft":
        return list(rows.rows)
    found: list[Mapping[str, Any]] = []
    for row in rows.rows:
        answer = row.get("chosen_ids") or (row.get("completion_ids") if row.get("label") == 1 else None)
        if answer:
            labels = [IGNORED] * len(row["prompt_ids"]) + list(answer)
            found.append({"input_ids": [*row["prompt_ids"], *answer], "labels": labels})
    return found


def score_tokens(
    opened: Opened, rows: Sequence[Mapping[str, Any]], *, batch_size: int, plan: Plan | None
) -> TokenScores | None:
    """Loss, accuracy and their parts, by the same passes as in training; None without a trained token.

    Args:
        opened: as it speaks now.
        rows: from `token_rows`.
        batch_size: rows in one forward pass.
        plan: of the training, whose autocast is used; None for another model.
    """
    parts = np.zeros((len(rows), 3))

    def keep(numbers: Sequence[int], sums: torch.Tensor) -> None:
        parts[list(numbers)] = sums.numpy()

    model = opened.model
    add_scoring_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    family = opened.family
    collate = Collator(family.pad_id, fill_id=family.bos_id)
    with autocast_of(plan):
        whole = held_out_loss(model, rows, collate, batch_size=batch_size, each=keep)
    return TokenScores(whole, -parts[:, 0], parts[:, 1], parts[:, 2]) if whole else None


def are_documents(rows: Rows) -> bool:
    """Whether the rows are texts without turns."""
    examples = rows.data.held_out_examples
    return bool(examples) and all(isinstance(example, Document) for example in examples)
