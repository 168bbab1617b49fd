"""Several processes do what one does, held whole (DDP) or in parts (FSDP2, HSDP), and go on from each other's runs.

Relative differences are those of every logged loss, and of the saved weights: the norm of their difference over their
norm. (Single elements differ by more, where Adam divides a rounding error by another.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from gemma_tune.train.sharded_checkpoint import PARTS
from tests import parallel_worker
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.test_resume import losses
from tests.integration.tiny_runs import document, lines, write_recipe
from tests.parallel_cases import CASES, RELATIVE, UNEVEN, Case

Tiny = Callable[..., Path]

PLAIN: dict[str, Any] = {
    "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
    "optim": {"learning_rate": 2e-3, "max_steps": 4},
    "batch": {"size": 4, "micro": 1},
    "evaluation": {"every": 4, "max_rows": 4},
    "checkpoint": {"every": 100, "keep": 1},
}
QUIET = {"prompts": [], "held_out": 0}


def start(processes: int, commands: Sequence[dict[str, Any]], folder: Path) -> None:
    """Run `commands` on that many processes, which are started once."""
    file = folder / f"commands-{processes}.json"
    file.write_text(json.dumps(list(commands)), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    process = subprocess.Popen(
        [*launcher, "-m", "tests.parallel_worker", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-6000:]


def recipe_of(case: Case, folder: Path, tiny: Tiny) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    changes = {**PLAIN, **({"samples": QUIET} if case.stage == "sft" else {})}
    for section, values in case.changes.items():
        changes[section] = {**changes.get(section, {}), **values}
    if case.stage == "sft":
        return write_recipe(folder, tiny(case.base), **changes)
    return pair_recipe(folder, tiny(case.base), case.stage, **{**changes, "data": {"holdout": 9}, "samples": QUIET})


def weights(run: Path) -> dict[str, Any]:
    folder = next(run / name for name in ("adapter", "model") if (run / name).is_dir())
    return {
        f"{file.stem} {name}": tensor.double().nan_to_num(nan=torch.nan, posinf=1.0, neginf=-1.0)  # limits of towers
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def check_equal(run: Path, straight: Path, relative: float = RELATIVE) -> None:
    assert losses(run) == pytest.approx(losses(straight), rel=relative)
    norms = [
        [row["grad_norm"] for row in lines(one / "metrics.jsonl") if "grad_norm" in row] for one in (run, straight)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=10 * relative)
    ours, theirs = weights(run), weights(straight)
    assert ours.keys() == theirs.keys() and theirs
    apart = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs) ** 0.5
    assert apart < relative * sum(float((tensor**2).sum()) for tensor in theirs.values()) ** 0.5
    first, second = (document(one / "run.json")["results"] for one in (straight, run))
    assert second["tuned"]["loss"] == pytest.approx(first["tuned"]["loss"], rel=relative)
    for key in {"pairs", "accuracy", "margin"} & first["tuned"].keys():
        assert second["tuned"][key] == pytest.approx(first["tuned"][key], rel=1e-4), key
    for key in ("steps", "tokens_seen", "tokens_trained"):
        assert first[key] == second[key], key


@pytest.fixture(scope="module")
def ran(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case on two processes, in one launch; and its folder."""
    folders, commands = {}, []
    for case in CASES:
        folder = folders[case.name] = tmp_path_factory.mktemp("parallel")
        recipe = str(recipe_of(case, folder, tiny))
        for strategy in case.strategies:
            words = [f"output={folder / strategy}", f"distributed.strategy={strategy}", *case.overrides]
            commands.append({"arguments": [case.stage, recipe, *words]})
    start(2, commands, tmp_path_factory.mktemp("commands"))
    return folders


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_two_processes_do_what_one_does(ran: dict[str, Path], case: Case) -> None:
    folder = ran[case.name]
    assert main([case.stage, str(folder / "recipe.yaml"), f"output={folder / 'one'}", *case.overrides]) == 0
    for strategy in case.strategies:
        check_equal(folder / strategy, folder / "one", case.relative)
        assert document(folder / strategy / "plan.json")["session"]["distributed"]["value"]["strategy"] == strategy


def test_four_processes_do_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    """Whole, in parts, and as two groups of two (HSDP)."""
    recipe = str(recipe_of(Case("four", ""), tmp_path, tiny))
    assert main(["sft", recipe, f"output={tmp_path / 'one'}"]) == 0
    ways = {"ddp": [], "fsdp2": [], "hsdp": ["distributed.replicas=2"]}
    start(
        4,
        [
            {"arguments": ["sft", recipe, f"output={tmp_path / way}", f"distributed.strategy={way}", *words]}
            for way, words in ways.items()
        ],
        tmp_path,
    )
    for way in ways:
        check_equal(tmp_path / way, tmp_path / "one")


# --- another number of processes


def rows_of(output: Path, steps: Iterable[int]) -> Counter[tuple[int, str]]:
    """(step, row) of all processes, as often as it was trained on."""
    wanted = set(steps)
    found: Counter[tuple[int, str]] = Counter()
    for file in output.parent.glob(f"{output.name}-rows.*"):
        for line in file.read_text(encoding="utf-8").splitlines():
            step, row = line.split()
            if int(step) in wanted:
                found[int(step), row] += 1
    return found


def test_a_run_goes_on_with_another_number_of_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Stopped on two by a signal that one of them alone got; resumed on one and on three, whole and in parts.

    51 rows in batches of 12, the last of 3, of which no process may see one twice.
    """
    changes = {**UNEVEN, "batch": {"size": 12, "micro": 2}, "checkpoint": {"every": 2, "keep": 3}}
    recipe = str(recipe_of(Case("resume", "", changes=changes), tmp_path, tiny))
    straight = tmp_path / "straight"
    undo = parallel_worker.watch(str(straight), None)
    assert main(["sft", recipe, f"output={straight}"]) == 0
    undo()
    expected = rows_of(straight, range(1, 6))
    assert len(expected) == sum(expected.values()) == 51 and max(step for step, _ in expected) == 5

    kinds = {
        "ddp": ["distributed.strategy=ddp"],
        "full": ["distributed.strategy=fsdp2"],
        "parts": ["distributed.strategy=fsdp2", "distributed.checkpoint=sharded"],
    }
    stop = [
        {"arguments": ["sft", recipe, f"output={tmp_path / kind}", *words], "stop": [1, 2], "watch": True, "code": 75}
        for kind, words in kinds.items()
    ]
    start(2, stop, tmp_path)
    assert (tmp_path / "parts" / "checkpoint-2" / PARTS).is_dir()
    for kind in kinds:
        record = document(tmp_path / kind / "run.json")
        assert record["status"] == "stopped" and record["segments"][-1]["to_step"] == 2
        assert checkpoint.newest(tmp_path / kind).found is not None

    # The parts of a checkpoint are the adapter of the whole one.
    assert main(["gather", str(tmp_path / "parts" / "checkpoint-2")]) == 0
    whole = load_file(tmp_path / "full" / "checkpoint-2" / "adapter_model.safetensors")
    parts = load_file(tmp_path / "parts" / "gathered-2" / "adapter_model.safetensors")
    config = [tmp_path / place / "adapter_config.json" for place in ("full/checkpoint-2", "parts/gathered-2")]
    assert document(config[0]) == document(config[1])
    assert parts.keys() == whole.keys() and all(parts[name].equal(whole[name]) for name in whole)

    for kind, copy in (("full", "full-alone"), ("parts", "parts-alone"), ("full", "full-other")):
        shutil.copytree(tmp_path / kind, tmp_path / copy)
    go_on = ["--resume", "must"]
    again = [
        {"arguments": ["sft", recipe, f"output={tmp_path / kind}", *words, *go_on], "watch": True}
        for kind, words in kinds.items()
    ]
    again.append(
        {"arguments": ["sft", recipe, f"output={tmp_path / 'full-other'}", *kinds["ddp"], *go_on], "watch": True}
    )
    start(3, again, tmp_path)
    for kind in ("full", "parts"):
        alone = tmp_path / f"{kind}-alone"
        undo = parallel_worker.watch(str(alone), None)
        assert main(["sft", recipe, f"output={alone}", *go_on]) == 0
        undo()
        check_equal(alone, straight)
        assert rows_of(alone, range(3, 6)) + rows_of(tmp_path / kind, (1, 2)) == expected
    for kind in kinds:
        check_equal(tmp_path / kind, straight)
        assert rows_of(tmp_path / kind, range(1, 6)) == expected
    check_equal(tmp_path / "full-other", straight)
