"""`gemma-tune data` on a tiny Gemma's tokenizer; no weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.cli import main
from gemma_tune.commands import data
from gemma_tune.commands.data import builder_of
from gemma_tune.plan.stages import CONFIGS
from gemma_tune.train.checkpoint import seal
from tests.unit.data.toys import chat, write_jsonl


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GEMMA_TUNE_PREPARED", str(tmp_path / "library"))
    data = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q{i}", f"a{i}") for i in range(9)])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny('gemma3_text')}}}\n"
        f"data: {{sources: [{{name: {data}}}], max_length: 128, holdout: 2}}\n"
        f"output: {tmp_path}/run\n"
    )
    return str(path)


def test_it_is_prepared_once_and_again_where_it_is_damaged(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "list"]) == 0
    assert f"0.00 MB in {tmp_path}/library" in capsys.readouterr().out
    assert main(["data", "prepare", recipe, "data.workers=2"]) == 0
    (folder,) = (tmp_path / "library").iterdir()
    out, error = capsys.readouterr()
    assert out.startswith(f"prepared: {folder}\n") and "9 rows read" in out and not error
    assert main(["data", "prepare", recipe]) == 0
    assert capsys.readouterr().out.startswith(f"it is prepared already: {folder}\n")
    (folder / "held_out.jsonl").unlink()
    assert main(["data", "prepare", recipe]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"prepared: {folder}\n") and "held_out.jsonl is missing" in error
    (tmp_path / "library" / "foreign").mkdir()
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert f"sft, 1 rows, {recipe}" in out and "foreign  0.00 MB  of no use: COMPLETE.json is missing" in out
    assert not (tmp_path / "run").exists()


def test_another_folder_is_named_with_how_runs_find_it(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", recipe, "--out", str(tmp_path / "shared disk")]) == 0
    assert f"use it: GEMMA_TUNE_PREPARED='{tmp_path}/shared disk' gemma-tune sft {recipe}" in capsys.readouterr().out
    assert not (tmp_path / "library").exists()


def test_what_cannot_be_prepared_leaves_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", recipe, "data.streaming=true", "optim.max_steps=2"]) == 2
    assert "data.streaming: a stream is read while it is trained on" in capsys.readouterr().err
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": 3}])
    assert main(["data", "prepare", recipe, f"data.sources.0.name={bad}"]) == 2
    assert "bad.jsonl:1" in capsys.readouterr().err
    changing = tmp_path / "mine.py"
    changing.write_text(
        "def rows():\n    open(__file__, 'a').write('#')\n    yield {'text': 'a'}\n    yield {'text': 'b'}\n"
    )
    assert main(["data", "prepare", recipe, f"data.sources.0.name={changing}:rows", "data.holdout=0"]) == 2
    assert "the data changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "library").exists()


def test_folders_that_are_none(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--out", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere: there is no such folder" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, {"step": 3})
    assert main(["data", "list", "--out", str(tmp_path / "run")]) == 2
    assert f"{tmp_path}/run: holds no prepared data" in capsys.readouterr().err
    assert main(["data", "prepare", recipe, "--out", "/proc/x/y"]) == 3
    assert "/proc/x/y: cannot be made" in capsys.readouterr().err
    assert main(["data", "prepare", recipe]) == 0
    (folder,) = (tmp_path / "library").iterdir()
    seal(folder, {"step": 3})
    capsys.readouterr()
    assert main(["data", "list"]) == 0
    assert "of no use: it is no prepared data" in capsys.readouterr().out
    assert main(["data", "prepare", recipe]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"prepared: {folder}\n") and error.count("it is no prepared data") == 1


def test_what_another_process_has_made_meanwhile_stays(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["data", "prepare", recipe]) == 0
    (folder,) = (tmp_path / "library").iterdir()
    before = folder.stat().st_ino
    looks = iter([None])
    real = data._whole
    monkeypatch.setattr(data, "_whole", lambda *given, **say: next(looks, real(*given, **say)))
    assert main(["data", "prepare", recipe]) == 0
    assert folder.stat().st_ino == before and list((tmp_path / "library").iterdir()) == [folder]


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_rows_are_made_by_the_function_of_the_stage(stage: str) -> None:
    from importlib import import_module

    assert builder_of(stage) is import_module(f"gemma_tune.train.{stage}").STAGE.prepare
