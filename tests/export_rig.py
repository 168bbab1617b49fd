"""Runs on tiny Gemmas whose adapters have moved, for the tests of what leaves the toolkit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gemma_tune.export.subject import Subject, find_subject
from gemma_tune.gemma.families import FAMILIES, text_only
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach, save_adapter
from gemma_tune.models.tokenizer import load_tokenizer

ROW = torch.arange(500, 530)[None]


def make_run(
    base: Path,
    run: Path,
    name: str,
    *,
    only_text: bool = False,
    quantization: dict[str, Any] | None = None,
    seed: int = 0,
    spread: float = 0.1,
    **lora: Any,
) -> tuple[Subject, Any]:
    """A run folder with an adapter that has moved, and the model that it was made from."""
    family = text_only(FAMILIES[name]) if only_text else FAMILIES[name]
    model = load_base({"name": str(base), "dtype": "float32", "text_only": only_text}, quantization or {}, family)
    keywords = {"target_modules": family.lora_targets["all-linear"], "r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)  # PEFT draws A
    adapted = attach(model, keywords | lora, family)
    for key, parameter in adapted.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=spread, generator=torch.Generator().manual_seed(len(key) + seed))
        elif ".modules_to_save." in key:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key) + seed))
            parameter.data += 0.05 * noise
    save_adapter(adapted, run / "adapter", family, load_tokenizer(str(base), None, family))
    chosen = {"dtype": "float32", "text_only": only_text}
    plan = {
        section: {key: {"value": value, "reason": "test"} for key, value in values.items()}
        for section, values in (("model", chosen), ("quantization", quantization or {}))
    }
    (run / "plan.json").write_text(json.dumps(plan))
    return find_subject([str(run)]), adapted.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=ROW).logits
    return made


CASES = [
    ("gemma1", False),
    ("gemma2", False),
    ("gemma3_text", False),
    ("gemma3", False),
    ("gemma3", True),
    ("gemma3n_text", False),
    ("gemma4", False),
    ("gemma4", True),
    ("gemma4_text", False),
    ("gemma4_unified", True),
]
