"""Recipe x machine -> decisions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES, RESIDUAL_EXPONENT
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.choices_batch import BUDGET, MOST_TOKENS, accumulation_steps, most_processes
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import GIB, MACHINES, Machine
from gemma_tune.plan.memory import total
from gemma_tune.plan.plan import make_plan
from tests.unit.plan.recipes import make_recipe, plan_for

BF16_CPU = Machine("epyc", "cpu", 0, 24 * GIB, bf16=True)
FULL = {"adapter": None, "model.quantization": "none"}


@pytest.mark.parametrize(
    ("model", "machine", "changes", "dtype", "autocast"),
    [
        ("google/gemma-3-1b-it", "rtx4090", {}, "bfloat16", None),
        ("google/gemma-2-2b", "a100", {}, "bfloat16", None),
        ("google/gemma-3-1b-it", "t4", {}, "float16", None),  # rescaled: no autocast
        ("google/gemma-2-2b", "t4", {}, "float16", None),
        ("google/gemma-3-1b-it", "t4", {"model.precision": "fp32"}, "float32", None),
        ("google/gemma-3n-E2B", "t4", {}, "float32", None),  # overflows fp16
        ("google/gemma-4-E2B", "t4", {}, "float32", None),
        ("google/gemma-2b", "t4", {}, "float16", "fp16"),  # does not, and needs loss scaling
        ("google/gemma-2b", "t4", {"model.precision": "fp32"}, "float32", None),
        ("google/gemma-3-270m", "cpu", {}, "float32", None),
        ("google/gemma-3-270m", BF16_CPU, {}, "bfloat16", None),
        ("google/gemma-3-270m", "cpu", {"model.precision": "bf16"}, "bfloat16", None),
        ("google/gemma-3-270m", "rtx4090", {"model.precision": "fp32"}, "float32", None),
        ("google/gemma-3-270m", "rtx4090", FULL, "float32", "bf16"),
        ("google/gemma-3-270m", BF16_CPU, FULL, "float32", "bf16"),
        ("google/gemma-3-270m", "cpu", FULL, "float32", None),
        ("google/gemma-3-270m", "t4", FULL, "float32", "fp16"),
        ("google/gemma-2b", "rtx4090", {"model.precision": "fp16"}, "float16", "fp16"),
    ],
)
def test_types(model, machine, changes, dtype, autocast):
    plan = plan_for({"model.name": model} | changes, machine)
    trainer = plan.values("trainer")
    assert plan.values("model")["dtype"] == dtype
    assert (trainer["bf16"], trainer["fp16"]) == (autocast == "bf16", autocast == "fp16")
    assert trainer["use_cpu"] == (plan.machine["device"] == "cpu")
    if plan.quantization:
        assert plan.values("quantization")["bnb_4bit_compute_dtype"] == dtype
        assert plan.values("quantization")["bnb_4bit_quant_storage"] == dtype


def test_never_fp16_where_it_overflows():
    for name, shape in PUBLISHED.items():
        for machine in MACHINES:
            plan = plan_for({"model.name": name, "batch.size": 64}, machine)
            model, fp16 = plan.values("model"), FAMILIES[shape.family].fp16
            if model["dtype"] == "float16":
                assert fp16 == ("rescaled" if "residual_exponent" in model else "plain")
            assert plan.session["loss_scaling"].value == (model["dtype"] == "float16")
            if MACHINES[machine].device == "cuda" and not MACHINES[machine].bf16:
                assert model["dtype"] == ("float32" if fp16 == "never" else "float16")


@pytest.mark.parametrize("changes", [{}, FULL, {"stage": "ppo", "ppo.reward": "./mine.py:score"}])
@pytest.mark.parametrize("name", ["google/gemma-2-2b", "google/gemma-3-1b-it", "google/gemma-3-4b-it"])
def test_fp16_rescaled_is_what_auto_takes_without_bf16(name, changes):
    changes = changes | {"model.name": name}
    by_name = plan_for(changes | {"model.precision": "fp16_rescaled"}, "t4")
    taken = plan_for(changes, "t4")
    for section in ("model", "quantization", "trainer", "session"):
        assert taken.values(section) == by_name.values(section)
    assert taken.values("model")["residual_exponent"] == RESIDUAL_EXPONENT
    assert "residual_exponent" not in plan_for(changes, "a100").model


def test_fp16_rescaled_on_a_cpu_is_for_proofs():
    plan = plan_for({"model.precision": "fp16_rescaled"}, "cpu")
    assert plan.values("model")["residual_exponent"] == RESIDUAL_EXPONENT
    assert any("a hundred times slower" in note for note in plan.notes)


def test_packing_stays_on_without_flash_attention():
    for name, attention in (("google/gemma-2-2b", "eager"), ("google/gemma-3-1b-it", "sdpa")):
        plan = plan_for({"model.name": name, "data.packing": True}, "t4")
        assert plan.values("data")["packing"] and plan.values("model")["attn_implementation"] == attention


@pytest.mark.parametrize(
    ("model", "asked", "machine", "attention"),
    [
        ("google/gemma-3-1b-it", "auto", "rtx4090", "sdpa"),
        ("google/gemma-2-2b", "auto", "rtx4090", "eager"),
        ("google/gemma-4-E4B", "auto", "h100", "sdpa"),
        ("google/gemma-3-1b-it", "eager", "rtx4090", "eager"),
        ("google/gemma-3-1b-it", "flash_attention_2", "a100", "flash_attention_2"),
        ("google/gemma-2-2b", "flash_attention_2", "a100", "flash_attention_2"),
    ],
)
def test_attention(model, asked, machine, attention):
    changes = {"model.name": model} | ({} if asked == "auto" else {"model.attention": asked})
    assert plan_for(changes, machine).values("model")["attn_implementation"] == attention


def test_nf4_with_double_quantisation():
    quantization = plan_for().values("quantization")
    assert quantization["load_in_4bit"] and quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True
    assert "lm_head" in quantization["llm_int8_skip_modules"]
    assert plan_for({"model.double_quantization": False}).values("quantization")["bnb_4bit_use_double_quant"] is False


def test_gemma_3n_keeps_altup_in_16_bits():
    skip = plan_for({"model.name": "google/gemma-3n-E2B"}).values("quantization")["llm_int8_skip_modules"]
    assert any("altup" in module for module in skip)


def test_int8_and_no_quantisation():
    assert plan_for({"model.quantization": "int8"}).values("quantization")["load_in_8bit"] is True
    assert plan_for({"model.quantization": "none"}).quantization == {}


def test_an_adapter_is_a_pattern_of_the_text_decoder():
    lora = plan_for({"model.name": "google/gemma-3-4b-it", "adapter.targets": "mlp"}).values("lora")
    assert lora["target_modules"] == FAMILIES["gemma3"].lora_targets["mlp"]
    assert (lora["bias"], lora["task_type"]) == ("none", "CAUSAL_LM")
    assert plan_for(FULL).lora == {}


@pytest.mark.parametrize(
    ("changes", "machine", "optimizer"),
    [
        ({}, "rtx4090", "adamw_torch_fused"),
        ({}, "cpu", "adamw_torch"),
        (FULL, "rtx4090", "adamw_8bit"),
        (FULL, "cpu", "adamw_torch"),
        ({"optim.optimizer": "adafactor"}, "cpu", "adafactor"),
        (FULL | {"optim.optimizer": "paged_adamw_8bit"}, "h100", "paged_adamw_8bit"),
    ],
)
def test_optimizer(changes, machine, optimizer):
    assert plan_for(changes, machine).values("trainer")["optim"] == optimizer


def test_checkpointing_is_never_reentrant():
    for changes in ({}, {"memory.gradient_checkpointing": True}, {"memory.gradient_checkpointing": False}):
        kwargs = plan_for(changes).values("trainer")["activation_checkpointing_kwargs"]
        assert kwargs == {"use_reentrant": False}


def test_recomputation_only_where_it_is_needed():
    """Gemma 3 1B at 1,024 tokens fits a 24 GB card as it is, Gemma 7B does not."""
    small, large = plan_for(), plan_for({"model.name": "google/gemma-7b", "data.max_length": 2048})
    assert small.values("trainer")["activation_checkpointing"] is False
    assert large.values("trainer")["activation_checkpointing"] is True
    assert "without recomputation 1 row needs" in large.trainer["activation_checkpointing"].reason


def test_small_passes_are_not_bought_by_leaving_recomputation_off():
    """31B with 512 tokens on 40 GB: one row would fit without, which is far too few for a GPU."""
    plan = plan_for({"model.name": "google/gemma-4-12B", "data.max_length": 512, "batch.size": 64}, "l4")
    assert plan.values("trainer")["activation_checkpointing"] is True
    assert plan.values("trainer")["per_device_train_batch_size"] * 512 >= 2048


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", [f"google/gemma-{size}" for size in ("3-270m", "7b", "3-27b-it", "4-E4B")])
def test_the_micro_batch_is_the_largest_that_fits(name, machine):
    plan = plan_for({"model.name": name, "batch.size": 64}, machine)
    memory = MACHINES[machine].memory_bytes
    if plan.refusal:
        assert total(plan.memory) > memory
        return
    trainer, target = plan.values("trainer"), MACHINES[machine]
    micro, share = trainer["per_device_train_batch_size"], 64 // target.world_size
    assert micro & (micro - 1) == 0 and share % micro == 0
    if micro > 1:
        assert total(plan.memory) <= BUDGET * memory
    if share % (2 * micro) == 0 and 2 * micro * 1024 <= MOST_TOKENS[target.device]:
        same = {"memory.gradient_checkpointing": trainer["activation_checkpointing"]}
        doubled = plan_for({"model.name": name, "batch.size": 64, "batch.micro": 2 * micro} | same, machine)
        assert total(doubled.memory) > BUDGET * memory


@given(
    size=st.integers(1, 4096),
    micro=st.integers(1, 64) | st.just("auto"),
    world_size=st.integers(1, 16),
    machine=st.sampled_from(sorted(MACHINES)),
)
def test_batch_arithmetic_multiplies_back(size, micro, world_size, machine):
    shape = PUBLISHED["google/gemma-3-270m"]
    recipe = make_recipe({"model.name": "google/gemma-3-270m", "batch.size": size, "batch.micro": micro})
    try:
        plan = make_plan(recipe, MACHINES[machine], shape, FAMILIES[shape.family], world_size=world_size)
    except UserError as error:
        assert size % (world_size * (1 if micro == "auto" else micro))
        assert "does not divide" in str(error) or "no multiple" in str(error)
        return
    trainer = plan.values("trainer")
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] * world_size == size
    assert micro in ("auto", trainer["per_device_train_batch_size"])


def test_a_batch_that_cannot_be_split():
    with pytest.raises(UserError) as caught:
        accumulation_steps(100, 8, 3)
    assert str(caught.value).splitlines()[0] == (
        "batch.size 100 cannot be split: 3 processes x micro 8 = 24 does not divide 100. Nearest: 96 or 120."
    )
    with pytest.raises(UserError, match=r"8 processes x micro 1 = 8 does not divide 4\. Nearest: 8\."):
        plan_for({"batch.size": 4}, "8xh100")


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 64))
def test_nearest_sizes_can_be_split(size, micro, processes):
    try:
        accumulation_steps(size, micro, processes)
    except UserError as error:
        nearest = str(error).partition("Nearest: ")[2].splitlines()[0].rstrip(".").split(" or ")
        for other in map(int, nearest):
            assert accumulation_steps(other, micro, processes) * micro * processes == other
            assert abs(other - size) < micro * processes


def test_a_named_machine_brings_its_world_size():
    plan = plan_for({"batch.size": 64}, "8xh100")
    assert plan.machine["world_size"] == 8
    trainer = plan.values("trainer")
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 8


def test_idle_gpus_are_mentioned():
    plan = plan_for({"batch.size": 64}, "8xh100", world_size=1)
    assert any("torchrun --nproc-per-node 8" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("changes", "processes"),
    [({"batch.size": 64}, 8), ({"batch.size": 4}, 4), ({"batch.size": 8, "batch.micro": 4}, 2), ({"batch.size": 7}, 7)],
)
def test_a_small_batch_uses_what_gpus_it_can(changes, processes):
    recipe, machine = make_recipe(changes), MACHINES["8xh100"]
    assert most_processes(recipe, machine) == processes
    notes = " ".join(plan_for(changes, machine, world_size=processes).notes)
    assert ("cannot be split over all of them" in notes) == (processes < 8)
    assert ("in passes of batch.micro 4." in notes) == ("batch.micro" in changes)


def test_the_experts_note():
    notes = " ".join(plan_for({"model.name": "google/gemma-4-26B-A4B"}, "h100").notes)
    assert "91% of the weights are experts" in notes and "42.5 GiB" in notes


def test_the_embedding_note():
    notes = plan_for({"model.name": "google/gemma-3-270m"}).notes
    assert any("63% of the weights are embeddings" in note for note in notes)


def test_the_licence_note():
    assert "Gemma Terms of Use" in plan_for().notes[-1]
    assert "Apache-2.0" in plan_for({"model.name": "google/gemma-4-31B"}).notes[-1]


@pytest.mark.parametrize(
    ("changes", "machine", "words"),
    [
        ({"data.holdout": 0}, "rtx4090", "no held-out loss"),
        ({"optim.max_steps": 10, "optim.epochs": 3}, "rtx4090", "max_steps 10 ends the run"),
        ({"model.quantization": "int8"}, "rtx4090", "LLM.int8()"),
        ({"model.name": "google/gemma-3-4b-it"}, "rtx4090", "text_only: true saves up to 0.8 GiB"),
        ({}, "t4", "never ran on t4"),
        ({"model.name": "google/gemma-4-E2B"}, "t4", "overflows fp16"),
        ({"model.precision": "bf16"}, "cpu", "emulates bf16"),
        ({"adapter.dora": True}, "rtx4090", "DoRA with dropout"),
        ({"advanced.trainer": {"neftune_noise_alpha": 5}}, "rtx4090", "neftune_noise_alpha"),
        ({"model.name": "google/gemma-3-27b-it", "data.max_length": 2048}, "l4", "leaves less than a tenth"),
    ],
)
def test_notes(changes, machine, words):
    assert any(words in note for note in plan_for(changes, machine).notes)


def test_a_run_that_fits_is_not_refused():
    plan = plan_for()
    assert plan.refusal == ""
    require_fit(plan)


def test_a_run_that_does_not_fit_names_settings_that_would():
    changes = {"model.name": "google/gemma-3-12b-it", "data.max_length": 2048, "batch.size": 64}
    changes["model.precision"] = "fp32"
    plan = plan_for(changes, "t4")
    with pytest.raises(AccessError, match=r"needs 15\.\d GiB and t4 has 15\.0 GiB") as caught:
        require_fit(plan)
    fix = caught.value.problems[0].fix
    assert fix.count("GiB)") == 3
    for key, value in (("model.text_only", True), ("data.max_length", 1024)):
        assert f"{key}: {json.dumps(value)}" in fix
        assert plan_for(changes | {key: value}, "t4").refusal == "", "the advice must work"


def test_what_fits_no_setting_names_machines():
    plan = plan_for({"model.name": "google/gemma-3-27b-it"}, "t4")
    assert "No setting of this recipe fits it" in plan.refusal and "rtx4090" in plan.refusal
    nothing = plan_for({"model.name": "google/gemma-4-31B", "adapter": None, "model.quantization": "none"}, "h100")
    assert "Settings that would fit: " in nothing.refusal and "model.quantization: nf4" in nothing.refusal


def test_advanced_keywords_are_marked_unchecked():
    plan = plan_for({"advanced.trainer": {"neftune_noise_alpha": 5, "dataloader_num_workers": 2}})
    assert plan.trainer["neftune_noise_alpha"].value == 5
    assert plan.trainer["dataloader_num_workers"].value == 2
    assert plan.trainer["dataloader_num_workers"].reason == "advanced.trainer: unchecked"


def test_reasons_tell_the_recipe_from_defaults():
    plan = plan_for({"optim.weight_decay": 0.0})
    assert plan.trainer["weight_decay"].reason == "recipe"
    assert plan.trainer["max_grad_norm"].reason == "default"


def test_every_choice_has_a_reason_and_the_plan_is_json():
    for changes in ({}, FULL, {"model.quantization": "int8", "tracking.wandb": True}):
        plan = plan_for(changes)
        for section in ("model", "quantization", "lora", "trainer", "data", "session"):
            for key, choice in getattr(plan, section).items():
                assert choice.reason, f"{section}.{key}"
        again = json.loads(json.dumps(plan.to_json(), allow_nan=False))
        assert again["trainer"]["seed"]["value"] == 0


def test_the_plan_is_pure():
    changes = {"data.sources": [{"name": "a.jsonl", "columns": {"messages": "turns"}}]}
    assert plan_for(changes).to_json() == plan_for(changes).to_json()
