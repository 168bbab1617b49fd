"""What TRL takes from us and what it does with it, held field by field to the installed version."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.collate import Collator
from gemma_tune.errors import TrainingError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.train.session import RunFolder
from gemma_tune.train.sft_trainer import SftTrainer
from gemma_tune.train.signals import Signals
from gemma_tune.train.trainer import RunTrainer, Surroundings

GENERATIONS = (
    "gemma1",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma3n_text",
    "gemma4",
    "gemma4_moe",
    "gemma4_text",
    "gemma4_unified",
)
LENGTHS = (6, 40, 9, 60)
Tiny = Callable[..., Path]


def family_of_tiny(name: str) -> Any:
    return FAMILIES["gemma4" if name == "gemma4_moe" else name]


def some_rows(lengths: tuple[int, ...] = LENGTHS) -> Dataset:
    """Rows of very different lengths: with them a mean of means is far from the mean of all tokens."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(500, 900, (length,), generator=made).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def config(folder: Path, **changes: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    return SFTConfig(**{**settings, **changes})


def trainer_of(model: Any, tiny_folder: Path, name: str, tmp_path: Path, rows: Dataset, **changes: Any) -> SftTrainer:
    family = family_of_tiny(name)
    folder = RunFolder(tmp_path, resume="never")
    around = Surroundings(folder=folder, keep=1, identity={}, signals=Signals(), held_out=rows)
    return SftTrainer(
        model=model,
        tokenizer=load_tokenizer(str(tiny_folder), None, family),
        collator=Collator(family.pad_id),
        train=rows,
        config=config(tmp_path, **changes),
        around=around,
    )


def base_of(tiny: Tiny, name: str, quantization: Mapping[str, Any] | None = None) -> tuple[Any, Path]:
    folder = tiny(name)
    family = family_of_tiny(name)
    model = {"name": str(folder), "dtype": "float32", "attn_implementation": family.attention[0]}
    return load_base(model, quantization or {}, family), folder


def adapted(tiny: Tiny, name: str, quantization: Mapping[str, Any] | None = None) -> tuple[Any, Path]:
    base, folder = base_of(tiny, name, quantization)
    family = family_of_tiny(name)
    torch.manual_seed(0)
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
        "target_modules": family.lora_targets["all-linear"],
    }
    model = attach(base, lora, family)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model, folder


def update(before: Any, after: Any) -> torch.Tensor:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs if b.requires_grad])


def step_of(kind: type, model: Any, folder: Path, name: str, tmp_path: Path, batch: int) -> torch.Tensor:
    """The update of one SGD step over the four rows, `batch` at a time."""
    start = copy.deepcopy(model)
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    if kind is SftTrainer:
        trainer: Any = trainer_of(model, folder, name, tmp_path, some_rows(), **settings)
    else:
        family = family_of_tiny(name)
        trainer = kind(
            model=model,
            args=config(tmp_path, **settings),
            data_collator=Collator(family.pad_id),
            train_dataset=some_rows(),
            processing_class=load_tokenizer(str(folder), None, family),
        )
    trainer.train()
    return update(start, model)


@pytest.mark.parametrize("name", GENERATIONS)
def test_four_rows_at_once_equal_four_accumulated(tiny: Tiny, name: str, tmp_path: Path) -> None:
    model, folder = adapted(tiny, name)
    whole = step_of(SftTrainer, copy.deepcopy(model), folder, name, tmp_path / "whole", 4)
    split = step_of(SftTrainer, copy.deepcopy(model), folder, name, tmp_path / "split", 1)
    assert whole.norm() > 0
    assert float((whole - split).norm() / whole.norm()) < 1e-4


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_stock_trl_accumulates_wrongly_where_the_class_refuses_loss_keywords(
    tiny: Tiny, name: str, tmp_path: Path
) -> None:
    """The defect that `model_accepts_loss_kwargs = True` removes. When this fails, upstream has mended it."""
    model, folder = adapted(tiny, name)
    assert model.get_base_model().accepts_loss_kwargs is False
    whole = step_of(SFTTrainer, copy.deepcopy(model), folder, name, tmp_path / "whole", 4)
    split = step_of(SFTTrainer, copy.deepcopy(model), folder, name, tmp_path / "split", 1)
    assert float((whole - split).norm() / whole.norm()) > 0.1


def test_a_batch_of_the_trainer_has_exactly_our_labels(tiny: Tiny, tmp_path: Path) -> None:
    base, folder = base_of(tiny, "gemma3_text")
    rows = some_rows()
    trainer = trainer_of(base, folder, "gemma3_text", tmp_path, rows)
    [batch] = list(trainer.get_train_dataloader())
    found = {
        tuple(ids[mask.bool()].tolist()): labels[mask.bool()].tolist()
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    }
    assert found == {tuple(row["input_ids"]): row["labels"] for row in rows}
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_packed_rows_reach_the_model_without_a_mask(tiny: Tiny, tmp_path: Path) -> None:
    base, folder = base_of(tiny, "gemma3_text")
    rows = some_rows((6, 9)).map(lambda row: {"position_ids": [*range(3), *range(len(row["input_ids"]) - 3)]})
    trainer = trainer_of(base, folder, "gemma3_text", tmp_path, rows)
    [batch] = list(trainer.get_train_dataloader())
    assert set(batch) == {"input_ids", "labels", "position_ids"}


def test_the_trainers_loss_is_the_mean_over_all_trained_tokens(tiny: Tiny, tmp_path: Path) -> None:
    base, folder = base_of(tiny, "gemma3_text")
    trainer = trainer_of(base, folder, "gemma3_text", tmp_path, some_rows())
    total, count = 0.0, 0
    for row in some_rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, :-1].float()
        wanted = labels[0, 1:]
        held = wanted != -100
        total += torch.nn.functional.cross_entropy(logits[held], wanted[held], reduction="sum").item()
        count += int(held.sum())
    logged: list[dict[str, float]] = []
    trainer.log = lambda logs, start_time=None: logged.append(dict(logs))  # type: ignore[method-assign]
    metrics = SftTrainer.evaluate(trainer)
    trainer.train()
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert logged[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_adapters_of_a_quantised_base_are_fp32_when_the_optimizer_is_made(tiny: Tiny, tmp_path: Path) -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    model, folder = adapted(tiny, "gemma3_text", nf4)
    stock = SFTTrainer(
        model=copy.deepcopy(model),
        args=config(tmp_path),
        data_collator=Collator(0),
        train_dataset=some_rows(),
        processing_class=load_tokenizer(str(folder), None, FAMILIES["gemma3_text"]),
    )
    assert {p.dtype for p in stock.model.parameters() if p.requires_grad} == {torch.bfloat16}, "TRL no longer casts"
    ours = trainer_of(model, folder, "gemma3_text", tmp_path, some_rows())
    ours.create_optimizer()
    held = [p for group in ours.optimizer.param_groups for p in group["params"]]
    assert held and {p.dtype for p in held} == {torch.float32}


def test_a_small_learning_rate_moves_nearly_all_of_a(tiny: Tiny, tmp_path: Path) -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    model, folder = adapted(tiny, "gemma3_text", nf4)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    trainer = trainer_of(
        model, folder, "gemma3_text", tmp_path, some_rows(), learning_rate=5e-6, optim="adamw_torch", max_steps=12
    )
    trainer.train()
    now = dict(model.named_parameters())
    moved = torch.cat([(now[name] != value).flatten() for name, value in start.items()])
    assert moved.float().mean() > 0.99


def test_nothing_is_sent_and_nothing_is_written_by_the_constructor_or_a_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    sent: list[Any] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: sent.append(k))
    base, folder = base_of(tiny, "gemma3_text")
    trainer_of(base, folder, "gemma3_text", tmp_path / "run", some_rows()).train()
    assert sent == []
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_an_engine_that_nobody_planned_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """accelerate takes one from its environment, whatever the plan says."""
    own = Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        own(self)
        setattr(self, kind, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    base, folder = base_of(tiny, "gemma3_text")
    with pytest.raises(TrainingError, match="the plan says single, but accelerate made it"):
        trainer_of(base, folder, "gemma3_text", tmp_path, some_rows())


def test_the_overridden_methods_still_exist_with_these_signatures() -> None:
    """A renamed method upstream would silently switch an override off."""
    for owner, names in {
        SFTTrainer: ("_send_telemetry", "_save_checkpoint", "evaluate", "log", "compute_loss"),
        Trainer: (
            "get_batch_samples",
            "_get_num_items_in_batch",
            "_clip_grad_norm",
            "_load_from_checkpoint",
            "_save_optimizer_and_scheduler",
            "_load_optimizer_and_scheduler",
            "_prepare_for_training",
            "_save_scaler",
            "_save_rng_state",
            "set_initial_training_values",
        ),
    }.items():
        for name in names:
            assert callable(getattr(owner, name)), name
    assert {name for kind in (SftTrainer, RunTrainer) for name in vars(kind) if hasattr(SFTTrainer, name)} >= {
        "_send_telemetry",
        "get_batch_samples",
        "_clip_grad_norm",
        "evaluate",
        "log",
        "_save_checkpoint",
        "_load_from_checkpoint",
    }
