"""The recipe reader: every finding at once, each with its line, the key, what is wanted and what to do."""

# ruff: noqa: E501 (tables of messages)

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma_tune.errors import UserError
from gemma_tune.recipe.names import ELSEWHERE, NOT_IN_A_RECIPE, OWNED_BY_RECIPE, distance, nearest
from gemma_tune.recipe.reader import read_recipe, read_recipe_text, recipe_schema
from gemma_tune.recipe.schema import Recipe
from gemma_tune.recipe.unknown import explain_unknown, known_keys

BASE = """\
model: {name: google/gemma-3-1b-it}
data:
  sources:
    - name: ultrachat
output: runs/x
"""


def read(extra: str = "", *overrides: str, base: str = BASE) -> Recipe:
    return read_recipe_text(base + extra, "r.yaml", overrides)


def findings(extra: str = "", *overrides: str, base: str = BASE) -> list[str]:
    """The findings as text, one a problem."""
    with pytest.raises(UserError) as caught:
        read(extra, *overrides, base=base)
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value)
    return [str(problem) for problem in caught.value.problems]


def finding(extra: str = "", *overrides: str, base: str = BASE) -> str:
    """The only finding."""
    found = findings(extra, *overrides, base=base)
    assert len(found) == 1, found
    return found[0]


def test_the_smallest_recipe_has_the_defaults() -> None:
    recipe = read()
    assert recipe == Recipe.model_validate(
        {"model": {"name": "google/gemma-3-1b-it"}, "data": {"sources": [{"name": "ultrachat"}]}, "output": "runs/x"}
    )


def test_a_file_is_read(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    assert read_recipe(path, ["seed=3"]).seed == 3
    assert read_recipe(str(path)).output == "runs/x"


# Values that are taken


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'", '"0.0001"', "1.0e-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(text: str) -> None:
    assert read(f"optim: {{learning_rate: {text}}}\n").optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    "text", ["no", "on", "yes", "12:30", "010", "1.10", "1e5", "5e10", "0x10", "1_000", "true", "7"]
)
def test_text_keys_keep_their_text(text: str) -> None:
    recipe = read(f"tracking: {{project: {text}, name: {text}}}\n")
    assert recipe.tracking.project == recipe.tracking.name == text


def test_a_git_commit_is_text_even_when_it_looks_like_a_number() -> None:
    base = BASE.replace("}", ", revision: 1234567}")
    assert read(base=base).model.revision == "1234567"
    commit = "0123456789" * 4
    assert read(base=BASE.replace("}", f", revision: {commit}}}")).model.revision == commit


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_means_the_default_of_a_key_that_may_be_absent(text: str) -> None:
    assert read(f"optim:\n  max_steps: {text}\n").optim.max_steps is None
    assert read(f"tracking:\n  name: {text}\n").tracking.name is None


@pytest.mark.parametrize("name", ["🦜", "שלום", "x" * 10_000, "a b", "Ünïcode"])
def test_any_name_is_taken(name: str) -> None:
    assert read(f'tracking: {{name: "{name}"}}\n').tracking.name == name


def test_whole_numbers_are_taken_where_a_fraction_may_stand() -> None:
    assert read("optim: {epochs: 3}\ndata_: 1\n".replace("data_: 1\n", "")).optim.epochs == 3.0


def test_adapter_null_with_unquantised_weights_is_a_full_fine_tune() -> None:
    base = BASE.replace("}", ", quantization: none}")
    assert read("adapter: null\n", base=base).adapter is None


def test_columns_and_trainer_keywords_are_free_mappings() -> None:
    base = BASE.replace("name: ultrachat", "name: x.jsonl\n      columns: {messages: 12}")
    recipe = read("advanced: {trainer: {neftune_noise_alpha: 5, torch_compile: true, x: [1, {y: 2e-3}]}}\n", base=base)
    assert recipe.data.sources[0].columns == {"messages": "12"}
    assert recipe.advanced.trainer == {"neftune_noise_alpha": 5, "torch_compile": True, "x": [1, {"y": 0.002}]}


# Unknown keys


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("optim: {lerning_rate: 1}\n", "r.yaml:6: optim.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("optim:\n  wieght_decay: 0\n", "r.yaml:7: optim.wieght_decay: unknown key; did you mean 'weight_decay'?"),
        ("learning_rate: 1\n", "r.yaml:6: learning_rate: unknown key here; it belongs under optim\n  fix: write it as "
                               "optim.learning_rate"),
        ("batch: {learning_rate: 1}\n", "unknown key here; it belongs under optim"),
        ("model_: 1\n", "did you mean 'model'?"),
        ("Seed: 1\n", "did you mean 'seed'?"),
        ("optim: {learning-rate: 1}\n", "did you mean 'learning_rate'?"),
        ("lerning_rate: 1\n", "did you mean 'optim.learning_rate'?"),
        ("optim: {beta: 0.9}\n", "did you mean 'beta1' or 'beta2'?"),
        ("every: 3\n", "it belongs under evaluation or samples or checkpoint"),
        ("per_device_train_batch_size: 4\n", "it is called batch.micro here\n  fix: use batch.micro (batch.size is the global"),
        ("num_train_epochs: 4\n", "it is called optim.epochs here"),
        ("optim: {num_train_epochs: 4}\n", "it is called optim.epochs here"),
        ("max_seq_length: 512\n", "it is called data.max_length here"),
        ("lora_r: 8\n", "it is called adapter.r here"),
        ("load_in_4bit: true\n", "it is called model.quantization here"),
        ("LOAD_IN_8BIT: true\n", "it is called model.quantization here"),
        ("max_seq_lenght: 512\n", "if you mean 'max_seq_length', it is called data.max_length here"),
        ("trust_remote_code: true\n", "there is no such key in a recipe\n  fix: code from a model's folder is never run"),
        ("zzzzzzzzzz: 1\n", "unknown key\n  fix: known at the top level: stage, model"),
        ("optim: {zzzzzzzzzz: 1}\n", "unknown key\n  fix: known in optim: learning_rate, schedule"),
        ("? ''\n: 1\n", "unknown key ''"),
    ],
)  # fmt: skip
def test_unknown_keys_say_what_was_meant(extra: str, said: str) -> None:
    assert said in finding(extra)


def test_source_is_called_sources() -> None:
    base = BASE.replace("  sources:\n    - name: ultrachat", "  source: ultrachat")
    assert any("data.source: unknown key here; did you mean 'sources'?" in text for text in findings(base=base))


@pytest.mark.parametrize("ours", sorted({ours for ours, _ in ELSEWHERE.values()} | set(OWNED_BY_RECIPE.values())))
def test_every_name_that_a_message_recommends_exists(ours: str) -> None:
    if ours.startswith("--"):
        return
    known = {path for paths in known_keys().values() for path in paths}
    assert ours in known


def test_no_foreign_name_hides_a_key_of_ours() -> None:
    # A key of ours is looked up first; a foreign entry of the same name would never be reached.
    assert not set(ELSEWHERE) & set(known_keys())
    assert not set(NOT_IN_A_RECIPE) & (set(known_keys()) | set(ELSEWHERE))


def all_keys() -> list[tuple[tuple[str, ...], str]]:
    return [(tuple(path.split(".")), path) for paths in known_keys().values() for path in paths]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(all_keys()), st.data())
def test_one_slip_in_any_key_is_understood(key: tuple[tuple[str, ...], str], data: st.DataObject) -> None:
    path, _ = key
    word = path[-1]
    assume(len(word) > 2)
    kind = data.draw(st.sampled_from(["drop", "add", "swap", "replace"]))
    at = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    slipped = {
        "drop": word[:at] + word[at + 1 :],
        "add": word[:at] + letter + word[at:],
        "swap": word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        "replace": word[:at] + letter + word[at + 1 :],
    }[kind]
    siblings = [other[-1] for other, _ in all_keys() if other[:-1] == path[:-1]]
    assume(slipped not in known_keys() and slipped not in ELSEWHERE and slipped not in NOT_IN_A_RECIPE)
    what, fix = explain_unknown((*path[:-1], slipped), siblings, is_section=False)
    assert repr(word) in what
    assert word in fix


@pytest.mark.parametrize(
    ("left", "right", "edits"),
    [("", "", 0), ("a", "", 1), ("ab", "ba", 1), ("kitten", "sitting", 3), ("ca", "abc", 3), ("same", "same", 0)],
)
def test_distance(left: str, right: str, edits: int) -> None:
    assert distance(left, right) == distance(right, left) == edits


def test_nearest_keeps_quiet_when_nothing_is_near() -> None:
    assert nearest("zzzzzz", ["alpha", "beta"]) == []
    assert nearest("x" * 1000, ["alpha"]) == []


# Wrong values


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("seed: 1.5\n", "seed: needs a whole number of at least 0 below 4,294,967,296, got 1.5"),
        ("seed: 4294967296\n", "below 4,294,967,296, got 4294967296"),
        ("seed: -1\n", "got -1"),
        ("seed:\n", "got nothing"),
        ("optim: {max_steps: true}\n", "needs a whole number of at least 1, or null, got true"),
        ("optim: {max_steps: '8'}\n", "got the text '8'\n  fix: write 8 without quotes"),
        ("optim: {max_steps: 1e3}\n", "got 1e3\n  fix: write 1000"),
        ("optim: {max_steps: 1_000}\n", "got the text '1_000'\n  fix: write 1000"),
        ("optim: {max_steps: 010}\n", "got the text '010'\n  fix: write 10"),
        ("optim: {max_steps: 0}\n", "needs a whole number of at least 1, or null, got 0"),
        ("optim: {learning_rate: -1}\n", "optim.learning_rate: needs a number above 0 and at most 1, got -1"),
        ("optim: {learning_rate: 2}\n", "needs a number above 0 and at most 1, got 2"),
        ("optim: {max_steps: '1,000'}\n", "got the text '1,000'\n  fix: write 1000"),
        ("optim: {max_steps: '1,5'}\n", "got the text '1,5'\n  fix: write a whole number"),
        ("optim: {learning_rate: '0,0002'}\n", "got the text '0,0002'\n  fix: write 0.0002"),
        ("optim: {learning_rate: abc}\n", "got the text 'abc'\n  fix: write a number"),
        ("optim: {learning_rate: true}\n", "got true"),
        ("optim: {learning_rate: 12:30}\n", "got the text '12:30'"),
        ("optim: {learning_rate: .nan}\n", ".nan is not a finite number"),
        ("optim: {learning_rate: -.inf}\n", "-.inf is not a finite number"),
        ("optim: {learning_rate: 1e999}\n", "1e999 is not a finite number"),
        ("optim: {learning_rate: 'nan'}\n", "got the text 'nan'"),
        ("optim: {learning_rate: '1e999'}\n", "got the text '1e999'"),
        ("optim: {learning_rate: [1e-4]}\n", "got a list of 1"),
        ("optim: {learning_rate: {a: 1}}\n", "got a section"),
        ("optim: {warmup_ratio: 1.5}\n", "needs a number between 0 and 1, got 1.5"),
        ("optim: {epochs: 0}\n", "needs a number above 0, got 0"),
        ("adapter: {r: 0}\n", "adapter.r: needs a whole number of at least 1, got 0"),
        ("adapter: {targets: all_linear}\n", "needs one of 'all-linear', 'attention' or 'mlp', got the text 'all_linear'\n"
                                             "  fix: write all-linear"),
        ("batch: {micro: x}\n", "batch.micro: needs a whole number of at least 1, or 'auto', got the text 'x'"),
        ("memory: {gradient_checkpointing: yes}\n", "needs true or false, or 'auto', got the text 'yes'\n  fix: write true"),
        ("tracking: {wandb: on}\n", "needs true or false, got the text 'on'\n  fix: write true"),
        ("tracking: {wandb: 1}\n", "needs true or false, got 1"),
        ("tracking: {project: null}\n", "tracking.project: needs text, got null"),
        ("tracking: {project: [a]}\n", "needs text, got a list of 1"),
        ("samples: {prompts: hello}\n", "needs a list of texts, got the text 'hello'"),
        ("samples: {prompts: [[a]]}\n", "samples.prompts.0: needs text, got a list of 1"),
        ("samples: {prompts: [null]}\n", "samples.prompts.0: needs text, got null"),
        ("optim: adamw_torch\n", "optim: needs a section (`key: value` lines), got the text 'adamw_torch'\n"
                                 "  fix: `optim` is a section; the optimizer is optim.optimizer"),
        ("optim: [1]\n", "optim: needs a section"),
        ("optim:\n", "optim: is empty\n  fix: remove the line `optim:`"),
        ("adapter:\n", "adapter: is empty\n  fix: remove the line for LoRA's defaults, or write `adapter: null`"),
        ("adapter: false\n", "adapter: needs a section (`key: value` lines), or null, got false"),
        ("stage: dpx\n", "stage: needs one of 'sft', 'reward', 'dpo', 'kto' or 'ppo', got the text 'dpx'\n  fix: write dpo"),
        ("advanced: {trainer: {x: .inf}}\n", "advanced.trainer.x: .inf is not a finite number"),
        ("advanced: {trainer: [1]}\n", "advanced.trainer: needs a section"),
    ],
)  # fmt: skip
def test_wrong_values_say_what_is_wanted_and_what_is_there(extra: str, said: str) -> None:
    found = finding(extra)
    assert said in found
    assert found.startswith("r.yaml:6: ")
    assert "  fix: " in found


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (BASE.replace("model: {name: google/gemma-3-1b-it}\n", ""), "r.yaml:1: model: is missing\n  fix: add `model: {name"),
        (BASE.replace("output: runs/x\n", ""), "output: is missing\n  fix: add `output: runs/NAME`"),
        (BASE.replace("name: ultrachat", "limit: 3"), "r.yaml:4: data.sources.0.name: is missing"),
        (BASE.replace("\n    - name: ultrachat", " []"), "data.sources: needs a list with at least one source, got an empty"),
        (BASE.replace("\n    - name: ultrachat", " ultrachat"), "fix: write a list: `sources: [{name: ...}]`"),
        (BASE.replace("- name: ultrachat", "- ultrachat"), "data.sources.0: needs a section (`key: value` lines), got the text "
                                                            "'ultrachat'\n  fix: write `- name: ultrachat`"),
        (BASE.replace("{name: google/gemma-3-1b-it}", "google/gemma-3-1b-it"), "fix: write `model: {name: google/gemma-3-1b"),
        (BASE.replace("output: runs/x", "output: ''"), "output: needs text that is not empty, got the text ''"),
        (BASE.replace("output: runs/x", "output:"), "output: needs text that is not empty, got nothing"),
        (BASE.replace("runs/x", "~nobody-has-this-name/x"), "output: the home folder of ~nobody-has-this-name is not known\n"
                                                            "  fix: write the whole path"),
        (BASE.replace("}", ", quantization: 4bit}"), "model.quantization: needs one of 'nf4', 'int8' or 'none'"),
        (BASE.replace("}", ", quantization: null}"), "model.quantization: needs one of 'nf4', 'int8' or 'none', got null\n"
                                                      "  fix: write none"),
        (BASE.replace("}", ", quantization: no}"), "fix: write none"),
    ],
)  # fmt: skip
def test_required_keys_and_sections(base: str, said: str) -> None:
    assert said in finding(base=base)


def test_the_output_folder_may_lie_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert read_recipe_text(BASE.replace("runs/x", "~/runs/x")).output == "/home/ada/runs/x"


def test_all_findings_come_at_once_in_the_order_of_the_file() -> None:
    found = findings(
        "optim: {lerning_rate: 1, epochs: 0}\n"
        "seed: -1\n"
        "seed: 2\n"
        "batch: {size: 100, micro: 8}\n"
        "tracking: &x {wandb: on}\n"
        "advanced: {trainer: {learning_rate: 1}}\n",
        "model.foo=1",
    )
    assert [text.splitlines()[0].split(" ")[0] for text in found] == [
        "r.yaml:6:", "r.yaml:6:", "r.yaml:7:", "r.yaml:8:", "r.yaml:9:", "r.yaml:10:", "r.yaml:10:", "r.yaml:11:", "command",
    ]  # fmt: skip


def test_a_wrong_value_is_reported_once() -> None:
    # A union has two branches and pydantic reports both.
    assert len(findings("batch: {micro: x}\nmemory: {gradient_checkpointing: 3}\n")) == 2


def test_a_long_or_dangerous_value_is_cut_and_escaped() -> None:
    said = finding('adapter: {targets: "\\e[31m' + "y" * 500 + '"}\n')
    assert "\x1b" not in said and "\\x1b[31m" in said
    assert "(505 characters)" in said and len(said) < 400


# Contradictions


@pytest.mark.parametrize(
    ("extra", "overrides", "said"),
    [
        ("adapter: null\n", (), "r.yaml:6: adapter: null (line 6) trains all weights, but model.quantization: nf4 (default)"),
        ("adapter: null\n", ("model.quantization=int8",), "model.quantization: int8 (command line)"),
        ("", ("adapter=null",), "command line: adapter: null (command line) trains all weights"),
        ("optim: {schedule: constant}\n", (), "optim.schedule: constant (line 6) has no warm-up, but optim.warmup_ratio: 0.03 "
                                              "(default)"),
        ("optim:\n  warmup_ratio: 0.1\n  schedule: constant\n", (), "constant (line 8) has no warm-up, but optim.warmup_ratio: "
                                                                    "0.1 (line 7)"),
        ("batch: {size: 100, micro: 8}\n", (), "batch.size: 100 (line 6) is no multiple of batch.micro: 8 (line 6)\n"
                                               "  fix: set batch.size to 96 or 104"),
        ("batch: {micro: 32}\n", (), "batch.size: 16 (default) is no multiple of batch.micro: 32 (line 6)\n"
                                     "  fix: set batch.size to 32,"),
        ("optim: {beta1: 1}\n", (), "optim.beta1: 1 (line 6) would never forget"),
        ("optim: {beta2: 1.0}\n", (), "optim.beta2: 1 (line 6) would never forget"),
        ("", ("data.holdout=2.5",), "data.holdout: 2.5 (command line) is no share below 1 and no number of rows"),
        ("evaluation: {every: 10}\n", ("data.holdout=0",), "evaluation.every: 10 (line 6) asks for evaluations, but data.holdout:"
                                                           " 0 (command line)"),
        ("optim: {max_steps: 5}\n", ("data.streaming=true",), "data.holdout: 0.01 (default) is a share"),
        ("", ("data.streaming=true", "data.holdout=10"), "optim.max_steps (default) is not set"),
        ("advanced:\n  trainer:\n    learning_rate: 1\n", (), "r.yaml:8: advanced.trainer.learning_rate (line 8) repeats what "
                                                              "optim.learning_rate (default) decides"),
        ("advanced: {trainer: {output_dir: y}}\n", (), "advanced.trainer.output_dir (line 6) repeats what output (line 5)"),
        ("advanced: {trainer: {resume_from_checkpoint: y}}\n", (), "repeats what --resume decides"),
    ],
)  # fmt: skip
def test_contradictions_name_both_keys_and_their_places(extra: str, overrides: tuple[str, ...], said: str) -> None:
    found = finding(extra, *overrides)
    assert said in found
    assert "  fix: " in found


@pytest.mark.parametrize(
    ("extra", "overrides"),
    [
        ("optim: {schedule: constant, warmup_ratio: 0}\n", ()),
        ("optim: {schedule: constant_with_warmup}\n", ()),
        ("batch: {size: 96, micro: 8}\n", ()),
        ("optim: {max_steps: 5}\n", ("data.streaming=true", "data.holdout=10")),
        ("optim: {max_steps: 5}\n", ("data.streaming=true", "data.holdout=0")),
        ("", ("data.holdout=1",)),
        ("", ("data.holdout=200",)),
        ("", ("data.holdout=0",)),
        ("optim: {beta1: 0, beta2: 0.99}\n", ()),
    ],
)
def test_what_is_no_contradiction(extra: str, overrides: tuple[str, ...]) -> None:
    read(extra, *overrides)


def test_contradictions_are_found_beside_other_findings_but_not_about_wrong_values() -> None:
    found = "\n".join(findings("adapter: null\nbatch: {size: x, micro: 7}\n"))
    assert "trains all weights" in found
    assert "no multiple" not in found


@pytest.mark.parametrize("keyword", sorted(OWNED_BY_RECIPE))
def test_a_trainer_keyword_that_the_recipe_owns_is_refused(keyword: str) -> None:
    assert f"advanced.trainer.{keyword}" in finding(f"advanced: {{trainer: {{{keyword}: 1}}}}\n")


# Secrets

TOKEN = "hf_" + "aB3" * 11 + "x"
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("extra", "place"),
    [
        (f"tracking: {{name: {TOKEN}}}\n", "tracking.name"),
        (f"tracking: {{name: {WANDB}}}\n", "tracking.name"),
        ("tracking: {name: wandb_v1_" + "Ab3_" * 18 + "}\n", "tracking.name"),
        (f"samples: {{prompts: [my token is {TOKEN}]}}\n", "samples.prompts.0"),
        ("tracking: {name: '${HF_TOKEN}'}\n", "tracking.name"),
        ("tracking: {name: $WANDB_API_KEY}\n", "tracking.name"),
        ("advanced: {trainer: {hub_token: abc}}\n", "advanced.trainer.hub_token"),
        (f"# {TOKEN}\n", "r.yaml:6"),
    ],
)
def test_secrets_are_refused_and_never_shown(extra: str, place: str) -> None:
    said = finding(extra)
    assert place in said and "secrets do not belong in recipes" in said
    assert TOKEN not in said and WANDB not in said and "Ab3_Ab3" not in said


@pytest.mark.parametrize("key", ["hf_token", "hub_token", "token", "wandb_api_key", "password"])
def test_keys_for_secrets_are_refused_whatever_their_value(key: str) -> None:
    said = finding(f"{key}: swordfish\n")
    assert "secrets do not belong in recipes" in said and "swordfish" not in said


def test_a_secret_on_the_command_line_is_not_shown() -> None:
    said = "\n".join(findings("", f"tracking.name={TOKEN}", f"foo.bar={TOKEN}", f"seed={TOKEN}"))
    assert "command line: tracking.name: this looks like an access token" in said
    assert TOKEN not in said


def test_other_variables_are_not_expanded_and_prompts_may_speak_of_them() -> None:
    base = BASE.replace("runs/x", "${HOME}/x")
    assert "output: ${HOME} is not expanded" in finding(base=base)
    assert read("samples: {prompts: ['what does ${HOME} mean?']}\n").samples.prompts == ("what does ${HOME} mean?",)
    assert read("tracking: {name: costs $5}\n").tracking.name == "costs $5"


# The schema for editors


def test_the_schema_has_bounds_and_texts_for_every_leaf() -> None:
    schema = recipe_schema()

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            assert not {"ge", "gt", "le", "lt"} & set(node), path
            for key, child in node.items():
                walk(child, f"{path}.{key}")
        elif isinstance(node, list):
            for child in node:
                walk(child, path)

    walk(schema, "")
    assert schema["additionalProperties"] is False
    rate = schema["$defs"]["Optim"]["properties"]["learning_rate"]
    assert (rate["exclusiveMinimum"], rate["maximum"]) == (0, 1)
    assert rate["description"].startswith("Peak learning rate")


# Whatever the bytes are: a recipe or a UserError

WORDS = st.sampled_from(
    [
        *sorted(known_keys()),
        "lr",
        "hf_token",
        "<<",
        "",
        "1e-4",
        "null",
        "true",
        "auto",
        "nf4",
        "none",
        "${X}",
        TOKEN,
        "x",
    ]
)
VALUES = st.recursive(
    st.one_of(WORDS, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)


def outcome(data: bytes, overrides: list[str], folder: Any) -> None:
    path = folder / "fuzz.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_recipe(path, overrides), Recipe)
    except UserError as error:
        text = str(error)
        assert error.problems and TOKEN not in text and "\x1b" not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), head=st.booleans())
def test_any_bytes(data: bytes, head: bool, folder: Any) -> None:
    outcome(BASE.encode() * head + data, [], folder)


@settings(max_examples=600, deadline=None)
@given(
    document=st.dictionaries(WORDS, VALUES, max_size=5),
    overrides=st.lists(
        st.tuples(st.lists(WORDS, min_size=1, max_size=4).map(".".join), st.text(max_size=8)), max_size=3
    ),
)
def test_any_tree_and_any_overrides(document: dict[str, Any], overrides: list[tuple[str, str]], folder: Any) -> None:
    import yaml

    text = yaml.safe_dump(document, allow_unicode=True)
    merged = BASE + (text if document else "")
    arguments = [f"{key}={value}" for key, value in overrides]
    for candidate in (text, merged):
        outcome(candidate.encode("utf-8", "surrogatepass"), arguments, folder)
