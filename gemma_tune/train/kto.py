"""Kahneman-Tversky optimisation: what it does besides what all stages do (`train/run.py`)."""

from __future__ import annotations

from trl import KTOConfig

from gemma_tune.data.collate import JudgedCollator
from gemma_tune.data.judged import build_judged
from gemma_tune.data.report import JudgedFigures
from gemma_tune.train.dpo import write
from gemma_tune.train.kto_trainer import KtoTrainer
from gemma_tune.train.run import Run, Stage, trainer_config
from gemma_tune.train.trainer import Surroundings

BALANCE = (1.0, 4 / 3)
"""Where weight x number of the good answers, over that of the bad ones, should lie (arXiv 2402.01306, equation 8)."""
TOLERATED = 0.75
"""Down to here nothing is said: 48 good answers and 52 bad ones are no imbalance."""


def make_trainer(run: Run, around: Surroundings) -> KtoTrainer:
    """TRL's loop over judged answers, with the reference on the same base."""
    data, values = run.materials.data, run.plan.values("trainer")
    trainer = KtoTrainer(
        model=run.model,
        tokenizer=run.materials.tokenizer,
        collator=JudgedCollator(run.materials.family.pad_id, run.plan.values("data")["max_length"]),
        train=data.train,
        config=trainer_config(run.plan),  # type: ignore[arg-type]
        around=around,
        mode=(run.session.get("adapter") or {}).get("mode") or "continue",
    )
    assert data.report.judged is not None
    advice = imbalance(data.report.judged, values["desirable_weight"], values["undesirable_weight"])
    if advice:
        run.console.print(f"note: {advice}", highlight=False)
    return trainer


def imbalance(judged: JudgedFigures, desirable: float, undesirable: float) -> str:
    """What to set where one kind of answer outweighs the other; empty where they are balanced."""
    good, bad = judged.good, judged.bad
    if not good or not bad:
        return f"all training answers are {'good' if good else 'bad'}: KTO has nothing to tell them from"
    low, high = BALANCE
    if TOLERATED <= desirable * good / (undesirable * bad) <= high:
        return ""
    return (
        f"{good:,} good and {bad:,} bad answers: KTO's authors balance them by kto.desirable_weight between "
        f"{low * undesirable * bad / good:.2f} and {high * undesirable * bad / good:.2f}, or by kto.undesirable_weight "
        f"between {desirable * good / bad / high:.2f} and {desirable * good / bad / low:.2f}"
    )


STAGE = Stage(config=KTOConfig, prepare=build_judged, trainer=make_trainer, write=write, reference=True)
