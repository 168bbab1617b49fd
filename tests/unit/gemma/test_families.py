from __future__ import annotations

import re

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES, Family, family_of, text_only

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


@ALL
def test_a_row_is_consistent(family: Family) -> None:
    assert FAMILIES[family.name] is family
    named = {family.bos_id, family.eos_id, family.pad_id, family.turn_start_id, family.turn_end_id}
    assert len(named) == 5, "pad must not be eos: the end would never be trained"
    assert named | set(family.stop_ids) | set(family.tokens.values()) <= family.control_ids
    assert family.stop_ids[:2] == (family.eos_id, family.turn_end_id)
    assert family.tokens[family.turn_start] == family.turn_start_id
    assert family.tokens[family.turn_end] == family.turn_end_id
    assert (family.tokens["<bos>"], family.tokens["<eos>"], family.tokens["<pad>"]) == (2, 1, 0)
    assert re.fullmatch("[0-9a-f]{64}", family.template_sha256)
    assert set(family.lora_targets) == {"all-linear", "attention", "mlp"}
    assert "lm_head" in family.skip_quantization
    assert family.attention[0] != "flash_attention_2", "the default must work without that package"


@ALL
def test_text_only_is_the_same_generation_without_towers(family: Family) -> None:
    text = text_only(family)
    assert text.text_model_type is None
    assert text.adapter_prefix == "model.layers"
    assert text.accepts_loss_kwargs
    assert text_only(text) is text
    assert (text is family) == (family.text_model_type is None)
    for fact in ("tokens", "control_ids", "template_sha256", "decoder_layer", "attention", "licence", "lora_targets"):
        assert getattr(text, fact) == getattr(family, fact)


@ALL
def test_every_model_type_finds_its_row(family: Family) -> None:
    for model_type in family.model_types:
        assert family_of({"model_type": model_type}) is family


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "llama"}, "this is no Gemma: its model_type is 'llama'"),
        ({"model_type": "paligemma"}, "PaliGemma"),
        ({"model_type": "t5gemma"}, "encoder-decoder"),
        ({}, "no model_type"),
        ({"model_type": ["gemma"]}, "no model_type"),
    ],
)
def test_other_checkpoints_are_refused_with_place_and_remedy(config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        family_of(config, where="meta/llama")
    (problem,) = caught.value.problems
    assert said in problem.what
    assert problem.where == "meta/llama"
    assert "google/gemma-3-1b-it" in problem.fix


OUTSIDE = (
    "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "model.vision_tower.encoder.layers.3.mlp.gate_proj.linear",
    "model.vision_tower.encoder.layers.3.self_attn.q_proj.linear",
    "model.audio_tower.conformer.0.attention.attn.q_proj",
    "model.audio_tower.layers.0.self_attn.q_proj",
    "model.embed_vision.embedding_projection",
    "model.multi_modal_projector.mm_input_projection",
    "model.language_model.layers.0.router.proj",
    "model.language_model.layers.0.per_layer_input_gate",
    "model.language_model.layers.0.per_layer_projection",
    "model.language_model.per_layer_model_projection",
    "model.language_model.layers.0.altup.modality_router",
    "model.language_model.layers.0.laurel.linear_left",
    "model.language_model.altup_projections.0",
    "model.language_model.layers.0.self_attn",
    "model.language_model.layers.0.self_attn.q_norm",
    "model.layers.0.mlp.gate_proj.lora_A",
    "lm_head",
)


@ALL
def test_lora_targets_are_the_decoders_projections_only(family: Family) -> None:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for prefix in ("model.layers", "model.language_model.layers", "layers"):
        for preset, wanted in {"all-linear": attention + mlp, "attention": attention, "mlp": mlp}.items():
            for name in attention + mlp:
                matched = re.fullmatch(family.lora_targets[preset], f"{prefix}.17.{name}")
                assert (matched is not None) == (name in wanted)
    for pattern in family.lora_targets.values():
        assert [name for name in OUTSIDE if re.fullmatch(pattern, name)] == []


def test_facts_that_cost_people_days() -> None:
    """Spelled out once, so that an edit of the table is noticed."""
    assert FAMILIES["gemma2"].attention[0] == "eager"
    assert "sdpa" not in FAMILIES["gemma2"].attention
    assert FAMILIES["gemma1"].turn_end_id == FAMILIES["gemma2"].turn_end_id == 107
    assert FAMILIES["gemma3"].turn_end_id == FAMILIES["gemma4"].turn_end_id == 106
    assert FAMILIES["gemma4"].stop_ids == (1, 106, 50)
    assert not any("flash_attention_2" in FAMILIES[name].attention for name in FAMILIES if name.startswith("gemma4"))
    assert [name for name in FAMILIES if not FAMILIES[name].accepts_loss_kwargs] == [
        "gemma3n",
        "gemma4",
        "gemma4_unified",
    ]
    assert {name for name in FAMILIES if FAMILIES[name].fp16 == "plain"} == {"gemma1"}
    assert {name for name in FAMILIES if FAMILIES[name].fp16 == "rescaled"} == {"gemma2", "gemma3", "gemma3_text"}
