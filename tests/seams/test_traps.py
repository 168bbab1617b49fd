"""Each defect of the libraries below us: it is still there, and our remedy mends it.

Where the first half of a test fails after an upgrade, the defect is mended upstream: raise the version floor and remove
the remedy (`gemma_tune.models.remedies`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models import remedies
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import adapted_modules, attach
from tests.seams.test_equivalence import adapter_gradients, relative_difference

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def needs_avx512_bf16() -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, where bitsandbytes repacks 4-bit weights")


# --- 1. bitsandbytes loses the gradient after an evaluation pass


def gradients_before_and_after_eval(model: Any, row: torch.Tensor) -> float:
    """Cosine of all adapter gradients of a batch, before and after one forward pass in evaluation mode."""

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model.train()
        model(input_ids=row, labels=row).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=row)
    after = gradients()
    return float(torch.nn.functional.cosine_similarity(before, after, dim=0))


def nf4_with_adapter(folder: Path) -> Any:
    # Wide enough for the CPU kernel, which works on blocks of 32 rows and 64 columns.
    family = FAMILIES["gemma3_text"]
    torch.manual_seed(0)
    base = load_base({"name": str(folder), "dtype": "bfloat16"}, NF4, family)
    lora = {"target_modules": family.lora_targets["all-linear"], "r": 4, "task_type": "CAUSAL_LM"}
    model = attach(base, lora, family)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}


def test_gradients_survive_an_evaluation_pass(tiny: Callable[..., Path]) -> None:
    needs_avx512_bf16()
    from bitsandbytes.nn import Linear4bit

    row = torch.randint(500, 900, (1, 24), generator=torch.Generator().manual_seed(0))
    mended = nf4_with_adapter(tiny("gemma3_text", **WIDE))
    assert gradients_before_and_after_eval(mended, row) > 0.999
    broken = nf4_with_adapter(tiny("gemma3_text", **WIDE))
    for module in broken.modules():
        if isinstance(module, Linear4bit):
            assert module.support_avx512bf16_for_cpu is False
            module.support_avx512bf16_for_cpu = True
    assert gradients_before_and_after_eval(broken, row) < 0.9


def test_importing_bitsandbytes_fetches_no_code() -> None:
    """`kernels` stands in for the package that would download a binary and run it."""
    import subprocess
    import textwrap

    code = textwrap.dedent(
        """
        import sys, types
        asked = []
        module = types.ModuleType("kernels")
        module.get_kernel = lambda *a, **k: asked.append(a) or (_ for _ in ()).throw(RuntimeError("no network"))
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "kernels":
                    from importlib.machinery import ModuleSpec
                    return ModuleSpec(name, self)
            def create_module(self, spec): return module
            def exec_module(self, module): pass
        sys.meta_path.insert(0, Finder())
        if sys.argv[1] == "ours":
            from gemma_tune.models.remedies import import_bitsandbytes
            import_bitsandbytes()
        import bitsandbytes
        print(len(asked))
        """
    )
    needs_avx512_bf16()

    def asked(who: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, who], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert asked("stock") == "1"
    assert asked("ours") == "0"


# --- 2. Gemma 2 and sdpa


def test_gemma_2_refuses_sdpa(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_pretrained(tiny("gemma2"), attn_implementation="sdpa")
    with pytest.raises(UserError, match="Gemma 2 does not work with attention 'sdpa'") as error:
        load_base({"name": str(tiny("gemma2")), "attn_implementation": "sdpa"}, {}, FAMILIES["gemma2"])
    assert "eager" in error.value.problems[0].fix
    default = load_base({"name": str(tiny("gemma2")), "dtype": "float32"}, {}, FAMILIES["gemma2"])
    assert default.config._attn_implementation == "eager"


# --- 3. The claim that breaks gradient accumulation. The trainer's half is tested with the trainer.


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified", "gemma3", "gemma4_text", "gemma3n_text", "gemma1"])
def test_the_family_knows_what_the_class_claims(name: str, tiny: Callable[..., Path]) -> None:
    model = load_base({"name": str(tiny(name)), "dtype": "float32"}, {}, FAMILIES[name])
    assert getattr(model, "accepts_loss_kwargs", True) is FAMILIES[name].accepts_loss_kwargs


# --- 4. Reentrant checkpointing where layers share keys and values


@pytest.mark.parametrize("name", ["gemma4", "gemma3n_text"])
def test_reentrant_checkpointing_is_wrong_on_shared_keys_and_values(name: str, tiny: Callable[..., Path]) -> None:
    plain = adapter_gradients(tiny(name), name, None)
    reentrant = adapter_gradients(tiny(name), name, {"use_reentrant": True}, remedy=False)
    assert relative_difference(reentrant, plain) > 0.05
    with pytest.raises(UserError, match="reentrant"):
        adapter_gradients(tiny(name), name, {"use_reentrant": True})


def test_reentrant_checkpointing_is_left_alone_where_it_is_right(tiny: Callable[..., Path]) -> None:
    plain = adapter_gradients(tiny("gemma3_text"), "gemma3_text", None)
    reentrant = adapter_gradients(tiny("gemma3_text"), "gemma3_text", {"use_reentrant": True})
    assert relative_difference(reentrant, plain) < 1e-5


# --- 5. LoRA targets


def test_name_lists_fail_and_all_linear_leaks_on_multimodal_gemma_4(tiny: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def stock() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny("gemma4"))

    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        get_peft_model(stock(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    leaked = get_peft_model(stock(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any(remedies.is_tower(name) for name in adapted_modules(leaked))


@pytest.mark.parametrize("preset", ["all-linear", "attention", "mlp"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_moe", "gemma4_unified", "gemma3n_text"])
def test_our_targets_stay_in_the_text_decoder(name: str, preset: str, tiny: Callable[..., Path]) -> None:
    family = FAMILIES["gemma4" if name == "gemma4_moe" else name]
    model = load_base({"name": str(tiny(name)), "dtype": "float32"}, {}, family)
    adapted = attach(model, {"target_modules": family.lora_targets[preset], "r": 2, "task_type": "CAUSAL_LM"}, family)
    modules = [name.removeprefix("base_model.model.") for name in adapted_modules(adapted)]
    assert all(module.startswith(f"{family.adapter_prefix}.") for module in modules)
    kinds = {module.rsplit(".", 1)[1] for module in modules}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert kinds == {"all-linear": attention | mlp, "attention": attention, "mlp": mlp}[preset]


def test_a_pattern_that_reaches_a_tower_is_refused(tiny: Callable[..., Path]) -> None:
    model = load_base({"name": str(tiny("gemma3")), "dtype": "float32"}, {}, FAMILIES["gemma3"])
    with pytest.raises(GemmaTuneError, match="reached into a tower"):
        attach(model, {"target_modules": r".*\.q_proj", "task_type": "CAUSAL_LM"}, FAMILIES["gemma3"])


# --- 6. Gemma 3n's AltUp


def test_altup_is_quantised_unless_it_is_named(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    family = FAMILIES["gemma3n_text"]
    folder = tiny("gemma3n_text")
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4))
    assert type(stock.model.layers[0].altup.prediction_coefs).__name__ == "Linear4bit"
    with pytest.raises(GemmaTuneError, match="altup"):
        remedies.check_quantised_modules(stock, family)
    with pytest.raises(RuntimeError, match="unsigned char"):
        stock.train()(input_ids=torch.arange(500, 520)[None])
    mended = load_base({"name": str(folder), "dtype": "bfloat16"}, NF4, family)
    assert type(mended.model.layers[0].altup.prediction_coefs).__name__ == "Linear"
    assert type(mended.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    row = torch.arange(500, 520)[None]
    assert torch.isfinite(mended.train()(input_ids=row, labels=row).loss)


# --- torch copies the head's weight once for each prompt of a batch


def products_of_the_head(model: Any, rows: int) -> set[str]:
    """Names of the matrix products that the logits of the last position of `rows` prompts are made with."""
    from torch.profiler import ProfilerActivity, profile

    head = model.get_output_embeddings()
    hidden = torch.randn(rows, 7, head.in_features, dtype=head.weight.dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        head(hidden[:, -1:])
    return {event.key for event in seen.key_averages()} & {"aten::bmm", "aten::mm", "aten::addmm"}


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_is_not_copied_for_each_prompt_of_a_batch(tiny: Callable[..., Path], rows: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("gemma3_text")
    stock = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    assert products_of_the_head(stock, rows) == {"aten::bmm"}, "mended in torch: drop the remedy"
    ours = load_base({"name": str(folder), "dtype": "float32"}, {}, FAMILIES["gemma3_text"]).requires_grad_(False)
    assert "aten::bmm" not in products_of_the_head(ours, rows)
    hidden = torch.randn(rows, 7, ours.config.hidden_size)
    torch.testing.assert_close(ours.lm_head(hidden[:, -1:]), stock.lm_head(hidden[:, -1:]))


# --- Eager attention in fp16: mask and score add up to minus infinity, and a padded row to NaN


def shunning(model: Any) -> Any:
    """`model` with queries that point away from the keys of their own token: rows of the same token score low."""
    for layer in model.model.layers:
        attention = layer.self_attn
        heads = attention.k_proj.weight.data.unflatten(0, (-1, attention.head_dim))
        wanted = attention.q_proj.weight.shape[0] // attention.head_dim // heads.shape[0]
        attention.q_proj.weight.data = -8 * heads.repeat_interleave(wanted, 0).flatten(0, 1)
    return model


def test_left_padding_does_not_become_nan_in_fp16(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder, family = tiny("gemma2"), FAMILIES["gemma2"]
    given = {"input_ids": torch.full((1, 6), 500), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(shunning(model)(**given).logits[0, 2:]).float()

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager")
    assert logits(stock).isnan().all(), "mended in transformers: drop the remedy"
    for dtype in ("float16", "float32"):
        found = logits(load_base({"name": str(folder), "dtype": dtype}, {}, family))
        exact = logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float())
        torch.testing.assert_close(found, exact, rtol=0.02, atol=0.05 if dtype == "float16" else 0)
