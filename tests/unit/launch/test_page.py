"""docs/clusters.md: every command in it exists, and what it says of files, variables and times is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import gemma_tune
from gemma_tune import cli
from gemma_tune.launch import nodes, start
from gemma_tune.plan.accelerate_files import shipped_files
from gemma_tune.recipe.shipped import shipped_folder

ROOT = Path(gemma_tune.__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line.strip() for line in BLOCKS.splitlines() if line.strip()]
RECIPE = str(shipped_folder("recipes") / "quickstart.yaml")


def words_of(line: str) -> list[str]:
    return [RECIPE if word == "RECIPE" else word for word in shlex.split(line, comments=True)]


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) > 10
    assert {line.split()[0] for line in COMMANDS} == {"gemma-tune", "accelerate", "torchrun"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("gemma-tune")])
def test_our_commands_parse_and_job_files_are_written(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(line)[1:]
    command = typer.main.get_command(cli.app)
    job = command.main(args=words, prog_name="gemma-tune", standalone_mode=False)
    assert callable(job), "typer only parses: what is to be done comes back"
    if words[0] == "launch":
        assert job() == 0 and "gemma-tune launch" in capsys.readouterr().out


def test_a_wrong_option_would_be_seen() -> None:
    command = typer.main.get_command(cli.app)
    with pytest.raises(cli.UserError):
        command.main(args=["sft", RECIPE, "--num-proceses", "2"], prog_name="gemma-tune", standalone_mode=False)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("gemma-tune")])
def test_commands_of_others_parse(line: str) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    program, *words = words_of(line)
    parser = launch_command_parser() if program == "accelerate" else get_args_parser()
    arguments = parser.parse_args(words[1:] if program == "accelerate" else words)
    assert arguments.training_script == "gemma_tune"
    assert typer.main.get_command(cli.app).main(
        args=arguments.training_script_args, prog_name="gemma-tune", standalone_mode=False
    )
    if program == "accelerate":
        assert (ROOT / arguments.config_file).is_file()


def test_the_table_has_every_accelerate_file() -> None:
    table = PAGE.partition("| name | when |\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(shipped_files())


def test_the_variables_are_those_that_are_read() -> None:
    table = PAGE.partition("| scheduler | variables |\n")[2].partition("\n\n")[0]
    source = Path(nodes.__file__).read_text("utf-8")
    named = re.findall(r"`([A-Z_]+)`", table)
    assert len(named) > 12
    for name in named:
        assert f'"{name}"' in source, name


def test_times_are_the_codes() -> None:
    assert f"SIGKILL after {start.PATIENCE} seconds" in PAGE
    warning = re.search(r"--signal=B:USR1@(\d+)", PAGE)
    assert warning and int(warning[1]) > start.PATIENCE, "SLURM's warning must leave time for the checkpoint"
    template = (Path(start.__file__).parent / "templates" / "slurm.sh").read_text("utf-8")
    assert f"--signal=B:USR1@{warning[1]}\n" in template
    pods = (Path(start.__file__).parent / "templates" / "kubeflow.yaml").read_text("utf-8")
    grace = re.search(r"terminationGracePeriodSeconds: (\d+)", pods)
    assert grace and int(grace[1]) > start.PATIENCE
