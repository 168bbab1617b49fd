"""The losses that a recipe asks for, as TRL computes them, against the formulas of their papers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from gemma_tune.plan.choices_pairs import trl_loss
from gemma_tune.recipe.schema import Dpo
from tests.unit.plan.recipes import plan_for

# log p of each token of two pairs (chosen, chosen, rejected, rejected); 0 where a position carries no loss.
LOG_PROBS = torch.tensor(
    [[0.0, -1.0, -0.5, -2.0], [0.0, -0.25, -0.75, 0.0], [0.0, -1.5, -3.0, 0.0], [0.0, -0.125, -0.5, -0.25]],
    dtype=torch.float64,
)
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
REFERENCE = torch.tensor([-4.0, -0.75, -3.5, -1.5], dtype=torch.float64)
TOKENS = MASK.sum(1).double()


def of_trl(dpo: Dpo) -> float:
    """The loss of the batch above by TRL's own code, with the keywords that the plan gives it."""
    types, weights, smoothing = trl_loss(dpo)
    accelerator = SimpleNamespace(device="cpu", gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=types,
        loss_weights=weights,
        label_smoothing=smoothing,
        beta=dpo.beta,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    nothing = torch.zeros(LOG_PROBS.shape)
    said = SimpleNamespace(log_probs=LOG_PROBS, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    chosen, rejected = REFERENCE.chunk(2)
    inputs: dict[str, Any] = {
        "input_ids": torch.ones_like(MASK),
        "attention_mask": torch.ones_like(MASK),
        "completion_mask": MASK,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return float(DPOTrainer._compute_loss(trainer, lambda **_: said, inputs, return_outputs=False))  # type: ignore[arg-type]


def ratios() -> tuple[torch.Tensor, torch.Tensor]:
    """log p - log p_reference of the chosen and of the rejected answers."""
    chosen, rejected = (LOG_PROBS.sum(1) - REFERENCE).chunk(2)
    return chosen, rejected


def by_hand(dpo: Dpo) -> float:
    """The formulas of the papers, written down again."""
    chosen, rejected = ratios()
    x, e = dpo.beta * (chosen - rejected), dpo.label_smoothing
    right, wrong = -logsigmoid(x), -logsigmoid(-x)
    of_chosen, of_rejected = TOKENS.chunk(2)
    each = {
        "sigmoid": (1 - e) * right + e * wrong,  # cDPO; DPO where e is 0
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "hinge": (1 - x).clamp(min=0),
        "ipo": (chosen / of_chosen - rejected / of_rejected - 1 / (2 * dpo.beta)) ** 2,
        "sigmoid_norm": -logsigmoid(dpo.beta * (chosen / of_chosen - rejected / of_rejected)),
        "apo_zero": 1 - torch.sigmoid(dpo.beta * chosen) + torch.sigmoid(dpo.beta * rejected),
        "apo_down": torch.sigmoid(dpo.beta * chosen) + 1 - torch.sigmoid(x),
    }
    usual = -LOG_PROBS[:2].sum() / of_chosen.sum()
    return float(each[dpo.loss].mean() + dpo.sft_weight * usual)


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("loss", Dpo.model_fields["loss"].annotation.__args__)
def test_a_loss_is_the_papers(loss: str, beta: float) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    dpo = Dpo(loss=loss, beta=beta, label_smoothing=smoothing)  # type: ignore[arg-type]
    assert of_trl(dpo) == pytest.approx(by_hand(dpo), rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.01, 0.1, 0.25, 0.49])
def test_conservative_dpo_by_way_of_the_robust_loss(smoothing: float) -> None:
    dpo = Dpo(beta=0.5, label_smoothing=smoothing)
    assert of_trl(dpo) == pytest.approx(by_hand(dpo), rel=1e-9)
    if smoothing:
        assert of_trl(dpo) != pytest.approx(of_trl(Dpo(beta=0.5)), rel=1e-3), "trl's own sigmoid ignores it"


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_usual_loss_is_added(loss: str) -> None:
    dpo = Dpo(loss=loss, beta=0.5, sft_weight=0.3)  # type: ignore[arg-type]
    assert of_trl(dpo) == pytest.approx(by_hand(dpo), rel=1e-9)
    assert trl_loss(dpo) == ([loss, "sft"], [1.0, 0.3], 0.0)


def test_trl_still_ignores_the_smoothing_of_sigmoid() -> None:
    """Once it does not, cDPO has a name of its own there."""
    chosen, rejected = ratios()
    plain = -logsigmoid(0.5 * (chosen - rejected)).mean()
    branch = inspect.getsource(DPOTrainer._compute_loss).partition('loss_type == "sigmoid":')[2].partition("elif")[0]
    assert "label_smoothing" not in branch
    assert of_trl(Dpo(beta=0.5)) == pytest.approx(float(plain))


def test_a_negative_smoothing_is_computed_not_refused() -> None:
    """TRL's trainer warns only."""
    values = plan_for({"stage": "dpo", "dpo.label_smoothing": 0.1}, "cpu").values("trainer")
    assert values["loss_type"] == ["robust"] and values["label_smoothing"] == pytest.approx(-0.125)
    source = inspect.getsource(DPOTrainer.__init__)
    rest = source.partition('"robust" in self.loss_types')[2]
    assert rest.lstrip().partition("\n")[2].lstrip().startswith("logger.warning("), "it raises now"
