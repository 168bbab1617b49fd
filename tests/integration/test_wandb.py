"""W&B: offline without a key, never imported by us where it is not asked for, and no secret in its files or ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.cli import main
from gemma_tune.train import tracking
from tests.integration.test_kto_tiny import kto_recipe
from tests.integration.test_ppo_tiny import ppo_recipe
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.tiny_runs import document, write_recipe

QUICK = {"optim": {"max_steps": 2}, "samples": {"held_out": 0, "prompts": []}}
CANARIES = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary",
    "WANDB_API_KEY": "c4a2a27" * 5 + "c4a2a",
    "MY_SECRET": "swordfish-swordfish",
}


def test_an_offline_run_with_project_name_and_figures_and_no_secret(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["gemma-tune", "sft", "--token", CANARIES["HF_TOKEN"]])
    recipe = write_recipe(
        tmp_path, tiny("gemma3_text"), **QUICK, tracking={"wandb": True, "project": "p1", "name": "n1"}
    )
    assert main(["sft", str(recipe)]) == 0
    run = tmp_path / "run"
    [folder] = (run / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    written = file.read_bytes()
    for text in (b"p1", b"n1", b"eval_loss", b"tokens_seen", b"learning_rate"):
        assert text in written
    facts = document(run / "run.json")["wandb"]
    assert facts["mode"] == "offline" and facts["id"]
    printed = "".join(capfd.readouterr())
    for name, value in CANARIES.items():
        assert value not in printed, name
        for path in run.rglob("*"):
            if path.is_file():
                assert value.encode() not in path.read_bytes(), (name, path)


def recipe_of(stage: str, folder: Path, base: Path) -> Path:
    if stage == "sft":
        return write_recipe(folder, base, **QUICK)
    if stage == "kto":
        return kto_recipe(folder, base, optim={"max_steps": 2})
    if stage == "ppo":
        return ppo_recipe(folder, base, optim={"max_steps": 2})
    return pair_recipe(folder, base, stage, optim={"max_steps": 2})


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo"])
def test_without_it_in_the_recipe_wandb_is_not_even_imported(
    tiny: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    recipe = recipe_of(stage, tmp_path, tiny("gemma3_text"))
    code = (
        "import sys\nfrom gemma_tune.cli import main\n"
        f"code = main([{stage!r}, {str(recipe)!r}])\n"
        "sys.exit(code or 77 * ('wandb' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "wandb").exists()


def test_without_it_in_the_recipe_wandb_is_never_started(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("wandb was started")

    monkeypatch.setattr("wandb.init", refuse)
    monkeypatch.setattr("wandb.login", refuse)
    assert main(["sft", str(write_recipe(tmp_path, tiny("gemma3_text"), **QUICK))]) == 0
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_tracker_that_fails_does_not_cost_the_training(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def fail(**settings: object) -> None:
        asked.append(str(settings["mode"]))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    recipe = write_recipe(tmp_path, tiny("gemma3_text"), **QUICK, tracking={"wandb": True})
    assert main(["sft", str(recipe)]) == 0
    assert asked == ["online", "offline"]
    assert "W&B is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "", "online"),
        ({}, "machine api.wandb.ai login user password kkkk\n", "online"),
        ({}, "machine example.org login user password kkkk\n", "offline"),
        ({}, "this is no netrc", "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "online"}, "", "offline"),
    ],
)
def test_online_only_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], netrc: str, mode: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.mode_of_run() == mode
