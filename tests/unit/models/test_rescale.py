"""A smaller residual stream: the same model, in fp32 up to nothing, and finite in fp16 where the plain one is not."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.gemma.families import FAMILIES, RESIDUAL_EXPONENT
from gemma_tune.models.load import load_base
from gemma_tune.models.rescale import rescale_residual
from gemma_tune.models.saved import load_run
from gemma_tune.train.loss_scaling import INITIAL
from tests.half_products import HalfProducts
from tests.tiny import make_tiny

RESCALED = [name for name in FAMILIES if FAMILIES[name].fp16 == "rescaled"]
OTHERS = ["gemma1", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rescale")
    for name in (*RESCALED, *OTHERS):
        make_tiny(name, root / name)
    return root


def opened(folder: Path, name: str, exponent: int = 0, **keywords: Any) -> Any:
    model = {"name": str(folder / name), "dtype": "float32", "residual_exponent": exponent} | keywords
    return load_base(model, {}, FAMILIES[name], device="cpu")


def batch(rows: int = 2, length: int = 24, padded: int = 3) -> dict[str, torch.Tensor]:
    """Rows of text; the first one is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(400, 1000, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(model: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(**given).logits.float()
    # No loss at padding, as in training: its embedding is zero here, where the slope of an RMS norm is 1 / sqrt(eps).
    labels = given["input_ids"][:, 1:].masked_fill(given["attention_mask"][:, :-1] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()), logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in RESCALED for kind in FAMILIES[name].attention if kind != "flash_attention_2"],
)
@pytest.mark.parametrize("exponent", [RESIDUAL_EXPONENT, -6])
def test_logits_and_gradients_are_the_same(name: str, attention: str, exponent: int, folders: Path) -> None:
    plain = opened(folders, name, attn_implementation=attention)
    small = opened(folders, name, exponent, attn_implementation=attention)
    found = []
    for model in (plain, small):
        model.train()
        loss, logits = loss_of(model, batch())
        loss.backward()
        found.append((logits.detach(), gradients(model)))
    (logits, grads), (small_logits, small_grads) = found
    assert torch.equal(logits, small_logits), "a power of two moves no bit of fp32"
    assert grads.keys() == small_grads.keys() and len(grads) > 20
    for key, gradient in grads.items():
        assert torch.equal(gradient, small_grads[key]), key


@pytest.mark.parametrize("name", RESCALED)
def test_the_stream_is_small_and_hidden_states_are_not(name: str, folders: Path) -> None:
    plain, small = opened(folders, name), opened(folders, name, -4)
    streams: list[list[torch.Tensor]] = []
    for model in (plain, small):
        seen: list[torch.Tensor] = []
        for module in model.modules():
            if type(module).__name__ == FAMILIES[name].decoder_layer:
                module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        with torch.no_grad():
            last = model.base_model(**batch()).last_hidden_state
        streams.append([*seen, last])
    for one, other in zip(streams[0][:-1], streams[1][:-1], strict=True):
        assert torch.equal(one / 16, other)
    assert torch.equal(streams[0][-1], streams[1][-1]), "what heads read is as it was"


@pytest.mark.parametrize("name", RESCALED)
def test_generation_with_a_cache_and_recomputation_are_the_same(name: str, folders: Path) -> None:
    plain, small = opened(folders, name), opened(folders, name, RESIDUAL_EXPONENT)
    texts = [model.generate(**batch(), max_new_tokens=8, do_sample=False) for model in (plain, small)]
    assert torch.equal(*texts)
    found = []
    for model in (plain, small):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss_of(model, batch())[0].backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_images_enter_at_the_same_size(folders: Path) -> None:
    """What the projector puts into the stream is scaled as the embedding is."""
    given = batch(rows=1, padded=0)
    given["input_ids"][0, 4:8] = 172  # four soft tokens an image
    given["token_type_ids"] = (given["input_ids"] == 172).long()
    given["pixel_values"] = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, small = (opened(folders, "gemma3", exponent)(**given).logits for exponent in (0, RESIDUAL_EXPONENT))
        without = opened(folders, "gemma3")(**{key: value for key, value in given.items() if key != "pixel_values"})
    assert torch.equal(plain, small)
    assert not torch.allclose(plain, without.logits, atol=1e-2), "the image changes something"


@pytest.mark.parametrize("name", RESCALED)
def test_what_is_saved_is_unchanged(name: str, folders: Path, tmp_path: Path) -> None:
    plain, small = opened(folders, name), opened(folders, name, RESIDUAL_EXPONENT)
    before, after = plain.state_dict(), small.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert {key for key, _ in plain.named_buffers()} == {key for key, _ in small.named_buffers()}
    assert plain.config.to_dict() == small.config.to_dict()
    plain.save_pretrained(tmp_path / "plain")
    small.save_pretrained(tmp_path / "small")
    for file in sorted(path.name for path in (tmp_path / "plain").iterdir()):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "small" / file).read_bytes(), file


def test_an_adapter_merges_to_the_same_weights(folders: Path) -> None:
    from peft import LoraConfig, get_peft_model

    merged = []
    for exponent in (0, RESIDUAL_EXPONENT):
        base = opened(folders, "gemma3_text", exponent)
        torch.manual_seed(0)
        targets = FAMILIES["gemma3_text"].lora_targets["all-linear"]
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            logits = model(**batch()).logits
        whole: Any = model.merge_and_unload()
        merged.append((logits, whole.state_dict(), whole(**batch()).logits))
    (logits, weights, after), (small, small_weights, small_after) = merged
    assert torch.equal(logits, small) and torch.equal(after, small_after)
    assert all(torch.equal(weights[key], small_weights[key]) for key in weights)


def loud(folder: Path, name: str, dtype: str, exponent: int) -> Any:
    """A tiny Gemma whose stream is larger than fp16: the weights of its last post-norms are."""
    model = opened(folder, name, exponent, dtype=dtype)
    with torch.no_grad():
        for layer in model.get_submodule(FAMILIES[name].adapter_prefix):
            layer.post_feedforward_layernorm.weight.fill_(20_000)
    return model


@pytest.mark.parametrize("name", RESCALED)
def test_fp16_is_finite_where_plain_fp16_is_not(name: str, folders: Path) -> None:
    found = {}
    for dtype, exponent in (("float32", 0), ("bfloat16", 0), ("float16", 0), ("float16", RESIDUAL_EXPONENT)):
        with torch.no_grad(), HalfProducts():
            found[dtype, exponent] = loss_of(loud(folders, name, dtype, exponent), batch())[1][1]
    exact = found["float32", 0]
    distance = {key: float((value - exact).norm() / exact.norm()) for key, value in found.items()}
    assert not torch.isfinite(found["float16", 0]).all()
    assert distance["float16", RESIDUAL_EXPONENT] < distance["bfloat16", 0] / 2


@pytest.mark.parametrize("name", RESCALED)
def test_fp32_masters_under_autocast_are_finite_too(name: str, folders: Path) -> None:
    """A full fine-tune: the stream is fp32, what the norms add to it is fp16."""
    found = []
    for dtype, exponent in (("float32", 0), ("autocast", 0), ("autocast", RESIDUAL_EXPONENT)):
        model = loud(folders, name, "float32", exponent)
        with torch.autocast("cpu", torch.float16, enabled=dtype == "autocast"), HalfProducts():
            loss, logits = loss_of(model, batch())
            (loss * INITIAL).backward()
        found.append((logits[1].detach(), gradients(model)))
    (exact, grads), (plain, _), (small, small_grads) = found
    assert not torch.isfinite(plain).all()
    assert float((small - exact).norm() / exact.norm()) < 0.02
    for key, gradient in grads.items():
        assert float((small_grads[key] - gradient).norm()) < 0.1 * float(gradient.norm()) + 1e-6, key


@pytest.mark.parametrize("name", OTHERS)
def test_other_generations_are_refused(name: str, folders: Path) -> None:
    with pytest.raises(GemmaTuneError, match="cannot be rescaled"):
        opened(folders, name, RESIDUAL_EXPONENT)


def test_another_structure_is_refused(folders: Path) -> None:
    family = FAMILIES["gemma3_text"]

    def refused(model: Any, words: str) -> None:
        before = copy.deepcopy(model)
        with pytest.raises(GemmaTuneError, match=words):
            rescale_residual(model, family, RESIDUAL_EXPONENT)
        assert model.model.norm.eps == before.model.norm.eps, "nothing was changed"

    model = opened(folders, "gemma3_text")
    del model.model.layers[1].post_feedforward_layernorm
    refused(model, r"layers\.1\.post_feedforward_layernorm")
    model = opened(folders, "gemma3_text")
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])
    refused(model, r"layers\.0\.input_layernorm: it is not x / sqrt")
    with pytest.raises(GemmaTuneError, match="rescaled already"):
        rescale_residual(opened(folders, "gemma3_text", RESIDUAL_EXPONENT), family, RESIDUAL_EXPONENT)


@pytest.mark.parametrize("name", RESCALED)
def test_foreign_embeddings_are_refused(name: str, folders: Path) -> None:
    model = opened(folders, name, RESIDUAL_EXPONENT)
    embedded = model.get_input_embeddings()(batch()["input_ids"])
    with pytest.raises(UserError, match="inputs_embeds"):
        model(inputs_embeds=embedded)
    model.set_input_embeddings(torch.nn.Embedding(1024, embedded.shape[-1]))
    with pytest.raises(UserError, match="was replaced"):
        model(**batch())


@pytest.mark.parametrize("norm", ["input_layernorm", "post_feedforward_layernorm"])
def test_a_norm_that_liger_replaces_is_noticed(norm: str, folders: Path) -> None:
    """As its `_patch_rms_norm_module` does it in a loaded model: bound to the instance, past `_norm`."""
    model = opened(folders, "gemma3_text", RESIDUAL_EXPONENT)
    one = getattr(model.model.layers[1], norm)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    one.__dict__["forward"] = forward.__get__(one)
    with pytest.raises(UserError, match=f"{norm} was given another forward pass"):
        model(**batch())


def test_a_full_fine_tune_opens_as_it_was_trained(folders: Path, tmp_path: Path) -> None:
    """Its weights are fp32. Its evaluation runs under the autocast of its training, where the plain model overflows."""
    loud(folders, "gemma3_text", "float32", 0).save_pretrained(tmp_path / "model")
    for file in (folders / "gemma3_text").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    chosen = {"dtype": "float32", "residual_exponent": RESIDUAL_EXPONENT}
    plan = {"model": {key: {"value": value, "reason": "test"} for key, value in chosen.items()}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model = load_run(tmp_path)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.float16), HalfProducts():
        assert torch.isfinite(model(**batch()).logits[1]).all()
    assert not hasattr(load_run(tmp_path, dtype="bfloat16")[0].model.embed_tokens, "_gemma_tune_scale")


def test_resizing_the_embedding_is_noticed_or_right(folders: Path) -> None:
    plain, small = opened(folders, "gemma3_text"), opened(folders, "gemma3_text", RESIDUAL_EXPONENT)
    for model in (plain, small):
        torch.manual_seed(0)
        model.resize_token_embeddings(1030, mean_resizing=False)
    with torch.no_grad():
        assert torch.equal(plain(**batch()).logits[..., :1024], small(**batch()).logits[..., :1024])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["mm", "addmm", "bmm", "baddbmm", "sdpa"])
def test_half_products_are_those_of_native_halves(case: str, dtype: torch.dtype) -> None:
    """To one rounding: native kernels of this CPU may add up in another order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    functions: dict[str, Any] = {
        "mm": (torch.mm, draw(5, 64), draw(64, 7)),
        "addmm": (torch.addmm, draw(5, 7), draw(5, 64), draw(64, 7)),
        "bmm": (torch.bmm, draw(2, 5, 64), draw(2, 64, 7)),
        "baddbmm": (torch.baddbmm, draw(2, 5, 7), draw(2, 5, 64), draw(2, 64, 7)),
        "sdpa": (torch.nn.functional.scaled_dot_product_attention, *(draw(1, 2, 8, 16) for _ in range(3))),
    }
    function, *inputs = functions[case]
    weights = draw(*function(*inputs).shape).detach()
    native = function(*inputs), *torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    with HalfProducts() as mode:
        found = function(*inputs), *torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    assert mode.products
    step = torch.finfo(dtype).eps
    for one, other in zip((part.detach() for part in native), (part.detach() for part in found), strict=True):
        assert other.dtype == dtype
        close = 4 if case == "sdpa" else 1  # attention rounds its weights in between
        assert torch.allclose(one.float(), other.float(), rtol=close * step, atol=close * step * float(one.abs().max()))
