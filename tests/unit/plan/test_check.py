"""`gemma-tune check`: what it prints, and that it needs neither torch nor a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.commands import check
from gemma_tune.console import stdout
from gemma_tune.errors import AccessError, UserError
from gemma_tune.plan.machine import MACHINES, Machine
from gemma_tune.plan.report import report, size
from tests.unit.plan.recipes import plan_for

REPOSITORY = Path(__file__).parents[3]
QUICKSTART = str(REPOSITORY / "recipes/quickstart.yaml")
LARGE = ["model.name=google/gemma-3-27b-it", "batch.micro=auto"]

# Runs a command with every connection refused and says which heavy libraries it imported.
ALONE = """
import json, socket, sys
def refuse(*_, **__): raise AssertionError("a connection was opened")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from gemma_tune.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "huggingface_hub", "numpy"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]), file=sys.stderr)
"""


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("machine", [[], ["--machine", "t4"], ["--machine", "8xh100"]])
@pytest.mark.parametrize("model", ["published", "local"])
def test_check_needs_neither_torch_nor_a_network(local, model, machine):
    words = ["check", QUICKSTART, "--json", *machine]
    words += [f"model.name={local}"] if model == "local" else []
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    assert json.loads(done.stdout)["stage"] == "sft"


def test_json_is_the_plan(capsys):
    assert check.run(QUICKSTART, [], "rtx4090", True) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["name"] == "rtx4090"
    assert plan["trainer"]["bf16"] == {"value": False, "reason": plan["trainer"]["fp16"]["reason"]}
    assert sum(term["bytes"] for term in plan["memory"]) > 0


def printed(capsys, plan) -> str:
    for part in report(plan):
        stdout().print(part)
    stdout.cache_clear()
    return capsys.readouterr().out


def test_the_report_shows_every_key_term_and_note(capsys):
    stdout.cache_clear()
    plan = plan_for({"model.name": "google/gemma-3-4b-it", "advanced.trainer": {"neftune_noise_alpha": 5}})
    text = printed(capsys, plan)
    for section in ("model", "quantization", "lora", "trainer", "data", "session"):
        for key in getattr(plan, section):
            assert key in text
    for term in plan.memory:
        assert term.name in text
    for note in plan.notes:
        assert note[:40] in text
    assert "unchecked" in text and "does not fit" not in text


def test_a_report_cannot_drive_the_terminal(capsys):
    stdout.cache_clear()
    text = printed(capsys, plan_for({"samples.prompts": ["red \x1b[31m [bold]text[/bold]"]}))
    assert "\x1b" not in text and "[bold]" in text


def test_another_machine_that_is_too_small_is_a_finding_not_an_error(capsys):
    stdout.cache_clear()
    assert check.run(QUICKSTART, LARGE, "t4", False) == 0
    stdout.cache_clear()
    assert "does not fit" in capsys.readouterr().out


def test_this_machine_that_is_too_small_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(check, "glance", lambda *_: MACHINES["t4"])
    with pytest.raises(AccessError, match="the run needs"):
        check.run(QUICKSTART, LARGE, None, True)


def test_the_world_size_of_the_launcher_counts(monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")

    def glance(environment, world_size, nodes):
        seen.append(world_size)
        return Machine("two", "cuda", 2, 2**35, True, (8, 0), True, world_size)

    monkeypatch.setattr(check, "glance", glance)
    assert check.run(QUICKSTART, ["batch.micro=auto"], None, True) == 0
    assert seen == [2]
    assert json.loads(capsys.readouterr().out)["machine"]["world_size"] == 2


def test_an_unknown_machine():
    with pytest.raises(UserError, match="unknown machine"):
        check.run(QUICKSTART, [], "abacus", False)


@pytest.mark.parametrize(("number", "text"), [(3 * 2**30, "3.00 GiB"), (5 * 2**20, "5 MiB"), (2**30 // 2, "0.50 GiB")])
def test_sizes(number, text):
    assert size(number) == text
