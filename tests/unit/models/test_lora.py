"""Adapters: fp32, saved as PEFT does, opened only on the base that they fit."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import TrainingError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach, inspect_adapter, keep_fp32, save_adapter
from gemma_tune.models.saved import load_run
from gemma_tune.models.tokenizer import load_tokenizer

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def adapted(folder: Path, name: str, quantization: dict[str, Any] | None = None, dtype: str = "bfloat16") -> Any:
    family = FAMILIES[name]
    base = load_base({"name": str(folder), "dtype": dtype}, quantization or {}, family)
    return attach(base, {"target_modules": family.lora_targets["all-linear"], "r": 4, "task_type": "CAUSAL_LM"}, family)


def train_a_little(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["bf16", "nf4"])
def test_adapters_are_fp32_and_nothing_else_is_trained(quantization: dict[str, Any], tiny: Callable[..., Path]) -> None:
    model = adapted(tiny("gemma4"), "gemma4", quantization)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    # As TRL does with the adapters of a quantised model.
    for parameter in trained.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert keep_fp32(model) == len(trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert keep_fp32(model) == 0


def test_targets_that_match_nothing(tiny: Callable[..., Path]) -> None:
    base = load_base({"name": str(tiny("gemma1"))}, {}, FAMILIES["gemma1"])
    with pytest.raises(UserError, match="no layer of Gemma 1 matches"):
        attach(base, {"target_modules": r"layers\.\d+\.nothing", "task_type": "CAUSAL_LM"}, FAMILIES["gemma1"])


def test_an_adapter_must_be_whole_and_finite() -> None:
    good = {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.zeros(2, 2)}
    report = inspect_adapter(good)
    assert (report.tensors, report.parameters, report.moved, report.matrices) == (2, 8, 0, 1)
    assert inspect_adapter(good | {"x.lora_B.weight": torch.ones(2, 2)}).moved == 1
    with pytest.raises(TrainingError, match="no tensors"):
        inspect_adapter({})
    with pytest.raises(TrainingError, match="is empty"):
        inspect_adapter(good | {"y.lora_A.weight": torch.ones(0)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(TrainingError, match="not finite"):
            inspect_adapter(good | {"x.lora_A.weight": torch.tensor([1.0, bad])})


def test_nothing_is_written_of_an_adapter_that_is_not_finite(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny("gemma3_text"), "gemma3_text")
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(TrainingError):
        save_adapter(model, tmp_path / "adapter", FAMILIES["gemma3_text"])
    assert not (tmp_path / "adapter").exists()


def saved_run(folder: Path, name: str, run: Path, quantization: dict[str, Any] | None = None) -> Any:
    model = adapted(folder, name, quantization, dtype="float32")
    train_a_little(model)
    tokenizer = load_tokenizer(str(folder), None, FAMILIES[name])
    report = save_adapter(model, run / "adapter", FAMILIES[name], tokenizer)
    assert report.moved == report.matrices > 0
    chosen = {"dtype": {"value": "float32", "reason": "test"}}
    quantized = {key: {"value": value, "reason": "test"} for key, value in (quantization or {}).items()}
    (run / "plan.json").write_text(json.dumps({"model": chosen, "quantization": quantized}))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "quantization"), [("gemma1", {}), ("gemma3", {}), ("gemma4", {}), ("gemma3_text", NF4)]
)
def test_a_saved_run_opens_with_the_same_logits(
    name: str, quantization: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = saved_run(tiny(name), name, tmp_path, quantization)
    row = torch.arange(500, 530)[None]
    with torch.no_grad():
        expected = model(input_ids=row).logits
        for target in (tmp_path, tmp_path / "adapter"):
            opened, tokenizer, family = load_run(target)
            assert family is FAMILIES[name]
            assert tokenizer.chat_template
            assert not opened.training
            assert torch.equal(opened(input_ids=row).logits, expected)
        with opened.disable_adapter():
            assert not torch.equal(opened(input_ids=row).logits, expected)


def test_the_folder_is_plain_peft(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    old = os.umask(0o022)
    try:
        model = saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    finally:
        os.umask(old)
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny("gemma3_text"))
    assert config["revision"] is None
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 106]
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
    notice, card = (folder / "NOTICE").read_text(), (folder / "README.md").read_text()
    assert notice.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    )
    assert f"modified from {tiny('gemma3_text').name} (a local folder) by fine-tuning with gemma-tune on 20" in notice
    assert "ai.google.dev/gemma/prohibited_use_policy" in (folder / "LICENSE.txt").read_text()
    assert "license: gemma" in card
    assert str(tiny("gemma3_text").parent) not in notice + card
    row = torch.arange(500, 530)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny("gemma3_text")), folder).eval()
    with torch.no_grad():
        assert torch.equal(stock(input_ids=row).logits, model(input_ids=row).logits)


def test_gemma_4_is_under_another_licence(tiny: Callable[..., Path], tmp_path: Path) -> None:
    saved_run(tiny("gemma4_text"), "gemma4_text", tmp_path)
    papers = {name: (tmp_path / "adapter" / name).read_text() for name in ("README.md", "NOTICE", "LICENSE.txt")}
    assert "license: apache-2.0" in papers["README.md"]
    assert "apache.org/licenses/LICENSE-2.0" in papers["LICENSE.txt"]
    assert "by fine-tuning with gemma-tune on 20" in papers["NOTICE"]
    assert not any("Gemma Terms" in text for text in papers.values())


def test_an_adapter_for_a_deeper_base_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    shallow = tiny("gemma3_text", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(shallow)}))
    with pytest.raises(UserError, match="do not pair"):
        load_run(tmp_path)


def test_an_adapter_of_the_whole_checkpoint_is_none_of_its_text_model(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    saved_run(tiny("gemma3"), "gemma3", tmp_path)
    with pytest.raises(UserError, match="do not pair") as caught:
        load_run(tmp_path, text_only=True)
    assert caught.value.problems[0].fix == "set model.text_only as in the run that made it"


def test_an_adapter_that_lost_tensors_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors of the adapter"):
        load_run(tmp_path)


def test_an_adapter_that_is_not_finite_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] *= float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not finite") as caught:
        load_run(tmp_path)
    assert str(file) in caught.value.problems[0].where


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("adapter_model.safetensors", lambda data: data[:1000], "damaged"),
        ("adapter_config.json", lambda data: b"", "empty"),
        ("adapter_config.json", lambda data: data[:20], "not valid JSON"),
        ("adapter_config.json", lambda data: b"{}", "names no base"),
    ],
)
def test_a_damaged_run_is_no_bug_of_ours(
    name: str, damage: Callable[[bytes], bytes], said: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    file = tmp_path / "adapter" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        load_run(tmp_path)
    assert name in caught.value.problems[0].where


def test_an_adapter_in_pickle_form_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    saved_run(tiny("gemma3_text"), "gemma3_text", tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="missing"):
        load_run(tmp_path)


def test_a_run_without_result_says_so(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"model": {}, "quantization": {}}))
    with pytest.raises(UserError, match="no adapter and no model yet"):
        load_run(tmp_path)


def test_a_plain_model_opens_too(tiny: Callable[..., Path]) -> None:
    model, _, family = load_run(tiny("gemma2"), dtype="float32")
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert family is FAMILIES["gemma2"]
