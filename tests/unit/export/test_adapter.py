"""Adapters for servers: the names of the class that they load, and nothing that they refuse or leave out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import UserError
from gemma_tune.export.adapter import check_adapter_names, check_served, class_weights, server_adapter
from gemma_tune.export.subject import find_subject
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma.families import FAMILIES
from tests.export_rig import CASES, logits, make_run
from tests.meta_models import SHAPES, TOWERS, multimodal_model, text_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def opened_by_peft(base: Path, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize(("name", "only_text"), CASES)
def test_the_class_that_servers_load_answers_as_the_run_did(
    name: str, only_text: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny(name)
    subject, trained = make_run(base, tmp_path / "run", name, only_text=only_text)
    check = server_adapter(subject, tmp_path / "out")
    served = opened_by_peft(base, tmp_path / "out")
    expected = logits(trained)
    assert (logits(served) - expected).abs().max() < 1e-5
    with served.disable_adapter():
        assert (logits(served) - expected).abs().max() > 1e-2
    assert check.renamed == (len(check.modules) if only_text else 0)
    assert all(module.startswith(FAMILIES[name].adapter_prefix + ".") for module in check.modules)
    assert (check.rank, check.max_lora_rank) == (4, 8)


def test_gemma_3n_gets_the_names_of_the_class_with_towers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """That class needs timm, so the names are all that is seen here."""
    subject, _ = make_run(tiny("gemma3n"), tmp_path / "run", "gemma3n", only_text=True)
    check = server_adapter(subject, tmp_path / "out")
    assert check.renamed == len(check.modules) > 0
    assert all(name.startswith("model.language_model.layers.") for name in check.modules)


def test_the_config_is_one_that_peft_vllm_and_sglang_read(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("gemma3")
    subject, _ = make_run(base, tmp_path / "run", "gemma3", only_text=True)
    check = server_adapter(subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == list(check.modules)
    assert config["base_model_name_or_path"] == str(base)
    assert config["layers_to_transform"] is config["exclude_modules"] is None
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert names == {f"base_model.model.{one}.lora_{half}.weight" for one in check.modules for half in "AB"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()


def test_rslora_is_served_as_the_lora_that_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("gemma3_text")
    subject, trained = make_run(base, tmp_path / "run", "gemma3_text", use_rslora=True)
    server_adapter(subject, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 24.0)
    assert (logits(opened_by_peft(base, tmp_path / "out")) - logits(trained)).abs().max() < 1e-5


def test_an_adapter_without_tokenizer_and_stops_gets_the_base_s(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("gemma3_text")
    subject, _ = make_run(base, tmp_path / "run", "gemma3_text")
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / "run" / "adapter" / name).unlink()
    server_adapter(subject, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 106]


# --- the check


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "only_text", "wrong", "right"),
    [
        ("gemma3", True, "", ""),  # what a run with text_only leaves
        ("gemma4", True, "", ""),
        ("gemma3", False, "model.language_model.layers", "language_model.model.layers"),  # before transformers 4.52
        ("gemma3_text", False, "model.layers", "model.language_model.layers"),
        ("gemma1", False, "model.layers", "layers"),
    ],
)
def test_a_wrong_prefix_is_caught(
    name: str, only_text: bool, wrong: str, right: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    subject, _ = make_run(tiny(name), tmp_path / "run", name, only_text=only_text)
    adapter = subject.adapters[0].folder
    if wrong:
        rename(adapter, lambda key: key.replace(f"base_model.model.{wrong}", f"base_model.model.{right}"))
    with pytest.raises(UserError, match=r"none of its \d+ modules") as caught:
        check_adapter_names(adapter, CheckpointFiles(tiny(name)), FAMILIES[name])
    problem = caught.value.problems[0]
    assert "answer as the base does" in problem.what
    assert f"its name there is {FAMILIES[name].adapter_prefix}.0." in problem.fix


def test_a_part_that_does_not_match_is_caught(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    adapter, weights = subject.adapters[0].folder, CheckpointFiles(tiny("gemma3_text"))
    assert check_adapter_names(adapter, weights, FAMILIES["gemma3_text"]).renamed == 0
    rename(adapter, lambda key: key.replace("layers.3.", "layers.33."))
    with pytest.raises(UserError, match=r"7 of its 28 modules .*model\.layers\.33\.mlp\.down_proj") as caught:
        check_adapter_names(adapter, weights, FAMILIES["gemma3_text"])
    assert caught.value.problems[0].fix == "use the base that it was trained on"


def test_matrices_of_another_base_are_caught(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    other = tiny("gemma3_text", intermediate_size=96)
    with pytest.raises(UserError, match=r"mlp\.\w+ is \[.* and \d+ more do not fit"):
        check_adapter_names(subject.adapters[0].folder, CheckpointFiles(other), FAMILIES["gemma3_text"])


def test_half_an_update_is_caught(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    file = subject.adapters[0].folder / WEIGHTS
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if ".lora_B." in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not complete"):
        check_adapter_names(file.parent, CheckpointFiles(tiny("gemma3_text")), FAMILIES["gemma3_text"])


def test_a_tensor_that_is_no_lora_is_caught(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text")
    file = subject.adapters[0].folder / WEIGHTS
    head = {"base_model.model.lm_head.weight": torch.zeros(4, 4)}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight is no matrix of a LoRA"):
        check_adapter_names(file.parent, CheckpointFiles(tiny("gemma3_text")), FAMILIES["gemma3_text"])


def test_a_rank_that_vllm_does_not_take(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text", r=513)
    with pytest.raises(UserError, match="its rank is 513, and vLLM takes 512"):
        server_adapter(subject, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embedding"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "parameters beside layers"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks differ"),
        ({"alpha_pattern": {"q_proj": 8}}, "scales differ"),
    ],
)
def test_what_servers_refuse_or_serve_as_another(config: dict[str, Any], said: str) -> None:
    check_served({"bias": "none", "rank_pattern": {}, "modules_to_save": None, "use_rslora": True}, "here")
    with pytest.raises(UserError, match=said) as caught:
        check_served({"r": 4} | config, "here")
    assert "gemma-tune merge" in caught.value.problems[0].fix


def test_dora_is_refused_before_anything_is_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    subject, _ = make_run(tiny("gemma3_text"), tmp_path / "run", "gemma3_text", use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        server_adapter(subject, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_servers_take_one_adapter(tiny: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tiny("gemma3_text"), tmp_path / "one", "gemma3_text")
    make_run(tiny("gemma3_text"), tmp_path / "two", "gemma3_text")
    both = find_subject([str(tmp_path / "one"), str(tmp_path / "two")])
    scaled = find_subject([str(tmp_path / "one")], shares=[0.5])
    none = find_subject([str(tiny("gemma3_text"))])
    for subject, said in ((both, "take one adapter"), (scaled, "take one adapter"), (none, "no adapter")):
        with pytest.raises(UserError, match=said):
            server_adapter(subject, tmp_path / "out")


# --- the names are those of transformers' classes, for every published shape


class Published:
    """The weights of a model on the meta device, under the names that `rename` gives them."""

    def __init__(self, model: Any, rename: Callable[[str], str] = lambda name: name) -> None:
        self._shapes = {rename(name): tuple(tensor.shape) for name, tensor in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def before_4_52(name: str) -> str:
    """Names in the files that were published before transformers 4.52."""
    return name.replace("model.language_model.", "language_model.model.", 1)


@pytest.mark.parametrize("name", SHAPES)
def test_every_name_is_a_linear_module_of_the_class(name: str) -> None:
    family = FAMILIES[SHAPES[name].family]
    if name in TOWERS:
        model = multimodal_model(name)
    elif family.text_model_type is None:
        model = text_model(name)
    else:
        pytest.skip("the class with towers of Gemma 3n needs the package timm")
    real = {
        key: tuple(module.weight.shape)
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    for rename_ in (str, before_4_52):
        found = class_weights(Published(model, rename_), family)  # type: ignore[arg-type]
        layers = {key: shape for key, shape in found.items() if ".layers." in key}
        assert layers
        assert {key: real.get(key) for key in layers} == layers
        assert real["lm_head"] == found["lm_head"]
