"""The loss head on a CPU: exact, over the trained positions only, with the gradient taken in the forward pass.

Gemma's vocabulary makes the output projection the largest product of a small model (58 % of the 270M's forward pass).
TRL's fused head already avoids holding the logits, but on a CPU it scores every position, masked ones too, and
projects three times. A frozen head needs the logits and their gradient with respect to the hidden state once: two
products, both in the forward pass, on the positions that carry loss.

On a GPU TRL's Triton path skips masked positions itself, so it stays in charge there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

# Logits of one tile in fp32 take at most this many bytes; two such buffers live at a time.
TILE_BYTES = 128 * 2**20


class FrozenHeadLogProbs(torch.autograd.Function):
    """log p(label), entropy, top-1 hit and mean logit of each position, and d log p / d hidden, tile by tile.

    Shapes: hidden [T, D], weight [V, D] (frozen), labels [T] int64. Returns log_probs [T] fp32 and entropy [T] fp32
    (nats), which has a gradient only where `with_entropy` asks for it: it costs a third product; and without a gradient
    is_top1 [T] bool and mean_logits [T] fp32 (over the vocabulary, after the soft cap, before the temperature).

    With z = hidden @ weight.T, logits l = c tanh(z / c) where a soft cap c is given (Gemma 2, 3n, 4), temperature t and
    p = softmax(l / t):
    d log p_y / d hidden = sum_v (1[v = y] - p_v) (1 - (l_v / c)^2) weight_v / t,
    d entropy / d hidden = -sum_v p_v (log p_v + entropy) (1 - (l_v / c)^2) weight_v / t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = hidden.shape[0]
        log_probs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        entropy, mean_logits = torch.empty_like(log_probs), torch.empty_like(log_probs)
        is_top1 = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropy_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] and with_entropy else None
        tile = max(1, TILE_BYTES // (4 * weight.shape[0]))
        for start in range(0, tokens, tile):
            part = slice(start, start + tile)
            label = labels[part, None]
            logits = (hidden[part] @ weight.T).float()
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            is_top1[part] = logits.argmax(-1) == label[:, 0]
            mean_logits[part] = logits.mean(-1)
            slope = 1 - (logits / softcap).square_() if softcap is not None and gradient is not None else None
            if temperature != 1.0:
                logits /= temperature
            logits -= logits.logsumexp(-1, keepdim=True)  # log-probabilities from here on
            log_probs[part] = logits.gather(-1, label)[:, 0]
            probs = logits.exp()
            entropy[part] = -torch.bmm(probs[:, None, :], logits[:, :, None])[:, 0, 0]
            if gradient is None:
                continue
            if entropy_gradient is not None:
                weights = (logits + entropy[part, None]).mul_(probs).neg_()
                entropy_gradient[part] = _through(weights, slope, temperature, weight)
            # 1[v = y] - p_v before it is rounded to the weight's type: where p_y is near 1, the difference of two
            # rounded products would be nothing but their rounding.
            weights = probs.neg_().scatter_add_(-1, label, probs.new_ones(label.shape))
            gradient[part] = _through(weights, slope, temperature, weight)
        ctx.save_for_backward(gradient, entropy_gradient)
        ctx.mark_non_differentiable(is_top1, mean_logits, *([] if with_entropy else [entropy]))
        return log_probs, entropy, is_top1, mean_logits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        gradient, entropy_gradient = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None, None
        found = grads[0][:, None] * gradient.float()
        if entropy_gradient is not None:
            found += grads[1][:, None] * entropy_gradient.float()
        return found.to(gradient.dtype), None, None, None, None, None


def _through(
    weights: torch.Tensor, slope: torch.Tensor | None, temperature: float, matrix: torch.Tensor
) -> torch.Tensor:
    """A gradient by the scaled logits [T, V] -> the gradient by the hidden state [T, D]. `weights` is used up."""
    if slope is not None:
        weights *= slope
    if temperature != 1.0:
        weights /= temperature
    return weights.to(matrix.dtype) @ matrix


def head_is_frozen(model: PreTrainedModel) -> bool:
    """Whether `model`'s output projection is a plain frozen matrix on the CPU: the case that this module serves."""
    head = model.get_output_embeddings()
    return (
        isinstance(head, torch.nn.Linear)
        and head.bias is None
        and not head.weight.requires_grad
        and head.weight.device.type == "cpu"
    )


def add_scoring_head(model: PreTrainedModel) -> None:
    """Let a model without a trainer score labels as the trainer of SFT lets its own: TRL's fused head, then ours.

    Args:
        model: the base, without its adapter. Called again, it is scored by the newest head.
    """
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    use_frozen_head(model)


def use_frozen_head(model: PreTrainedModel) -> bool:
    """Let `model(..., labels=..., fused_lm_head=True)` score by `FrozenHeadLogProbs`; call after TRL added its head.

    Returns whether it applies (see `head_is_frozen`); otherwise the model is left as it is.
    """
    if not head_is_frozen(model):
        return False
    fused_by_trl = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    # Keep the class's own signature: `generate` validates its keywords against it.
    @functools.wraps(type(model).forward)
    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        # Experts ask for a balancing loss on top: TRL's forward knows how.
        if not fused_lm_head or labels is None or kwargs.get("output_router_logits"):
            return fused_by_trl(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        scored = FrozenHeadLogProbs.apply(hidden[mask], model.get_output_embeddings().weight, labels[mask], softcap)
        # `masked_scatter` keeps a batch without any trained token connected to the graph, with a zero gradient.
        log_probs, entropy, is_top1, mean = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scored)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            mean_logits=mean,
            label_mask=mask,
        )

    model.forward = forward
    return True
