"""Overrides on the command line: forms, values, list items, and what is refused."""

# ruff: noqa: E501 (tables of messages)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.errors import UserError
from gemma_tune.recipe.overrides import parse_overrides
from gemma_tune.recipe.reader import read_recipe_text
from gemma_tune.recipe.schema import Recipe

BASE = """\
model: {name: google/gemma-3-1b-it, quantization: none}
adapter: null
data:
  sources:
    - name: one
    - name: two
output: runs/x
"""


def read(*overrides: str) -> Recipe:
    return read_recipe_text(BASE, "r.yaml", list(overrides))


def findings(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.learning_rate=1e-5"],
        ["--optim.learning_rate", "1e-5"],
        ["--optim.learning_rate=1e-5"],
        ["--optim.learning-rate", "1e-5"],
        ["optim={learning_rate: 1e-5}"],
        ["optim.learning_rate=3", "--optim.learning_rate", "1e-5"],
        ["optim.learning_rate=abc", "optim.learning_rate=1e-5"],
    ],
)
def test_forms(arguments: list[str]) -> None:
    assert read(*arguments).optim.learning_rate == 1e-5


def test_top_level_keys() -> None:
    recipe = read("seed=7", "--output", "runs/y")
    assert (recipe.seed, recipe.output) == (7, "runs/y")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optim.max_steps=10", 10),
        ("optim.max_steps=null", None),
        ("optim.max_steps=", None),
        ("optim.warmup_ratio=0", 0.0),
        ("optim.epochs=3", 3.0),
        ("data.packing=false", False),
        ("batch.micro=auto", "auto"),
        ("data.train_on=all", "all"),
        ("samples.prompts=[a, 'b c']", ("a", "b c")),
    ],
)
def test_values_are_yaml(argument: str, value: object) -> None:
    section, key = argument.partition("=")[0].split(".")
    found = getattr(getattr(read(argument), section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["a b: c", "[x", "run #3", "010", "1e-4", "no", "@home", "a: b: c", " padded ", "{", "*x", "!t", "100%", "~x"],
)
def test_text_needs_no_yaml_quoting(text: str) -> None:
    assert read(f"tracking.name={text}").tracking.name == text


def test_quotes_of_yaml_are_taken_off() -> None:
    assert read('tracking.name="a\\tb"').tracking.name == "a\tb"
    assert read("tracking.name='null'").tracking.name == "null"
    assert read("tracking.name=null").tracking.name is None


def test_list_items_by_number() -> None:
    assert [source.name for source in read("data.sources.1.name=three").data.sources] == ["one", "three"]
    assert [source.name for source in read("data.sources.2.name=three").data.sources] == ["one", "two", "three"]
    assert [source.name for source in read("data.sources.0={name: x, weight: 2}").data.sources] == ["x", "two"]
    assert read("data.sources.0.columns.text=quote").data.sources[0].columns == {"text": "quote"}
    assert read("samples.prompts.0=Who are you?").samples.prompts == ("Who are you?",)


def test_a_null_section_is_replaced_when_a_key_of_it_is_given() -> None:
    adapter = read("adapter.r=4").adapter
    assert adapter is not None and adapter.r == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.lerning_rate=1"], "command line: optim.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        (["learning_rate=1"], "command line: learning_rate: unknown key here; it belongs under optim"),
        (["optim.learning_rate=x"], "command line: optim.learning_rate: needs a number above 0 and at most 1, got the text 'x'"),
        (["--optim.learning_rate", "-1"], "needs a number above 0 and at most 1, got -1"),
        (["optim.epochs=[x"], "command line: optim.epochs: the [ that opens here is not closed"),
        (["optim.epochs=&a 1"], "command line: optim.epochs: anchor &a is not supported"),
        (["optim={epochs: 1, epochs: 2}"], "command line: optim: epochs: this key already stands"),
        (["samples.prompts=[*a]"], "alias *a is not supported"),
        (["seed="], "command line: seed: needs a whole number"),
        (["data.sources.5.name=x"], "command line: data.sources.5.name: there is no item '5' in a list of 2"),
        (["data.sources.5=x"], "there is no item '5' in a list of 2"),
        (["data.sources.first.name=x"], "there is no item 'first' in a list of 2"),
        (["output.name=x"], "command line: output.name: 'output' is a single value, not a section"),
        (["foo"], "command line: 'foo' has no value\n  fix: write foo=VALUE"),
        (["--seed"], "command line: --seed has no value\n  fix: write --seed VALUE or seed=VALUE"),
        (["--seed", "--output=x"], "--seed has no value"),
        (["=3"], "command line: '=3' is not an override\n  fix: write it as section.key=value"),
        (["a..b=3"], "'a..b=3' is not an override"),
        (["-x"], "'-x' is not an override"),
        (["a." * 12 + "b=1"], "is not an override"),
        (["tracking.name=\udcff"], "holds a control character or undecodable bytes"),
        (["tracking.name=\x1b[31m"], "holds a control character"),
        (["optim.epochs=\x1b"], "the character U+001B may not stand"),
        (["adapter=null", "model.quantization=nf4"], "command line: adapter: null (command line) trains all weights, but "
                                                     "model.quantization: nf4 (command line)"),
    ],
)  # fmt: skip
def test_refused(overrides: list[str], said: str) -> None:
    found = findings(*overrides)
    assert len(found) == 1
    assert said in found[0] and "\x1b" not in found[0]
    assert "  fix: " in found[0]


def test_all_bad_arguments_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides(["foo", "a.b=1", "=", "--x"])
    assert len(caught.value.problems) == 3


def test_bad_overrides_and_a_bad_file_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        read_recipe_text(BASE + "nonsense: 1\n", "r.yaml", ["foo", "bar"])
    said = str(caught.value)
    assert "nonsense" in said and "'foo'" in said and "'bar'" in said


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_arguments_give_overrides_or_a_user_error(arguments: list[str]) -> None:
    try:
        for override in parse_overrides(arguments):
            assert override.path
    except UserError as error:
        assert error.problems
