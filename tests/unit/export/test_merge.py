"""A merged model is base + adapter, in the base's own class, names and files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.export.make import Order, make
from gemma_tune.export.merge import merged_weights, write_checkpoint, write_surroundings
from gemma_tune.export.proof import check_proof, prove
from gemma_tune.export.subject import Subject, find_subject
from gemma_tune.export.weights import INDEX, CheckpointFiles
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.saved import load_run
from tests.export_rig import CASES, ROW, logits, make_run

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "float32",
}
ROWS = [[2, *range(500, 520)], [2, *range(520, 528)]]


def merge(subject: Subject, folder: Path, **order: Any) -> Any:
    folder.mkdir(parents=True)
    return make(subject, folder, Order("safetensors", **order))


def distance(one: Any, other: Any) -> float:
    """Length of the difference of all logits, as a share of their own length.

    These models are random and wide: a weight that is rounded to fp32 moves single logits of Gemma 4's by 2e-5.
    """
    expected = logits(other)
    return float((logits(one) - expected).norm() / expected.norm())


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "only_text"), [*CASES, ("gemma4_moe", False)])
def test_merged_and_reloaded_is_base_and_adapter(
    name: str, only_text: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny(name)
    subject, trained = make_run(base, tmp_path / "run", name.replace("_moe", ""), only_text=only_text, spread=0.02)
    result = merge(subject, tmp_path / "out")
    opened = reload(tmp_path / "out")
    if name != "gemma4_moe":  # its grouped products know no fp64
        # In fp64 what is left is the merge's: passes in fp32 differ by more among themselves.
        trained, opened = trained.double(), opened.double()
    assert distance(opened, trained) < 1e-5
    with trained.disable_adapter():
        assert distance(opened, trained) > 1e-3
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == len(subject_modules(subject))
    assert not any("tower" in key or "embed" in key for key in changed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
    assert result.proof.arithmetic.largest_logit < result.proof.arithmetic.limit
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(FAMILIES[name.replace("_moe", "")].stop_ids)


def subject_modules(subject: Subject) -> set[str]:
    names = load_file(subject.adapters[0].folder / "adapter_model.safetensors")
    return {name.rpartition(".lora_")[0] for name in names}


def test_a_published_3n_keeps_its_towers_and_names(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("gemma3n")
    subject, trained = make_run(base, tmp_path / "run", "gemma3n", only_text=True)
    merge(subject, tmp_path / "out")
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    opened, _, _ = load_run(tmp_path / "out", dtype="float32", text_only=True)
    assert distance(opened, trained) < 1e-5


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 40}, "rank_pattern": {"layers.1.mlp.up_proj": 2}},
        {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 60, "model.language_model.layers.1.mlp.up_proj": 60}},
        {"use_rslora": True, "rank_pattern": {"mlp.down_proj": 7}, "alpha_pattern": {"k_proj": 3}},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=lambda lora: "-".join(map(str, lora)),
)
@pytest.mark.parametrize("name", ["gemma3_text", "gemma4"])
def test_every_kind_of_update(name: str, lora: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, trained = make_run(tiny(name), tmp_path / "run", name, **lora)
    result = merge(subject, tmp_path / "out")
    opened = reload(tmp_path / "out")
    assert distance(opened, trained) < 1e-5
    assert result.proof.arithmetic.largest_logit < result.proof.arithmetic.limit
    own_head = lora.get("modules_to_save") and not lora.get("ensure_weight_tying")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == bool(own_head)


@pytest.mark.parametrize(
    ("prefix", "head"), [("language_model.model.", "language_model."), ("model.language_model.", "")]
)
def test_both_layouts_of_multimodal_names_are_kept(
    prefix: str, head: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Of before transformers 4.52, as google/gemma-3-4b-it is published, and of after."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny("gemma3").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = {
        re.sub(r"^(?:model\.language_model|language_model\.model)\.", prefix, key): tensor
        for key, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert any(key.startswith(prefix) for key in tensors)
    subject, trained = make_run(base, tmp_path / "run", "gemma3", modules_to_save=["lm_head"])
    merge(subject, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == tensors.keys() | {f"{head}lm_head.weight"}
    opened, _, _ = load_run(tmp_path / "out", dtype="float32")
    assert distance(opened, trained) < 1e-5


@pytest.mark.parametrize(("name", "only_text"), [("gemma3_text", False), ("gemma2", False), ("gemma4", True)])
def test_the_dequantised_base_is_the_one_of_the_training(
    name: str, only_text: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    subject, trained = make_run(tiny(name), tmp_path / "run", name, only_text=only_text, quantization=NF4)
    exact = merge(subject, tmp_path / "dequantized", base="dequantized")
    opened, _, _ = load_run(tmp_path / "dequantized", dtype="float32", text_only=only_text)
    assert distance(opened, trained) < 1e-5
    assert exact.proof.arithmetic.largest_logit < 1e-3
    merge(subject, tmp_path / "original")
    other, _, _ = load_run(tmp_path / "original", dtype="float32", text_only=only_text)
    assert distance(other, trained) > 1e-3


def test_without_a_quantised_run_there_is_no_dequantised_base(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    with pytest.raises(UserError, match="no 4-bit base is known"):
        merge(subject, tmp_path / "out", base="dequantized")


def test_a_weighted_combination(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("gemma3")
    _, first = make_run(base, tmp_path / "a", "gemma3")
    make_run(base, tmp_path / "b", "gemma3", seed=1, r=2, lora_alpha=5)
    subject = find_subject([str(tmp_path / "a"), str(tmp_path / "b")], shares=[0.7, -0.3])
    result = merge(subject, tmp_path / "out")
    first.load_adapter(str(tmp_path / "b" / "adapter"), "b")
    first.base_model.add_weighted_adapter(["default", "b"], [0.7, -0.3], "sum", combination_type="cat")
    first.set_adapter("sum")
    assert distance(reload(tmp_path / "out"), first) < 1e-5
    assert [one["weight"] for one in json.loads((tmp_path / "out" / "export.json").read_text())["adapters"]] == [
        0.7,
        -0.3,
    ]
    assert result.proof.arithmetic.largest_logit < result.proof.arithmetic.limit
    with pytest.raises(UserError, match="2 adapters and 1 weights"):
        find_subject([str(tmp_path / "a"), str(tmp_path / "b")], shares=[1.0])


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_has_no_weighted_sum(lora: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tiny("gemma3_text"), tmp_path / "a", "gemma3_text", **lora)
    make_run(tiny("gemma3_text"), tmp_path / "b", "gemma3_text")
    with pytest.raises(UserError, match="no weighted sum"):
        merge(find_subject([str(tmp_path / "a"), str(tmp_path / "b")]), tmp_path / "out")
    with pytest.raises(UserError, match="no weighted sum"):
        merge(find_subject([str(tmp_path / "a")], shares=[0.5]), tmp_path / "out2")


def test_one_of_several_adapters(tiny: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    _, other = make_run(tiny("gemma3_text"), tmp_path / "other", "gemma3_text", seed=5)
    (tmp_path / "other" / "adapter").rename(tmp_path / "run" / "checkpoint-4")
    merge(find_subject([str(tmp_path / "run")], adapter="checkpoint-4"), tmp_path / "out")
    assert distance(reload(tmp_path / "out"), other) < 1e-5
    with pytest.raises(UserError, match="there is no adapter 'x'") as caught:
        find_subject([str(tmp_path / "run")], adapter="x")
    assert "adapter, checkpoint-4" in str(caught.value)


def test_sixteen_bits_are_rounded_once_and_the_proof_says_what_it_costs(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    exact = merge(subject, tmp_path / "exact")
    try:
        rounded = merge(subject, tmp_path / "rounded", dtype="bfloat16").proof
    except UserError as error:  # tiny models are far from smooth: the limit may be passed
        assert "rounding" in str(error)
        _, weights = merged_weights(subject, "original")
        rounded = prove(subject, "original", weights, CheckpointFiles(tmp_path / "rounded"), ROWS)
    assert exact.proof.file == exact.proof.arithmetic
    assert rounded.arithmetic.largest_logit < 1e-4 < rounded.file.largest_logit
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert all(torch.equal(one[key].bfloat16(), other[key]) for key in one)
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_wrong_merge_is_refused(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.export import updates

    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    right = updates.Adapter.scale
    monkeypatch.setattr(updates.Adapter, "scale", lambda self, core: right(self, core) * 1.01)
    with pytest.raises(GemmaTuneError, match="the merged model is not the adapter"):
        merge(subject, tmp_path / "out")


def test_a_file_that_lost_a_tensor_on_the_way_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    files, weights = merged_weights(subject, "original")
    write_checkpoint(weights, files, tmp_path)
    write_surroundings(subject, weights, tmp_path, None)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = load_file(tiny("gemma3_text") / "model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    proof = prove(subject, "original", weights, CheckpointFiles(tmp_path), ROWS)
    with pytest.raises(GemmaTuneError, match="the merged model is not the adapter"):
        check_proof(proof, "x")


def test_shards_stay_as_the_base_has_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = sharded(tiny("gemma3"), tmp_path / "base")
    subject, trained = make_run(base, tmp_path / "run", "gemma3", modules_to_save=["lm_head"])
    merge(subject, tmp_path / "out")
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "out"))
    extra = after["weight_map"].keys() - before["weight_map"].keys()
    assert extra == {"language_model.lm_head.weight"}
    assert {key: after["weight_map"][key] for key in before["weight_map"]} == before["weight_map"]
    size = sum(
        tensor.numel() * 4 for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert after["metadata"]["total_size"] == size
    assert distance(reload(tmp_path / "out"), trained) < 1e-5


def sharded(folder: Path, new: Path, size: str = "100KB") -> Path:
    """The same model in several files."""
    model = reload(folder)
    model.save_pretrained(new, max_shard_size=size)
    for file in folder.glob("tokenizer*"):
        (new / file.name).write_bytes(file.read_bytes())
    assert (new / INDEX).is_file()
    return new


def test_the_row_that_the_tests_read_is_inside_the_vocabulary() -> None:
    assert int(ROW.max()) < 1024
