"""The loss of KTO as TRL computes it, and the held-out figures, against the paper's equation 7."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import KTOTrainer

from gemma_tune.data.report import JudgedFigures
from gemma_tune.train.kto import imbalance
from gemma_tune.train.kto_trainer import KtoTrainer, answer_sums, figures_of

# log p of each token of four answers, and of the KL rows; 0 where a position carries no loss.
LOG_PROBS = torch.tensor(
    [[0.0, -1.0, -0.5, -2.0], [0.0, -0.25, -0.75, 0.0], [0.0, -1.5, -3.0, 0.0], [0.0, -0.125, -0.5, -0.25]],
    dtype=torch.float64,
)
OTHERS = LOG_PROBS.roll(1, 0) * 2
REFERENCE = torch.tensor([-4.0, -0.75, -3.5, -1.5], dtype=torch.float64)
GOOD = torch.tensor([True, False, True, False])
RATIOS = LOG_PROBS.sum(1) - REFERENCE


def of_trl(kl: float, *, beta: float, weights: tuple[float, float], kl_rows: bool = True) -> float:
    """The loss of the batch above by TRL's own code. The KL rows' log-ratios have the mean `kl`."""
    ids = torch.ones(4, 5, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 4)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    # Ours stands between TRL's loss and TRL's scores of the KL rows.
    ours = type("Ours", (KtoTrainer,), {"__init__": lambda self: None})()
    ours.calculate_KL = True
    trainer._compute_kl_logps = ours._compute_kl_logps
    nothing = torch.zeros(LOG_PROBS.shape)

    def model(*, input_ids: torch.Tensor, **_: Any) -> Any:
        said = OTHERS if int(input_ids[0, 0]) == 2 else LOG_PROBS
        return SimpleNamespace(log_probs=said, entropy=nothing, mean_logits=nothing)

    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, "label": GOOD, "ref_logps": REFERENCE}
    if kl_rows:
        of_others = {"KL_input_ids": 2 * ids, "KL_attention_mask": ids, "KL_completion_mask": mask}
        inputs |= of_others | {"ref_KL_logps": OTHERS.sum(1) - kl}
    else:
        inputs["ref_KL_logps"] = torch.zeros(1)
    return float(KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))


def by_hand(kl: float, *, beta: float, weights: tuple[float, float]) -> float:
    point = max(kl, 0.0)
    values = [
        weights[0] * (1 - torch.sigmoid(beta * (ratio - point)))
        if good
        else weights[1] * (1 - torch.sigmoid(beta * (point - ratio)))
        for ratio, good in zip(RATIOS, GOOD.tolist(), strict=True)
    ]
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("kl", [0.0, 0.75, -2.0])
def test_trl_the_paper_and_the_held_out_figures_agree(kl: float, beta: float, weights: tuple[float, float]) -> None:
    expected = by_hand(kl, beta=beta, weights=weights)
    assert of_trl(kl, beta=beta, weights=weights) == pytest.approx(expected, rel=1e-9)
    found = figures_of(answer_sums(RATIOS, GOOD, max(kl, 0.0), beta=beta, weights=weights).tolist(), max(kl, 0.0))
    assert found is not None and found.loss == pytest.approx(expected, rel=1e-9)


def test_without_kl_rows_the_point_is_zero() -> None:
    settings: Any = {"beta": 0.5, "weights": (1.0, 1.0)}
    assert of_trl(9.0, kl_rows=False, **settings) == pytest.approx(by_hand(0.0, **settings), rel=1e-9)


def test_the_held_out_figures() -> None:
    found = figures_of(answer_sums(RATIOS, GOOD, 0.4, beta=0.5, weights=(1.0, 1.0)).tolist(), 0.4)
    assert found is not None
    # Log-ratios: good 0.5 and -1.0, bad -0.25 and 0.625; the point is 0.4.
    assert (found.accuracy, found.rows, found.kl) == (0.5, 4, 0.4)
    assert (found.good_reward, found.bad_reward) == (-0.125, 0.09375)
    start = figures_of(answer_sums(torch.zeros(4), GOOD, 0.0, beta=0.5, weights=(1.0, 1.0)).tolist(), 0.0)
    assert start is not None and (start.accuracy, start.loss) == (0.0, 0.5), "nothing is on any side yet"
    only_bad = figures_of(answer_sums(RATIOS[:1], ~GOOD[:1], 0.0, beta=0.5, weights=(1.0, 1.0)).tolist(), 0.0)
    assert only_bad is not None and only_bad.good_reward is None and "good_reward" not in only_bad.metrics()
    assert figures_of([0.0] * 6, 0.0) is None


@pytest.mark.parametrize(
    ("good", "bad", "weights", "words"),
    [
        (100, 100, (1.0, 1.0), ""),
        (130, 100, (1.0, 1.0), ""),
        (80, 100, (1.0, 1.0), ""),
        (140, 100, (1.0, 1.0), "between 0.71 and 0.95, or by kto.undesirable_weight between 1.05 and 1.40"),
        (100, 130, (1.3, 1.0), ""),
        (
            100,
            200,
            (1.0, 1.0),
            "between 2.00 and 2.67, or by kto.undesirable_weight between 0.38 and 0.50",
        ),
        (
            200,
            100,
            (1.0, 1.0),
            "between 0.50 and 0.67, or by kto.undesirable_weight between 1.50 and 2.00",
        ),
        (100, 0, (1.0, 1.0), "all training answers are good"),
        (0, 100, (1.0, 1.0), "all training answers are bad"),
    ],
)
def test_weights_that_balance(good: int, bad: int, weights: tuple[float, float], words: str) -> None:
    found = imbalance(JudgedFigures(good, bad, 1.0, 1.0), *weights)
    assert words in found and bool(words) == bool(found)
