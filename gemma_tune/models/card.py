"""The papers that a run's own result carries: notice, licence pointer, and a card with how to load it.

Small, because the run knows little while it saves: `export.papers` writes the full card when the model leaves.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from gemma_tune.gemma import licences
from gemma_tune.gemma.families import Family

CARD = "README.md"


def write_card(folder: Path, base: str, family: Family, *, adapter: bool) -> None:
    """Write NOTICE, LICENSE.txt and README.md beside saved weights.

    Args:
        folder: of the adapter, or of the whole model after a full fine-tune.
        base: what was trained, as the user named it. A path is shown by its last name only.
        family: of the base.
        adapter: the folder holds a LoRA adapter, not a whole model.
    """
    today = datetime.now(UTC).date().isoformat()
    shown = licences.shown_base(base)
    papers = licences.make_papers(family.licence, f"modified from {shown} by fine-tuning with gemma-tune on {today}")
    text = make_adapter_card(base, family) if adapter else make_model_card(base, family)
    for name, content in (papers | {CARD: text}).items():
        (folder / name).write_text(content, encoding="utf-8")


def make_adapter_card(base: str, family: Family) -> str:
    """README.md of an adapter."""
    front = ["library_name: peft", "pipeline_tag: text-generation", f"license: {family.licence}"]
    hub = licences.hub_id(base)
    if hub is not None:
        front += [f"base_model: {hub}", "base_model_relation: adapter", f"tags:\n- base_model:adapter:{hub}\n- lora"]
    loaded = hub or f"path/to/{licences.last_name(base)}"
    body = f"""
# LoRA adapter for {licences.shown_base(base)}

Made with gemma-tune. {family.label}; this is a modified version: the base with the low-rank updates of this folder.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{loaded}"), "this-folder")
```
"""
    return _card(front, body, family)


def make_model_card(base: str, family: Family) -> str:
    """README.md of a model all of whose weights were trained."""
    front = ["library_name: transformers", "pipeline_tag: text-generation", f"license: {family.licence}"]
    hub = licences.hub_id(base)
    if hub is not None:
        front += [f"base_model: {hub}", "base_model_relation: finetune"]
    body = f"""
# {licences.shown_base(base)}, fine-tuned

Made with gemma-tune. {family.label}; this is a modified version: all weights of the base were trained.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this-folder")
```
"""
    return _card(front, body, family)


def _card(front: list[str], body: str, family: Family) -> str:
    stops = f"\nGeneration must stop at the ids {list(family.stop_ids)} (generation_config.json).\n"
    return "\n".join(["---", *front, "---"]) + "\n" + body + stops + f"\n{licences.card_words(family.licence)}\n"
