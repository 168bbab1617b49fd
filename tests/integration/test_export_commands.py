"""`gemma-tune merge` and `gemma-tune export` as whole commands: what they leave behind, and what they refuse."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.cli import main
from tests.export_rig import make_run
from tests.gguf_tiny import close_merges

PAPERS = {"README.md", "NOTICE", "LICENSE.txt"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SURROUNDINGS = PAPERS | TOKENIZER | {"export.json"}


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    make_run(model_for_gguf(tiny("gemma3_text"), tmp_path / "base"), tmp_path / "run", "gemma3_text")
    return tmp_path / "run"


def model_for_gguf(tiny: Path, folder: Path) -> Path:
    """A copy whose tokenizer llama.cpp can follow, as it can the real ones."""
    shutil.copytree(tiny, folder)
    document = close_merges(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str, code: int = 2) -> str:
    """The message of a command that fails with `code`, and leaves neither a result nor half of one."""
    before = names(out.parent) if out.parent.exists() else set()
    assert main([*words, "--out", str(out)]) == code
    assert not out.exists()
    assert (names(out.parent) if out.parent.exists() else set()) == before
    return capsys.readouterr().err


def test_merge_says_what_it_proved_and_how_to_serve_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    out = run / "merged"
    assert "merged into the original base: in fp32 logits differ from base + adapter by at most" in said
    assert f"vllm serve {out}" in said and f"gemma-tune chat {out}" in said
    assert names(out) == SURROUNDINGS | {"model.safetensors", "config.json", "generation_config.json"}
    record = json.loads((out / "export.json").read_text())
    assert record["proof"]["arithmetic"]["largest_logit"] < 1e-3
    assert record["base"]["merged_into"] == "original"
    assert str(run.parent) not in "".join(file.read_text() for file in out.iterdir() if file.suffix in (".json", ".md"))
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {oct(0o666 & ~umask())}
    assert main(["chat", str(out), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["safetensors", "--dtype", "float32"], {"model.safetensors", "config.json", "generation_config.json"}),
        (["gguf", "--quantize", "f32"], {"run-F32.gguf"}),
        (["ollama", "--quantize", "F32"], {"run-F32.gguf", "Modelfile"}),
        (["adapter"], {"adapter_model.safetensors", "adapter_config.json", "generation_config.json"}),
    ],
)
def test_every_format_is_verified_and_has_its_papers(
    words: list[str], files: set[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", *words, "--verify", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 prompts give 48 of 48 tokens of base + adapter" in said
    assert names(tmp_path / "out") == SURROUNDINGS | files
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["verified"][0]["equal"] == [48] * 8
    if "adapter" not in words:
        assert main(["chat", str(tmp_path / "out"), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0


def test_a_lora_gguf_alone(run: Path, tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    words = ["export", str(run), "--format", "lora-gguf", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == PAPERS | {"run-lora.gguf", "export.json"}
    capsys.readouterr()
    smaller = str(tiny("gemma3_text", intermediate_size=64))
    assert main([*words, str(tmp_path / "other"), "--base-path", smaller]) == 2
    assert "in the adapter and" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["gguf", "lora-gguf", "ollama"])
def test_a_gguf_says_by_itself_what_its_licence_wants_to_be_said(format: str, run: Path, tmp_path: Path) -> None:
    """It is handed on without the papers beside it."""
    from gemma_tune.gemma.licences import GEMMA_NOTICE, POLICY, TERMS
    from gemma_tune.models.gguf_files import read_header

    assert main(["export", str(run), "--format", format, "--out", str(tmp_path / "out")]) == 0
    facts = read_header(next((tmp_path / "out").glob("*.gguf"))).facts
    assert facts["general.license"] == "gemma" and TERMS in facts["general.license.link"]
    said = facts["general.description"]
    assert said.startswith(GEMMA_NOTICE) and "modified from base (a local folder) by fine-tuning" in said
    assert POLICY in said and str(tmp_path) not in said
    assert facts["general.base_model.0.name"] == "base (a local folder)"
    if format == "ollama":
        modelfile = (tmp_path / "out" / "Modelfile").read_text()
        assert GEMMA_NOTICE in modelfile and POLICY in modelfile


def test_a_wrong_gguf_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms without the 1 that llama.cpp's files hold: every shape and name is right."""
    from gemma_tune.export.gguf import write

    right = write.encode
    monkeypatch.setattr(write, "encode", lambda *args, **kwargs: right(*args, **(kwargs | {"offset": 0.0})))
    words = ("export", str(run), "--format", "gguf", "--verify")
    for kind in ("f32", "q8_0"):
        said = refused(capsys, tmp_path / "out", *words, "--quantize", kind, code=1)
        assert "does not say what the adapter on its base does" in said and "nothing was written" in said


def test_a_model_without_an_adapter(tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    base = str(model_for_gguf(tiny("gemma3_text"), tmp_path / "base"))
    assert "there is no adapter to merge" in refused(capsys, tmp_path / "out", "merge", base)
    assert (
        main(["export", base, "--format", "gguf", "--quantize", "f32", "--verify", "--out", str(tmp_path / "o")]) == 0
    )
    assert main(["export", base, "--verify", "--out", str(tmp_path / "copy")]) == 0
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in (base, str(tmp_path / "copy")))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- what is refused


def test_an_adapter_of_another_base(run: Path, tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    record = {"model": {"name": str(tmp_path / "base"), "revision": "content-0123456789abcdef01234567"}}
    (run / "run.json").write_text(json.dumps(record))
    said = refused(capsys, tmp_path / "out", "merge", str(run))
    assert "the base has changed since the training" in said
    (run / "run.json").unlink()
    smaller = str(tiny("gemma3_text", intermediate_size=64))
    said = refused(capsys, tmp_path / "out", "merge", str(run), "--base-path", smaller)
    assert "in the adapter and" in said and "in the base" in said
    fewer = str(tiny("gemma3_text", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]))
    said = refused(capsys, tmp_path / "out", "merge", str(run), "--base-path", fewer)
    assert "14 of 28 weights that it changes are not in the base, e.g. layers.2." in said
    said = refused(capsys, tmp_path / "out", "merge", str(run), "--base-path", str(tiny("gemma2")))
    assert "this tokenizer is not Gemma 2's" in said
    shutil.rmtree(tmp_path / "base")
    assert "no existing folder" in refused(capsys, tmp_path / "out", "merge", str(run))


def test_a_base_whose_weights_were_exchanged(run: Path, tmp_path: Path, capsys: Any) -> None:
    from gemma_tune.train.provenance import fingerprint

    record = {"model": {"name": str(tmp_path / "base"), "revision": fingerprint(tmp_path / "base")}}
    (run / "run.json").write_text(json.dumps(record))
    assert main(["merge", str(run), "--dtype", "float32", "--out", str(tmp_path / "good")]) == 0
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    assert "the base has changed" in refused(capsys, tmp_path / "out", "merge", str(run))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def scramble_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, scramble_header, empty])
@pytest.mark.parametrize("which", ["base/model.safetensors", "run/adapter/adapter_model.safetensors"])
def test_damaged_files(damage: Callable[[Path], None], which: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    damage(tmp_path / which)
    said = refused(capsys, tmp_path / "out", "merge", str(run))
    assert which.rpartition("/")[2] in said and "fix:" in said


def test_pickles(run: Path, tmp_path: Path, capsys: Any) -> None:
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin")
    assert "pickle" in refused(capsys, tmp_path / "out", "merge", str(run))
    (run / "adapter" / "adapter_model.bin").rename(run / "adapter" / "adapter_model.safetensors")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    assert "pickle" in refused(capsys, tmp_path / "out", "merge", str(run))


def test_a_planted_wrong_prefix(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = {name.replace("model.layers", "model.decoder.layers"): tensor for name, tensor in tensors.items()}
    save_file(wrong, file, metadata={"format": "pt"})
    for words in (["merge"], ["export", "--format", "adapter"], ["export", "--format", "lora-gguf"]):
        said = refused(capsys, tmp_path / "out", words[0], str(run), *words[1:])
        assert "layers.0" in said, words


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float, run: Path, tmp_path: Path, capsys: Any) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    assert "is not finite" in refused(capsys, tmp_path / "out", "merge", str(run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "not LORA"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"init_lora_weights": "pissa"}, "its base was altered"),
        ({"base_model_name_or_path": None}, "it names no base model"),
        ({"use_dora": True}, "is not complete"),
    ],
)
def test_adapters_of_other_kinds(
    change: dict[str, Any], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert said in refused(capsys, tmp_path / "out", "merge", str(run))


def test_reward_models_and_quantised_bases(run: Path, tmp_path: Path, capsys: Any) -> None:
    (run / "adapter" / "reward_stats.json").write_text("{}")
    assert "this is a reward model" in refused(capsys, tmp_path / "out", "merge", str(run))
    (run / "adapter" / "reward_stats.json").unlink()
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    assert "quantised already" in refused(capsys, tmp_path / "out", "merge", str(run))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "RUN", "--weights", "a,b"], "is no list of numbers"),
        (["merge", "RUN", "--weights", "1,2"], "1 adapters and 2 weights"),
        (["merge", "RUN", "--adapter", "other"], "there is no adapter 'other'"),
        (["merge", "RUN", "--base", "dequantized"], "no 4-bit base is known"),
        (["export", "RUN", "--format", "gguf", "--quantize", "q7"], "unknown type 'q7'"),
        (["export", "RUN", "--format", "onnx"], "onnx"),
        (["merge", "nowhere/at/all"], "no existing folder"),
    ],
)
def test_wrong_words(words: list[str], said: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    filled = [str(run) if word == "RUN" else word for word in words]
    assert said in refused(capsys, tmp_path / "out", *filled)


def test_a_name_that_is_taken(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "it exists already" in capsys.readouterr().err
    assert names(tmp_path / "out") == {"mine.txt"}


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: {k: v for k, v in found.items() if k != FIRST + "A.weight"}, "is not complete"),
        (
            lambda found: {k: v for k, v in found.items() if not k.startswith(FIRST)},
            "do not pair with its adapter_config",
        ),
        (
            lambda found: found | {"base_model.model.model.norm.weight": torch.ones(64)},
            "do not pair with its adapter_c",
        ),
        (lambda found: found | {FIRST + "A.weight": torch.ones(64)}, "is no pair of matrices"),
        (
            lambda found: found | {"base_model.model.model.embed_tokens.token_adapter.x": torch.ones(2)},
            "of a kind that",
        ),
    ],
)
@pytest.mark.parametrize("words", [["merge"], ["export", "--format", "gguf", "--quantize", "f32"]])
def test_tensors_that_its_config_does_not_make(
    words: list[str], change: Any, said: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    change_tensors(run / "adapter" / "adapter_model.safetensors", change)
    assert said in refused(capsys, tmp_path / "out", words[0], str(run), *words[1:])


@pytest.mark.parametrize("changes", [{"r": 7}, {"r": None}, {"layers_to_transform": [0]}])
def test_a_config_of_another_adapter(changes: dict[str, Any], run: Path, tmp_path: Path, capsys: Any) -> None:
    change_json(run / "adapter" / "adapter_config.json", **changes)
    said = refused(capsys, tmp_path / "out", "merge", str(run))
    assert "do not pair" in said or "PEFT cannot put it on its base" in said


def test_a_base_that_is_not_complete(run: Path, tmp_path: Path, capsys: Any) -> None:
    change_tensors(
        tmp_path / "base" / "model.safetensors",
        lambda found: {k: v for k, v in found.items() if k != "model.norm.weight"},
    )
    assert "1 tensors are missing in the weights" in refused(capsys, tmp_path / "out", "merge", str(run))


def test_a_head_that_is_neither_tied_nor_there(run: Path, tmp_path: Path, capsys: Any) -> None:
    change_json(tmp_path / "base" / "config.json", tie_word_embeddings=False)
    said = refused(capsys, tmp_path / "out", "merge", str(run))
    assert "1 tensors are missing in the weights" in said and "lm_head.weight" in said


@pytest.mark.parametrize("place", ["ABSOLUTE", "../elsewhere.safetensors"])
def test_an_index_that_leads_elsewhere(place: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "elsewhere.safetensors"
    (tmp_path / "base" / "model.safetensors").rename(file)
    before = file.read_bytes()
    place = str(file) if place == "ABSOLUTE" else place
    index = {"weight_map": dict.fromkeys(load_file(file), place)}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which lies elsewhere" in refused(capsys, tmp_path / "out", "merge", str(run))
    assert file.read_bytes() == before


def test_two_sets_of_weights(run: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "base" / "model-00001-of-00001.safetensors")
    index = {
        "weight_map": dict.fromkeys(
            load_file(tmp_path / "base" / "model.safetensors"), "model-00001-of-00001.safetensors"
        )
    }
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformers reads the first" in refused(capsys, tmp_path / "out", "merge", str(run))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["safetensors", "--quantize", "q8_0"], "--quantize"),
        (["gguf", "--dtype", "float32"], "--dtype"),
        (["adapter", "--base", "dequantized"], "--base dequantized"),
        (["lora-gguf", "--quantize", "f16"], "--quantize"),
    ],
)
def test_options_that_would_do_nothing(words: list[str], option: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    said = refused(capsys, tmp_path / "out", "export", str(run), "--format", *words)
    assert f"{option}: it does nothing in --format {words[0]}" in said


def test_a_head_that_was_trained_apart_is_in_the_gguf(tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    make_run(
        model_for_gguf(tiny("gemma3_text"), tmp_path / "base"),
        tmp_path / "run",
        "gemma3_text",
        modules_to_save=["lm_head"],
    )
    words = ["export", str(tmp_path / "run"), "--format", "gguf", "--quantize", "f32", "--verify"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "8 of 8 prompts" in capsys.readouterr().out


def test_weights_that_leave_the_numbers(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["merge", str(run), "--weights", "1e38", "--out", str(tmp_path / "out")]) != 0
    assert not (tmp_path / "out").exists()


def test_a_link_to_another_disk_stays_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert main(["merge", str(run), "--dtype", "float32", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()


def test_a_base_of_several_types_is_no_wrong_merge(run: Path, tmp_path: Path, capsys: Any) -> None:
    change_tensors(
        tmp_path / "base" / "model.safetensors",
        lambda found: {k: v if "embed" in k else v.bfloat16() for k, v in found.items()},
    )
    code = main(["merge", str(run), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 0 or "rounding the merged weights to bfloat16, float32" in said.err


# --- full disks, kills


def in_a_process(run: Path, out: Path, prelude: str = "", **limits: Any) -> subprocess.CompletedProcess[str]:
    code = f"{prelude}\nimport sys\nfrom gemma_tune.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "merge", str(run), "--dtype", "float32", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        **limits,
    )


def test_a_full_disk(run: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    before = names(tmp_path)
    done = in_a_process(run, tmp_path / "out", preexec_fn=small_files)
    assert done.returncode == 3, done.stderr
    assert "error:" in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == before


_DIES = """
import os, signal
from gemma_tune.export import make
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests with &
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.{0})
make.write_surroundings = die
"""


def test_a_kill_in_the_middle_leaves_nothing_under_the_final_name(run: Path, tmp_path: Path) -> None:
    done = in_a_process(run, tmp_path / "out", _DIES.format("SIGKILL"))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.staging" / "model.safetensors").exists()
    done = in_a_process(run, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / ".out.staging").exists()


def test_an_interruption_takes_its_leftovers_along(run: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    done = in_a_process(run, tmp_path / "out", _DIES.format("SIGINT"))
    assert done.returncode == 130, done.stderr
    assert names(tmp_path) == before


def test_two_processes_that_want_the_same_name(run: Path, tmp_path: Path, capsys: Any) -> None:
    from gemma_tune.export.staging import staged

    with staged(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 3
        assert "another process" in capsys.readouterr().err
        assert names(folder) == {"x"}
    assert names(tmp_path / "out") == {"x"}


@pytest.mark.slow
def test_a_model_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """2.3 GB in files of 81 MB: merged and proved, the libraries included, in less than a file and 2 GB."""
    from tests.merge_memory import make_adapter, make_large
    from tests.tiny import write_tokenizer

    base = make_large(tmp_path / "base", write_tokenizer("gemma3_text", tmp_path / "tokenizer"))
    make_adapter(base, tmp_path / "run" / "adapter")
    done = subprocess.run(
        [sys.executable, "-m", "tests.merge_memory", str(tmp_path / "run"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["peak"] < found["shard"] + 2 * 10**9 < found["total"]
    for folder in (tmp_path / "base", tmp_path / "out"):
        shutil.rmtree(folder)  # pytest keeps what three runs have left


@pytest.mark.slow
def test_the_real_270m(real_270m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar: logits of a merge into the original differ by less than 1e-3 in fp32, where the largest is above 100."""
    make_run(real_270m, tmp_path / "run", "gemma3_text", spread=0.01)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    print(capsys.readouterr().out)
    proof = json.loads((tmp_path / "merged" / "export.json").read_text())["proof"]
    assert proof["arithmetic"]["largest_logit"] < 1e-3
    assert proof["file"]["mean_kl"] < 0.01 and proof["dtype"] == "bfloat16"
    words = ["--format", "gguf", "--quantize", "f32", "--verify", "--out", str(tmp_path / "gguf")]
    assert main(["export", str(tmp_path / "run"), *words]) == 0
    assert "8 of 8 prompts give 48 of 48 tokens of base + adapter" in capsys.readouterr().out
