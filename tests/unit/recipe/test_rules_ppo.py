"""The `ppo` section: what its keys take, and what contradicts itself."""

from __future__ import annotations

import pytest

from gemma_tune.recipe.json_schema import recipe_schema
from gemma_tune.recipe.schema import Ppo, Recipe
from tests.unit.recipe.test_rules import findings, read

REWARD = "ppo: {reward: runs/reward"


def ppo(keys: str = "", more: str = "") -> str:
    """A `ppo` section in one line (line 5) with a reward model, and what follows it."""
    return f"{REWARD}{', ' if keys else ''}{keys}}}\n{more}"


def read_ppo(keys: str = "", more: str = "", **changes: str) -> Recipe:
    return read("ppo", ppo(keys, more), **changes)


# --- rewards


def test_a_text_is_a_list_of_one_source() -> None:
    (source,) = read_ppo().ppo.reward
    assert (source.source, source.weight, source.kind) == ("runs/reward", 1.0, "model")


def test_a_mix_of_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = read(
        "ppo", 'ppo:\n  reward:\n    - {source: ~/runs/a, weight: "5e-1"}\n    - source: ./mine.py:score\n'
    ).ppo
    assert [(one.source, one.weight, one.kind) for one in found.reward] == [
        ("/home/me/runs/a", 0.5, "model"),
        ("./mine.py:score", 1.0, "function"),
    ]
    assert found.models == ("/home/me/runs/a",) and not found.new_critic


@pytest.mark.parametrize(
    ("keys", "new"),
    [("", True), (", critic: head", False), (", estimator: rloo, samples_per_prompt: 2", False)],
)
def test_when_a_critic_is_new(keys: str, new: bool) -> None:
    assert read("ppo", f"ppo: {{reward: ./mine.py:score{keys}}}\n").ppo.new_critic is new


def test_a_model_that_only_watches_is_no_judge() -> None:
    mix = "ppo: {reward: [{source: runs/b, weight: 0}, {source: runs/a}, {source: runs/c}]}\n"
    found = read("ppo", mix).ppo
    assert (found.judge, found.models, found.new_critic) == ("runs/a", ("runs/b", "runs/a", "runs/c"), False)
    watched = read("ppo", "ppo: {reward: [{source: runs/b, weight: 0}, {source: ./f.py:g}]}\n").ppo
    assert watched.judge is None and watched.new_critic


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("[]", "ppo.reward: needs text, or a list with at least one source, got an empty list"),
        ("null", "ppo.reward: needs text, or a list with at least one source, got null"),
        ("3", "got 3\n  fix: write a path, or a list: `reward: [{source: ...}]`"),
        ("{source: runs/a}", "got a section\n  fix: write a list: `reward: [{source: ...}]`"),
        ("[runs/a]", "ppo.reward.0: needs a section (`key: value` lines), got the text 'runs/a'"),
        ("[runs/a]", "fix: write `- source: runs/a`"),
        ("[{weight: 1}]", "ppo.reward.0.source: is missing\n  fix: add `source: ...`"),
        ("[{source: runs/a, weight: -1}]", "ppo.reward.0.weight: needs a number of at least 0, got -1"),
        ("[{source: runs/a, weight: 0}]", "every source of ppo.reward (line 5) has weight 0, which rewards nothing"),
        ("[{source: runs/a, weigth: 1}]", "ppo.reward.0.weigth: unknown key; did you mean 'weight'?"),
        ("./mine.py", "ppo.reward: names no function of a file\n  fix: write ./mine.py:NAME"),
        ('"./mine.py:"', "ppo.reward: names no function of a file\n  fix: write ./mine.py:NAME"),
        ("[{source: ./mine.py}]", "ppo.reward.0.source: names no function of a file"),
        ("./mine.py:a-b", "names no function of a file\n  fix: write ./mine.py:NAME"),
    ],
)
def test_what_is_no_reward(reward: str, said: str) -> None:
    found = findings("ppo", f"ppo: {{reward: {reward}}}\n")
    assert len(found) == 1 and said in found[0]


def test_findings_elsewhere_are_not_lost_behind_a_bad_reward() -> None:
    found = findings("ppo", "ppo: {reward: [runs/a, {weight: 1}], clip: 2}\nbatch: {size: 7, micro: 2}\n")
    assert [text.partition(": ")[2].partition(" ")[0] for text in found] == [
        "ppo.reward.0:",
        "ppo.reward.1.source:",
        "ppo.clip:",
        "batch.size:",
    ]


def test_on_the_command_line() -> None:
    from gemma_tune.recipe.reader import read_recipe_text
    from tests.unit.recipe.test_rules import text

    recipe = read_recipe_text(text("ppo"), "r.yaml", ["ppo.reward=runs/b"])
    assert [one.source for one in recipe.ppo.reward] == ["runs/b"]
    words = ["ppo.reward.0.source=./f.py:g", "ppo.reward.0.weight=2", "ppo.reward.1.source=runs/c"]
    mixed = read_recipe_text(text("ppo"), "r.yaml", words).ppo.reward
    assert [(one.source, one.weight) for one in mixed] == [("./f.py:g", 2), ("runs/c", 1)]


def test_editors_are_told_both_forms() -> None:
    text, list_ = recipe_schema()["$defs"]["Ppo"]["properties"]["reward"]["anyOf"]
    assert text == {"type": "string"}
    assert (list_["type"], list_["minItems"]) == ("array", 1) and list_["items"]["$ref"].endswith("/RewardSource")


# --- values


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("estimator: grpo", "needs one of 'gae', 'rloo' or 'reinforce_pp', got the text 'grpo'"),
        ("temperature: 0", "ppo.temperature: needs a number above 0"),
        ("top_p: 0", "ppo.top_p: needs a number above 0 and at most 1"),
        ("top_k: -1", "ppo.top_k: needs a whole number of at least 0"),
        ("lam: 1.1", "ppo.lam: needs a number between 0 and 1"),
        ("kl: -0.1", "ppo.kl: needs a number of at least 0"),
        ("score_clip: 0", "ppo.score_clip: needs a number above 0, or null"),
        ("minibatches: 0", "ppo.minibatches: needs a whole number of at least 1"),
        ("max_new_tokens: 0", "ppo.max_new_tokens: needs a whole number of at least 1"),
        ("critic: none", "ppo.critic: needs one of 'adapter' or 'head'"),
    ],
)
def test_values_out_of_range(keys: str, said: str) -> None:
    (found,) = findings("ppo", ppo(keys))
    assert said in found


def test_null_switches_off() -> None:
    found = read_ppo("score_clip: null, kl_target: null, stop_kl: null, critic_learning_rate: null").ppo
    assert found.model_dump(exclude={"reward"}) == Ppo().model_dump(exclude={"reward"}) | {"score_clip": None}


# --- contradictions


@pytest.mark.parametrize(
    ("keys", "changes", "said"),
    [
        ("", {"data": ", packing: true"}, "stage: ppo (line 1) has prompts, which are not packed"),
        ("", {"data": ", train_on: all"}, "but stage: ppo (line 1) trains on its own responses"),
        ("", {"data": ", streaming: true"}, "data.streaming: true (line 3) is for stage: sft"),
        ("", {"data": ", shuffle_buffer: 9"}, "stage: ppo (line 1) reads no streams"),
        ("", {"more": "dpo: {beta: 1}\n"}, "dpo (line 6) is a section of stage: dpo"),
        (
            "",
            {"more": "adapter: null\n", "model": ", quantization: none"},
            "needs an adapter: policy, reference, reward model and critic are adapters on one base",
        ),
        (
            "",
            {"more": "adapter: {dropout: 0.1}\n"},
            "trains without dropout: the policy that learns from a response must be the one that gave it",
        ),
        (
            "",
            {"more": "adapter: {r: 8}\n", "model": ", adapter: runs/sft"},
            "adapter.r (line 6) is for a new adapter",
        ),
        (
            "max_new_tokens: 250",
            {"data": ", max_length: 256"},
            "ppo.max_new_tokens: 250 (line 5) leaves 6 tokens of data.max_length: 256 (line 3) for a prompt\n"
            "  fix: set data.max_length to 266 at the very least, such as 1000, or lower ppo.max_new_tokens",
        ),
        ("max_new_tokens: 256", {"data": ", max_length: 256"}, "leaves nothing of data.max_length"),
        (
            "estimator: rloo",
            {},
            "ppo.estimator: rloo (line 5) compares the responses to one prompt, but ppo.samples_per_prompt: 1 "
            "(default) gives one",
        ),
        (
            "samples_per_prompt: 3",
            {},
            "batch.size: 16 (default) responses a step are no multiple of ppo.samples_per_prompt: 3 (line 5)\n"
            "  fix: set batch.size to 15 or 18",
        ),
        ("samples_per_prompt: 32", {}, "fix: set batch.size to 32"),
        (
            "minibatches: 5",
            {},
            "batch.size: 16 (default) responses a step cannot be dealt out to ppo.minibatches: 5 (line 5)\n"
            "  fix: set batch.size to 15 or 20",
        ),
        (
            "minibatches: 4",
            {"more": "batch: {micro: 8}\n"},
            "ppo.minibatches: 4 (line 5) of passes of 8\n  fix: set batch.size to 32, or batch.micro: auto",
        ),
        ("", {"more": "batch: {size: 16, micro: 3}\n"}, "batch.size: 16 (line 6) is no multiple of batch.micro: 3"),
        (
            "estimator: reinforce_pp, lam: 0.9",
            {},
            "ppo.lam (line 5) is about a critic, but ppo.estimator: reinforce_pp (line 5) has none",
        ),
        (
            "estimator: rloo, samples_per_prompt: 2, gamma: 0.9",
            {},
            "ppo.gamma: 0.9 (line 5) has no meaning in ppo.estimator: rloo (line 5)",
        ),
        (
            "critic_warmup: 5",
            {"more": "optim: {max_steps: 5}\n"},
            "ppo.critic_warmup: 5 (line 5) leaves none of optim.max_steps: 5 (line 6) to the policy",
        ),
        ("kl_horizon: 1000", {}, "ppo.kl_target (default) is not set: it stays as it is"),
        ("kl: 0, kl_target: 6", {}, "ppo.kl: 0 (line 5) stays 0"),
        (
            "kl_target: 6, kl_horizon: 10",
            {},
            "ppo.kl_horizon: 10 (line 5) is less than the batch.size: 16 (default) responses of one step",
        ),
        (
            "",
            {"more": "advanced: {trainer: {ppo_epochs: 3}}\n"},
            "advanced.trainer.ppo_epochs (line 6) repeats what ppo.epochs (default) decides",
        ),
        ("", {"more": "advanced: {trainer: {kl: 3}}\n"}, "repeats what ppo.kl (default) decides"),
    ],
)
def test_what_contradicts_itself(keys: str, changes: dict[str, str], said: str) -> None:
    found = findings("ppo", ppo(keys, changes.get("more", "")), **{k: v for k, v in changes.items() if k != "more"})
    assert len(found) == 1 and said in found[0]


def test_a_recipe_without_a_reward() -> None:
    (found,) = findings("ppo")
    assert "stage: ppo (line 1) needs something that scores responses, but ppo.reward (default) names nothing" in found
    assert "r.yaml:1: " in found and "./mine.py:score" in found


def test_a_section_of_another_stage() -> None:
    (found,) = findings("dpo", ppo())
    assert "ppo (line 5) is a section of stage: ppo, but the recipe has stage: dpo" in found


def test_a_reward_that_is_named_twice() -> None:
    (found,) = findings("ppo", "ppo: {reward: [{source: runs/a}, {source: ./f.py:g}, {source: runs/a}]}\n")
    assert "ppo.reward (line 5) names runs/a 2 times" in found and "the sum of the weights" in found


def test_functions_are_not_normalised() -> None:
    (found,) = findings("ppo", "ppo: {reward: ./f.py:g, normalize: true}\n")
    assert "ppo.normalize: true (line 5) scales rewards of reward models" in found
    assert read("ppo", "ppo: {reward: ./f.py:g, normalize: false}\n").ppo.normalize is False


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ("max_new_tokens: 240", {"data": ", max_length: 256"}),
        ("minibatches: 4, samples_per_prompt: 8, epochs: 4", {"more": "batch: {size: 64, micro: 16}\n"}),
        ("estimator: rloo, samples_per_prompt: 4", {}),
        ("estimator: reinforce_pp, gamma: 0.99", {}),
        ("critic: head, critic_warmup: 5, critic_learning_rate: 1e-4", {"more": "optim: {max_steps: 6}\n"}),
        ("kl_target: 6, kl_horizon: 5000", {}),
        ("kl: 0", {}),
        ("", {"model": ", adapter: runs/sft"}),
        ("", {"model": ", adapter: runs/sft, adapter_mode: stack", "more": "adapter: {r: 8}\n"}),
        ("", {"more": "samples: {prompts: [Hello], every: 5}\n"}),
        ("", {"more": "adapter: {dropout: 0}\n"}),
    ],
)
def test_what_goes_together(keys: str, changes: dict[str, str]) -> None:
    more = changes.get("more", "")
    assert read_ppo(keys, more, **{k: v for k, v in changes.items() if k != "more"}).stage == "ppo"


def test_a_new_critic_has_the_adapters_keys_although_the_policy_is_continued() -> None:
    recipe = read("ppo", "ppo: {reward: ./f.py:g}\nadapter: {r: 8}\n", model=", adapter: runs/sft")
    assert recipe.adapter is not None and recipe.adapter.r == 8


# --- names of other tools


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("kl_coef: 0.05\n", "it is called ppo.kl here"),
        ("init_kl_coef: 0.2\n", "it is called ppo.kl here"),
        ("cliprange: 0.2\n", "it is called ppo.clip here"),
        ("cliprange_value: 0.2\n", "it is called ppo.value_clip here"),
        ("vf_coef: 0.1\n", "parameters and a learning rate of its own: ppo.critic_learning_rate"),
        ("lam: 0.95\n", "it belongs under ppo\n  fix: write it as ppo.lam"),
        ("gamma: 1.0\n", "write it as ppo.gamma"),
        ("num_ppo_epochs: 4\n", "it is called ppo.epochs here"),
        ("num_mini_batches: 1\n", "use ppo.minibatches (a number of them, not a size)"),
        ("missing_eos_penalty: 1.0\n", "it is called ppo.missing_stop_penalty here"),
        ("response_length: 53\n", "it is called ppo.max_new_tokens here"),
        ("reward_model_path: x\n", "use ppo.reward (a run of `gemma-tune reward`, or ./mine.py:function)"),
        ("whiten_rewards: true\n", "write it as ppo.whiten_rewards"),
        ("kl_estimator: k3\n", "the penalty in the reward is k1, always"),
        ("total_episodes: 1000000\n", "use optim.max_steps (episodes divided by batch.size)"),
        ("n_samples_per_prompt: 4\n", "it is called ppo.samples_per_prompt here"),
        ("temperature: 0.7\n", "write it as ppo.temperature"),
    ],
)
def test_names_of_other_tools(extra: str, said: str) -> None:
    (found,) = findings("ppo", ppo(more=extra))
    assert said in found
