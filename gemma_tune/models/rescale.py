"""The residual stream of Gemma 2 and 3, made small enough for fp16 without changing what the model computes.

What runs along Gemma's layers grows to 103,821 in the real Gemma 3 270M; fp16 ends at 65,504. Nothing reads the stream
but RMS norms, and an RMS norm gives the same for x and for s x, once its eps is multiplied by s^2. What is added to the
stream are the embedding and the outputs of two more norms a layer: multiply these by s, and every layer sees what it
saw before. With s a power of two the only difference is in where numbers are rounded to zero: in fp32 logits and
gradients stay the same to the bit.

Weights, saved buffers and config stay as they are: two kinds of forward hooks, and attributes of norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.gemma.families import Family

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

READS = ("input_layernorm", "pre_feedforward_layernorm")
"""Norms of a layer that read the stream."""
WRITES = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Norms of a layer whose outputs are added to it."""


def rescale_residual(model: PreTrainedModel, family: Family, exponent: int) -> None:
    """Let the residual stream of `model` be 2^exponent times what it was, with the same outputs.

    Works through generation, gradient checkpointing, adapters on the linear layers, and images (what the projector adds
    to the stream is multiplied too). Hidden states between layers (`output_hidden_states`) are the small ones.

    Args:
        model: of `load_base`, without adapters.
        family: its generation, with `fp16 == "rescaled"`.
        exponent: negative, as the plan's `residual_exponent`.

    Raises:
        GemmaTuneError: the model has not the structure that this is exact for. Nothing was changed then.
    """
    if family.fp16 != "rescaled":
        raise GemmaTuneError(f"the residual stream of {family.label} cannot be rescaled: this is a bug")
    scale = 2.0**exponent
    decoder: Any = model.get_submodule(family.adapter_prefix.rpartition(".")[0])
    embeddings = decoder.embed_tokens
    if hasattr(embeddings, "_gemma_tune_scale"):
        raise GemmaTuneError("the residual stream is rescaled already: this is a bug")
    norms = dict(_norms(decoder))
    embeddings._gemma_tune_scale = scale
    embeddings.register_forward_hook(lambda _, inputs, output: output * scale)
    for name, norm in norms.items():
        if name.endswith(WRITES):
            _scale_output(norm, scale)
        else:
            norm.eps *= scale * scale
    trunk: Any = model.base_model
    if trunk is not decoder:
        trunk.multi_modal_projector.register_forward_hook(lambda _, inputs, output: output * scale)
    trunk.register_forward_pre_hook(_only_what_was_changed(decoder, embeddings, norms), with_kwargs=True)


def _norms(decoder: Any) -> Iterator[tuple[str, Any]]:
    """Name -> norm of the stream: four a layer and the last one."""
    for number, layer in enumerate(decoder.layers):
        for name in (*READS, *WRITES):
            yield f"layers.{number}.{name}", _checked(getattr(layer, name, None), f"layers.{number}.{name}")
    yield "norm", _checked(getattr(decoder, "norm", None), "norm")


def _checked(norm: Any, name: str) -> Any:
    """The norm, if it computes `_norm(x.float()) * (1 + weight)` with its attribute `eps`: shown on two vectors.

    Another implementation of its forward pass (Liger's, a kernel of the hub) may look at neither.
    """
    if norm is None or not callable(getattr(norm, "_norm", None)) or not isinstance(getattr(norm, "eps", None), float):
        raise _other(name, "there is no such norm with `_norm` and `eps`")
    import torch

    weight = norm.weight.detach().float()
    probe = torch.linspace(-1, 1, weight.shape[0], device=weight.device, dtype=torch.float32)
    for one in (probe, probe * 1e-3):
        expected = one * torch.rsqrt(one.square().mean() + norm.eps) * (1 + weight)
        with torch.no_grad():
            found = norm(one)
        if not torch.allclose(found, expected, rtol=1e-5, atol=1e-7):
            raise _other(name, "it is not x / sqrt(mean(x^2) + eps) * (1 + weight)")
    return norm


def _other(name: str, why: str) -> GemmaTuneError:
    return GemmaTuneError(
        f"{name}: {why}; the installed transformers has another Gemma than this rescaling is exact for",
        where="model.precision",
        fix="set model.precision: fp32, and report it",
    )


def _scale_output(norm: Any, scale: float) -> None:
    """In fp32, before the weight and before the cast: what comes out would overflow fp16 by itself in some layers."""
    plain = norm._norm

    def scaled(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = plain(x) * scale
        return found

    norm._norm = scaled


def _only_what_was_changed(decoder: Any, embeddings: nn.Module, norms: dict[str, Any]) -> Any:
    """A hook before the trunk, which refuses embeddings that do not come out of the hooked module, and other norms.

    Liger (monkey_patch.py, `_patch_rms_norm_module`) and kernels of the hub give a norm of a loaded model another
    `forward`, which does not call `_norm`: what the layers add to the small stream would be large again.
    """
    import torch

    ours = {name: (norm, vars(norm).get("forward"), vars(norm).get("_norm")) for name, norm in norms.items()}

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if decoder.embed_tokens is not embeddings:
            raise UserError(
                "the embedding was replaced, or has an adapter on it, after the residual stream was rescaled",
                where="model.precision",
                fix="set model.precision: fp32, or keep adapters off embed_tokens",
            )
        if kwargs.get("inputs_embeds") is not None:
            raise UserError(
                "with a rescaled residual stream the model takes token ids, and no embeddings (inputs_embeds)",
                where="model.precision",
                fix="pass input_ids, or set model.precision: fp32",
            )
        if torch.compiler.is_compiling():
            return
        for name, (norm, forward, inner) in ours.items():
            if vars(norm).get("forward") is not forward or vars(norm).get("_norm") is not inner:
                raise UserError(
                    f"{name} was given another forward pass after the residual stream was rescaled",
                    where="model.precision",
                    fix="remove advanced.trainer.use_liger_kernel, or set model.precision: fp32",
                )

    return check
