"""The tables of docs/generations.md, made of `gemma.families` and `gemma.published`.

python -m tests.generations     writes them into the page
"""

from __future__ import annotations

from gemma_tune.gemma.families import FAMILIES, Family
from gemma_tune.gemma.sizes import PUBLISHED
from tests.pages import ROOT, filled, markdown_table

PAGE = ROOT / "docs" / "generations.md"
SHOWN = ("gemma1", "gemma2", "gemma3_text", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "vaultgemma")
"""A row each: as they are published, not the text-only classes of the multimodal ones."""

COMMAND = "python -m tests.generations"


def tables() -> dict[str, str]:
    """Name -> Markdown."""
    shown = [FAMILIES[name] for name in SHOWN]
    return {"checkpoints": _checkpoints(shown), "conversation": _conversation(shown), "model": _model(shown)}


def _checkpoints(families: list[Family]) -> str:
    rows = []
    for family in families:
        names = [name for name, shape in PUBLISHED.items() if shape.family == family.name and "/" in name]
        mine = " ".join(f"`{name.removeprefix('google/')}`" for name in names) or "any with its `model_type`"
        served = f"`{family.gguf.arch}`" if family.gguf else "no"
        rows.append([family.label, _codes(family.model_types), mine, family.licence, served])
    return markdown_table(
        ["generation", "`model_type`", "checkpoints known by name (google/)", "licence", "GGUF"], rows
    )


def _conversation(families: list[Family]) -> str:
    rows = []
    for family in families:
        system = "a turn" if family.system_role == "turn" else "into the first user turn"
        if not family.template_accepts_system:
            system += "; the template itself raises"
        rows.append(
            [
                family.label,
                f"`{family.turn_start}` {family.turn_start_id}",
                f"`{family.turn_end}` {family.turn_end_id}",
                ", ".join(map(str, family.stop_ids)),
                system,
                "must alternate" if family.roles_alternate else "free",
                "yes" if family.thinking and family.tools else "no",
            ]
        )
    head = ["generation", "turn start, id", "turn end, id", "stops at", "system message", "roles", "thinking, tools"]
    return markdown_table(head, rows)


def _model(families: list[Family]) -> str:
    rows = []
    for family in families:
        caps = [
            f"{what} {cap:g}"
            for what, cap in (("scores", family.attention_softcap), ("logits", family.final_softcap))
            if cap is not None
        ]
        rows.append(
            [
                family.label,
                f"`{family.adapter_prefix}`",
                f"`{family.decoder_layer}`",
                _codes(family.attention),
                family.fp16,
                ", ".join(caps) or "no",
                "in some sizes" if family.kv_shared else "no",
                _codes(tuple(name.replace(r".*\.", "").removeprefix(".*") for name in family.skip_quantization)),
            ]
        )
    head = [
        "generation",
        "adapter keys below",
        "layer for FSDP",
        "attention",
        "fp16",
        "soft caps",
        "shared keys and values",
        "never quantised",
    ]
    return markdown_table(head, rows)


def _codes(names: tuple[str, ...]) -> str:
    return " ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8"), tables(), COMMAND), "utf-8")
