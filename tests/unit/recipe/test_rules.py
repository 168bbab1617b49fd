"""Rules about the stages: what contradicts itself, with both keys and their places."""

from __future__ import annotations

import pytest

from gemma_tune.errors import UserError
from gemma_tune.recipe.reader import read_recipe_text
from gemma_tune.recipe.schema import Recipe

BASE = "model: {{name: google/gemma-3-1b-it{model}}}\ndata: {{sources: [{{name: x.jsonl}}]{data}}}\noutput: runs/x\n"


def text(stage: str, more: str = "", model: str = "", data: str = "") -> str:
    return f"stage: {stage}\n" + BASE.format(model=model, data=data) + more


def read(*arguments: str, **changes: str) -> Recipe:
    return read_recipe_text(text(*arguments, **changes), "r.yaml")


def findings(*arguments: str, **changes: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*arguments, **changes)
    return [f"{problem.where}: {problem.what}\n  fix: {problem.fix}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        (
            "sft",
            {"more": "dpo: {beta: 0.1}\n"},
            "r.yaml:5: dpo (line 5) is a section of stage: dpo, but the recipe has stage: sft (line 1)",
        ),
        ("reward", {"more": "dpo: {loss: ipo}\n"}, "r.yaml:5: dpo (line 5) is a section of stage: dpo"),
        ("dpo", {"more": "reward: {center: 0}\n"}, "set stage: reward, or remove the section"),
        (
            "dpo",
            {"data": ", packing: true"},
            "r.yaml:3: data.packing: true (line 3), but stage: dpo (line 1) has pairs",
        ),
        (
            "reward",
            {"data": ", train_on: all"},
            "data.train_on (line 3) is for stage: sft, but stage: reward (line 1) trains on the answers",
        ),
        (
            "dpo",
            {"data": ", shuffle_buffer: 9"},
            "data.shuffle_buffer (line 3) is for stage: sft, but stage: dpo (line 1) reads no streams",
        ),
        ("dpo", {"data": ", streaming: true"}, "data.streaming: true (line 3) is for stage: sft"),
        (
            "reward",
            {"data": ", canaries: {count: 2}"},
            "r.yaml:3: data.canaries (line 3) plants rows for stage: sft, but the recipe has stage: reward (line 1)",
        ),
        (
            "sft",
            {"data": ", canaries: {}, streaming: true, holdout: 9", "more": "optim: {max_steps: 9}\n"},
            "data.canaries (line 3) are planted among all rows, but data.streaming: true (line 3) never has all",
        ),
        ("sft", {"data": ", canaries: {repeats: [4, 4]}"}, "names a number twice"),
        ("sft", {"data": ", canaries: {repeats: []}"}, "data.canaries.repeats"),
        (
            "reward",
            {"more": "samples: {prompts: [Hello]}\n"},
            "r.yaml:5: samples (line 5) asks for answers, but the model of stage: reward (line 1) rates",
        ),
        (
            "reward",
            {"more": "adapter: null\n", "model": ", quantization: none"},
            "but stage: reward (line 1) needs an adapter: a reward model is",
        ),
        (
            "dpo",
            {"more": "adapter: null\n", "model": ", quantization: none"},
            "the reference is the base with the adapter switched off",
        ),
        (
            "dpo",
            {"more": "adapter: {dropout: 0.1}\n"},
            "adapter.dropout: 0.1 (line 5), but stage: dpo (line 1) trains without dropout",
        ),
        (
            "sft",
            {"more": "adapter: null\n", "model": ", quantization: none, adapter: runs/y"},
            "model.adapter (line 2) begins with a saved adapter, but adapter: null (line 5)",
        ),
        (
            "dpo",
            {"more": "adapter: {r: 8}\n", "model": ", adapter: runs/y"},
            "is trained on as it was saved\n  fix: remove adapter.r, or set model.adapter_mode: stack",
        ),
        (
            "sft",
            {"more": "adapter: {dropout: 0.1}\n", "model": ", adapter: runs/y"},
            "adapter.dropout (line 5) is for a new adapter",
        ),
        (
            "dpo",
            {"model": ", adapter_mode: continue"},
            "model.adapter_mode: continue (line 2) is about a saved adapter, but model.adapter (default) names none",
        ),
        (
            "reward",
            {"model": ", adapter: runs/y, adapter_mode: stack"},
            "model.adapter_mode: stack (line 2) saves the sum of two adapters, but stage: reward (line 1)",
        ),
        (
            "dpo",
            {"model": ", adapter: runs/y, adapter_mode: stack", "more": "adapter: {dora: true}\n"},
            "adapter.dora: true (line 5) cannot be added up",
        ),
        (
            "sft",
            {"model": ", adapter: runs/y, adapter_mode: stack", "more": "adapter: {rslora: true}\n"},
            "adapter.rslora: true (line 5) cannot be added up",
        ),
        (
            "dpo",
            {"more": "dpo: {loss: ipo, label_smoothing: 0.1}\n"},
            "dpo.label_smoothing: 0.1 (line 5) has no meaning in dpo.loss: ipo (line 5)",
        ),
        (
            "dpo",
            {"more": "dpo: {loss: robust}\n"},
            "dpo.loss: robust (line 5) with dpo.label_smoothing: 0 (default) is the loss sigmoid",
        ),
        (
            "dpo",
            {"more": "advanced: {trainer: {beta: 1}}\n"},
            "advanced.trainer.beta (line 5) repeats what dpo.beta (default) decides",
        ),
        (
            "reward",
            {"more": "advanced: {trainer: {center_rewards_coefficient: 1}}\n"},
            "repeats what reward.center (default) decides",
        ),
        (
            "dpo",
            {"more": "advanced: {trainer: {precompute_ref_log_probs: true}}\n"},
            "repeats what dpo.precompute_reference",
        ),
        ("dpo", {"more": "kto: {beta: 0.1}\n"}, "r.yaml:5: kto (line 5) is a section of stage: kto"),
        ("kto", {"data": ", packing: true"}, "but stage: kto (line 1) has single answers, which are not packed"),
        (
            "kto",
            {"more": "adapter: null\n", "model": ", quantization: none"},
            "stage: kto (line 1) needs an adapter",
        ),
        (
            "kto",
            {"more": "batch: {size: 8, micro: 1}\n"},
            "batch.micro: 1 (line 5), but stage: kto (line 1) compares each answer with answers to other prompts",
        ),
        ("kto", {"more": "batch: {size: 1}\n"}, "set batch.size to 2 or more"),
        (
            "kto",
            {"more": "advanced: {trainer: {undesirable_weight: 2}}\n"},
            "repeats what kto.undesirable_weight (default) decides",
        ),
        (
            "kto",
            {"more": "advanced: {trainer: {loss_type: kto}}\n"},
            "repeats what stage (line 1) decides",
        ),
    ],
)
def test_what_contradicts_the_stage(stage: str, changes: dict[str, str], said: str) -> None:
    found = findings(stage, **changes)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("dpo", {"data": ", packing: false, streaming: false"}),
        ("dpo", {"more": "adapter: {dropout: 0, r: 8}\n"}),
        ("dpo", {"model": ", adapter: runs/y"}),
        ("reward", {"model": ", adapter: runs/y, adapter_mode: continue"}),
        ("dpo", {"model": ", adapter: runs/y, adapter_mode: stack", "more": "adapter: {r: 8}\n"}),
        ("sft", {"model": ", adapter: runs/y, adapter_mode: stack", "more": "adapter: {dropout: 0.1}\n"}),
        ("dpo", {"more": "dpo: {loss: robust, label_smoothing: 0.1, sft_weight: 1, precompute_reference: true}\n"}),
        ("dpo", {"more": "samples: {prompts: [Hello]}\n"}),
        ("reward", {"more": "reward: {margin: score, center: 0}\n"}),
        ("kto", {"more": "kto: {beta: 0.05, desirable_weight: 1.33}\nbatch: {size: 8, micro: 2}\n"}),
        ("kto", {"model": ", adapter: runs/y, adapter_mode: stack", "more": "adapter: {r: 8}\n"}),
        ("sft", {"more": "advanced: {trainer: {loss_type: dft}}\n"}),
        ("sft", {"data": ", canaries: {count: 2, repeats: [8]}"}),
        ("dpo", {"data": ", canaries: null"}),
    ],
)
def test_what_goes_together(stage: str, changes: dict[str, str]) -> None:
    assert read(stage, **changes).stage == stage


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("beta: 0.1\n", "it belongs under dpo or kto\n  fix: write it as dpo.beta or kto.beta"),
        ("label_smoothing: 0.1\n", "write it as dpo.label_smoothing"),
        ("loss_type: ipo\n", "it is called dpo.loss here"),
        ("rpo_alpha: 1\n", "it is called dpo.sft_weight here"),
        ("kto_chosen_weight: 1.2\n", "it is called kto.desirable_weight here"),
        ("center_rewards_coefficient: 0.01\n", "it is called reward.center here"),
        ("precompute_ref_log_probs: true\n", "it is called dpo.precompute_reference here"),
        ("max_prompt_length: 512\n", "use data.max_length (prompt and answer together; an answer is never cut)"),
        ("ref_model: x\n", "the reference is the base, or model.adapter as it was: never a second model"),
        ("adapter_name_or_path: x\n", "it is called model.adapter here"),
        ("rl: dpo\n", "it is called stage here"),
        ("optim: {beta: 0.1}\n", "did you mean 'beta1' or 'beta2'? beta itself belongs under dpo"),
    ],
)
def test_names_of_other_tools(extra: str, said: str) -> None:
    assert said in findings("dpo", extra)[0]


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read("dpo", model=", adapter: ~/runs/sft").model.adapter == "/home/me/runs/sft"
    assert "text that is not empty" in findings("dpo", model=', adapter: ""')[0]


@pytest.mark.parametrize(
    ("stage", "distributed", "said"),
    [
        (
            "sft",
            "{strategy: ddp, checkpoint: sharded}",
            "r.yaml:5: distributed.checkpoint (line 5) is for sharded weights, but with distributed.strategy: ddp",
        ),
        ("sft", "{strategy: ddp, offload: true}", "distributed.offload (line 5) is for sharded weights"),
        ("sft", "{strategy: ddp, reshard_after_forward: false}", "distributed.reshard_after_forward (line 5) is for"),
        ("sft", "{replicas: 2}", "distributed.replicas: 2 (line 5) is for groups that each hold the whole model"),
        ("sft", "{strategy: fsdp2, replicas: 2}", "but there is distributed.strategy: fsdp2 (line 5)"),
        ("kto", "{strategy: fsdp2}", "but stage: kto (line 1) is not sharded: its KL rows"),
        ("ppo", "{strategy: hsdp}", "but stage: ppo (line 1) is not sharded: its roles"),
    ],
)
def test_how_processes_share_a_run(stage: str, distributed: str, said: str) -> None:
    more = f"distributed: {distributed}\n" + ("ppo: {reward: runs/reward}\n" if stage == "ppo" else "")
    assert any(said in finding for finding in findings(stage, more))


@pytest.mark.parametrize(
    "distributed",
    [
        "{strategy: ddp, checkpoint: full, offload: false}",
        "{strategy: hsdp, replicas: 2, checkpoint: sharded, offload: true}",
        "{checkpoint: sharded, timeout: 0.5}",
    ],
)
def test_what_processes_may_share(distributed: str) -> None:
    read("sft", f"distributed: {distributed}\n")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("fsdp", "distributed.strategy"),
        ("fsdp_config", "distributed"),
        ("deepspeed", "distributed.strategy"),
        ("ddp_timeout", "distributed.timeout"),
        ("parallelism_config", "distributed.replicas"),
    ],
)
def test_what_trainers_call_it(key: str, ours: str) -> None:
    assert f"it is called {ours} here" in findings("sft", f"{key}: 1\n")[0]
    assert (
        f"advanced.trainer.{key} (line 5) repeats what {ours}"
        in findings("sft", f"advanced: {{trainer: {{{key}: 1}}}}\n")[0]
    )
