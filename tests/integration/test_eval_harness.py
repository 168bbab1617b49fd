"""The real Gemma 3 270M on two multiple-choice tasks, through ours and through lm-eval's own HFLM: the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'gemma-tune[eval]'")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from gemma_tune.evaluation import harness
from gemma_tune.evaluation.harness_model import GemmaLM
from gemma_tune.evaluation.harness_tasks import find_tasks, local_datasets
from gemma_tune.models.saved import load_run

HUB = str(Path(__file__).parents[1] / "data" / "hub")
Scores = dict[tuple[str, int], list[float]]

pytestmark = pytest.mark.slow


def evaluated(lm: Any, tasks: list[str], limit: int | None = None) -> tuple[dict[str, Any], Scores]:
    """Metrics of each task, and the log-likelihood of each choice of each item."""
    manager = find_tasks(tasks, HUB)
    with local_datasets(HUB):
        found = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    samples = found["samples"].items()
    scores = {(task, row["doc_id"]): [r[0][0] for r in row["resps"]] for task, rows in samples for row in rows}
    return {task: harness.metrics(found["results"][task]) for task in tasks}, scores


def best(scores: Scores) -> dict[tuple[str, int], int]:
    return {item: nats.index(max(nats)) for item, nats in scores.items()}


def furthest(a: Scores, b: Scores) -> float:
    return max(abs(x - y) for item in a for x, y in zip(a[item], b[item], strict=True))


def test_the_real_model_answers_as_in_stock_lm_eval(real_270m: Path) -> None:
    """Equal to the last item: in fp32 to stock as it comes, in bf16 to stock with its option `softmax_dtype`.

    In bf16 as it comes, stock rounds sums of log-probabilities to steps of up to 0.25, and ties fall to the first
    choice. (On these 80 items that moved two.)
    """
    model, tokenizer, family = load_run(real_270m, dtype="float32")

    def ours() -> GemmaLM:
        return GemmaLM(model, tokenizer, family, batch_size=8)

    def stock(**options: Any) -> HFLM:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **options)

    figures, mine = evaluated(ours(), ["arc_easy"])
    as_it_comes, theirs = evaluated(stock(add_bos_token=True), ["arc_easy"])
    assert len(mine) == 40 and best(mine) == best(theirs) and furthest(mine, theirs) < 1e-3
    assert figures == as_it_comes
    assert figures["arc_easy"]["acc_norm"] > 0.6  # it is no random model

    model.to(torch.bfloat16)
    figures, mine = evaluated(ours(), ["hellaswag"])
    unrounded, theirs = evaluated(stock(add_bos_token=True, softmax_dtype="float32"), ["hellaswag"])
    assert len(mine) == 40 and best(mine) == best(theirs) and furthest(mine, theirs) < 1e-3
    assert figures == unrounded
    assert figures["hellaswag"]["acc_norm"] > 0.6

    with_bos, _ = evaluated(ours(), ["arc_easy"], limit=12)
    without, _ = evaluated(stock(add_bos_token=False), ["arc_easy"], limit=12)
    assert without["arc_easy"]["acc_norm"] < with_bos["arc_easy"]["acc_norm"] - 0.2  # what a forgotten BOS costs
