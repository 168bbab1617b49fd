"""Every command, recipe and link in README and docs/: commands parse, recipes are planned, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from itertools import combinations
from pathlib import Path

import pytest
import typer

from gemma_tune import cli
from gemma_tune.errors import UserError
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.machine import MACHINES
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.reference import recipe_reference
from gemma_tune.plan.stages import CONFIGS
from gemma_tune.recipe.reader import read_recipe, read_recipe_text, recipe_schema
from gemma_tune.recipe.schema import Recipe
from gemma_tune.recipe.shipped import shipped_folder, shipped_recipes
from tests import card_table
from tests.pages import PAGES, ROOT, anchors, blocks, command_lines, filled, prose, spans, written_out
from tests.unit.plan.test_recipes_on_machines import rewards, start

RECIPES = {recipe.path.name: recipe.path for recipe in shipped_recipes()}
PROGRAMS = ("gemma-tune ", ".venv/bin/gemma-tune ", ".venv-tpu/bin/gemma-tune ")
OURS = [
    (page, command)
    for page, text in PAGES.items()
    for line in command_lines(text)
    if line.startswith(PROGRAMS)
    for command in written_out(line)
]
NAMED = [(page, span) for page, text in PAGES.items() for span in spans(text) if re.match(r"gemma-tune [a-z]", span)]
_LEAST = (
    "stage: {stage}\nmodel: {{name: google/gemma-3-1b-it}}\ndata: {{sources: [{{name: {data}}}]}}\noutput: runs/x\n"
)
_SETS = {"sft": "ultrachat", "reward": "hh_rlhf", "dpo": "hh_rlhf", "kto": "kto_mix", "ppo": "ultrafeedback"}
WHOLE = {stage: _LEAST.format(stage=stage, data=data) for stage, data in _SETS.items()}
WHOLE["ppo"] += "ppo: {reward: runs/reward}\n"
"""The least recipe of each stage, for the keys that a block leaves out."""


def parsed(line: str) -> object:
    words = shlex.split(line.partition("gemma-tune ")[2])
    words = [str(shipped_folder("recipes") / "quickstart.yaml") if word == "RECIPE" else word for word in words]
    return typer.main.get_command(cli.app).main(args=words, prog_name="gemma-tune", standalone_mode=False)


def planned(recipe: Recipe, machine: str) -> None:
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    assert make_plan(recipe, MACHINES[machine], shape, family, start=start(recipe), rewards=rewards(recipe)).notes


def sections(text: str) -> dict[str, str]:
    """Top-level key -> its lines."""
    parts = re.split(r"(?m)^(?=\w+:)", re.sub(r"(?m)^#.*\n", "", text))
    return {part.partition(":")[0]: part for part in parts if part.strip()}


def test_there_are_pages_with_commands() -> None:
    assert {"README.md", "docs/recipes.md", "docs/generations.md", "docs/faq.md", "docs/comparison.md"} <= set(PAGES)
    assert len(OURS) > 50 and len(NAMED) > 30


@pytest.mark.parametrize(("page", "line"), OURS)
def test_our_commands_parse(page: str, line: str) -> None:
    assert callable(parsed(line)), "typer only parses: what is to be done comes back"


@pytest.mark.parametrize(("page", "line"), OURS)
def test_a_command_that_names_a_recipe_of_ours_can_be_planned(page: str, line: str) -> None:
    command, *words = shlex.split(line.partition("gemma-tune ")[2])
    files = [word for word in words if Path(word).name in RECIPES]
    if command == "recipes" or not files:
        return
    changes = [
        word for word in words if word.partition(".")[0].partition("=")[0] in Recipe.model_fields and "=" in word
    ]
    recipe = read_recipe(RECIPES[Path(files[0]).name], changes)
    assert command not in CONFIGS or recipe.stage == command
    machine = words[words.index("--machine") + 1] if "--machine" in words else "cpu"
    planned(recipe, machine if machine in MACHINES else "cpu")


@pytest.mark.parametrize(("page", "span"), NAMED)
def test_a_command_in_a_sentence_exists(page: str, span: str) -> None:
    for line in written_out(span):
        try:
            parsed(line)
        except Exception as error:  # of click, or of the copy that typer brings
            message = getattr(error, "format_message", lambda error=error: str(error))()
            assert "Missing" in message or "no recipe is named" in message, message


@pytest.mark.parametrize("text", ["gemma-tune sft x.yaml --resum auto", "gemma-tune evaluate x", "gemma-tune chat a b"])
def test_a_wrong_command_would_be_seen(text: str) -> None:
    with pytest.raises(Exception, match=r"no such option|No such command|unexpected extra"):
        parsed(text)


ELSEWHERE = {"vllm", "python", "llama-server", "ollama", "transformers", "pip"}
"""Programs of others that no test here can start: servers, and what installs us."""


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_others(page: str) -> None:
    """Launchers are parsed as they parse themselves; what they start is a command of ours."""
    for line in command_lines(PAGES[page]):
        program, *words = shlex.split(line)
        if line.startswith(PROGRAMS) or program == "make":
            continue
        if program in ("accelerate", "torchrun"):
            from accelerate.commands.launch import launch_command_parser
            from torch.distributed.run import get_args_parser

            parser = launch_command_parser() if program == "accelerate" else get_args_parser()
            asked = parser.parse_args(words[1:] if program == "accelerate" else words)
            assert asked.training_script == "gemma_tune"
            assert parsed(shlex.join(["gemma-tune", *asked.training_script_args]))
        else:
            assert program in ELSEWHERE, line


@pytest.mark.parametrize("page", PAGES)
def test_python_can_be_read(page: str) -> None:
    for text in blocks(PAGES[page], "python"):
        compile(text, page, "exec")


@pytest.mark.parametrize(
    ("page", "text"), [(page, block) for page, text in PAGES.items() for block in blocks(text, "yaml")]
)
def test_recipes_in_pages_are_planned(page: str, text: str) -> None:
    own = sections(text)
    assert own and set(own) <= set(recipe_schema()["properties"])
    said = re.match(r"stage: (\w+)", own.get("stage", ""))
    stage = said[1] if said else next((name for name in WHOLE if name in own), "sft")
    whole = "".join((sections(WHOLE[stage]) | own).values())
    planned(read_recipe_text(whole), "rtx4090")


def test_a_wrong_recipe_would_be_seen() -> None:
    with pytest.raises(UserError, match="learning_rte"):
        read_recipe_text(WHOLE["sft"] + "optim: {learning_rte: 1}\n")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8")))
    for page, text in PAGES.items():
        named = [*command_lines(text), *spans(text)]
        asked = {match[1] for line in named if (match := re.match(r"make ([a-z-]+)", line))}
        assert asked <= targets, (page, asked - targets)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page.startswith("docs/") and f"]({page}" not in PAGES["README.md"]} == set()


def test_no_page_repeats_another() -> None:
    """A sentence of some length stands in one place; the others link to it."""

    def sentences(text: str) -> set[str]:
        plain = " ".join(prose(text).split())
        return {sentence for sentence in re.split(r"(?<=[.:;]) ", plain) if len(sentence) > 90 and "|" not in sentence}

    for one, other in combinations(PAGES, 2):
        assert sentences(PAGES[one]) & sentences(PAGES[other]) == set(), (one, other)


def test_the_recipe_reference_is_of_this_schema() -> None:
    assert PAGES["docs/recipes.md"] == recipe_reference(), "gemma-tune recipes reference > docs/recipes.md"


def test_the_table_of_the_suite_is_of_the_code() -> None:
    page = PAGES["docs/evaluation.md"]
    assert filled(page, card_table.tables(), card_table.COMMAND) == page, card_table.COMMAND


def test_the_quick_start_showed_what_its_recipe_says() -> None:
    header = " ".join(RECIPES["quickstart.yaml"].read_text("utf-8").partition("stage:")[0].replace("#", "").split())
    for figure in ("4.681", "2.829", "41,416 tokens", "145 s", "4.2 GiB"):
        assert figure in header and figure in PAGES["README.md"]


def test_every_key_has_a_meaning() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| .* \| ([^|]*) \|$", PAGES["docs/recipes.md"])
    assert len(rows) > 100
    assert [key for key, meaning in rows if len(meaning) < 10] == []
