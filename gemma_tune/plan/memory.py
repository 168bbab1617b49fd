"""What a run will need of one device's memory, term by term.

An estimate by arithmetic: nothing is loaded. What is kept for the backward pass was checked against the tensors that
autograd really saves (tests/seams/test_memory_terms.py); what could only be assumed says "assumption" in its formula.

Units are bytes. `d` is the size of the compute type: 2 for bf16 and fp16, 4 for fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import Layer, Parameters, Shape, count, layers_of
from gemma_tune.plan.gathered import constants_bytes, gathered, packed_bytes, part
from gemma_tune.plan.machine import GIB, MIB
from gemma_tune.plan.stages import has_reference
from gemma_tune.plan.types import MemoryTerm
from gemma_tune.plan.workload import Roles, Workload

# TRL 1.16 scores tiles of 4,096 tokens x 32,768 words (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
HEAD_TOKENS = 4096
HEAD_WORDS = 32_768
# Our head, for a CPU and for PPO, holds about three fp32 buffers of 128 MiB (train/loss_head.py).
CPU_HEAD_BYTES = 3 * 128 * MIB

# Bytes that an optimizer keeps a trained parameter. 8-bit: two states of one byte and an fp32 constant for 256 values.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
}

# The CUDA context (0.7 to 0.8 GB in PyTorch's forum, threads 73021 and 81330), cuBLAS's workspace, and what the
# caching allocator loses to rounding and fragments.
CUDA_OVERHEAD = GIB
# Measured on Linux with the 270M: 0.5 GiB after importing torch 2.13, transformers 5.23 and trl 1.16, and 0.7 GiB for
# Gemma's tokenizer and the data; 0.5 GiB is what the C library's heap keeps of freed pieces. Peaks of whole runs then
# agree within 10 % (tests/unit/plan/test_memory.py).
CPU_OVERHEAD = 7 * GIB // 4


def estimate(shape: Shape, work: Workload) -> tuple[MemoryTerm, ...]:
    """The memory of one process at its peak: the backward pass of an optimizer step, or a rollout where that is larger.

    The reference of DPO, KTO and PPO adds no term but its adapter: its forward pass keeps nothing and is over before
    the backward pass, whose passing buffers are larger. So it is with KTO's KL rows, as many and as long as the trained
    ones, which go through policy and reference without a gradient. Policy and critic of PPO go backward one after the
    other, the policy with the larger head. Terms of 0 bytes are left out.

    Where the model is sharded, a process holds a part of weights, states and gradients, and whole layers for a while.
    """
    parameters = count(shape)
    weights = _weights(parameters, shape, work)
    constants = [_constants(parameters, work)] if work.shards else []
    terms = [
        *constants,
        *([part(term, work) for term in weights] if work.shards else weights),
        *_training(parameters, shape, work),
        *gathered(shape, parameters, work),
        *(_roles(parameters, shape, work, work.roles) if work.roles else ()),
        *max(phases(shape, work).values(), key=total),
        _overhead(work),
    ]
    return tuple(term for term in [*terms, _loading([*constants, *weights], terms, work)] if term.bytes)


def _constants(parameters: Parameters, work: Workload) -> MemoryTerm:
    """NF4's constants stand beside the packed tensor, and every process has all of them."""
    each, formula = constants_bytes(work)
    size = parameters.linear * each
    return _term("constants of NF4", size, f"{parameters.linear:,} x {formula}, whole on each process")


def _loading(weights: list[MemoryTerm], terms: list[MemoryTerm], work: Workload) -> MemoryTerm:
    """What loading needs above the peak of a step: a process that quantises has the whole model before it has a part.

    So it is on a CPU. Other weights are read into the computer's memory by each process, and go to the GPU in parts.
    """
    whole = work.quantization != "none" or work.device == "cpu"
    more = total(weights) + _overhead(work).bytes - total(terms) if work.shards and whole else 0
    why = "above the peak of a step: each process loads the whole model, then keeps a part"
    return _term("loading", max(0, more), why)


def phases(shape: Shape, work: Workload) -> dict[str, list[MemoryTerm]]:
    """What is held for a while beside the weights: in a pass of the training, and in a rollout of PPO. Never both."""
    head = _reward_head(shape, work) if work.stage == "reward" else _loss_head(shape, work)
    found = {"training": [*_activations(shape, work), head, _workspace(shape, work, work.tokens)]}
    if work.roles:
        found["rollout"] = _rollout(shape, work, work.roles)
    return found


def total(terms: Iterable[MemoryTerm]) -> int:
    """Bytes of all terms together."""
    return sum(term.bytes for term in terms)


def linear_bytes(work: Workload) -> tuple[float, str]:
    """Bytes of one weight in a linear layer of the decoder, and the formula."""
    if work.quantization == "nf4":
        each = packed_bytes(work) + constants_bytes(work)[0]
        if work.double_quantization:
            return each, "(1/2 + 1/64 + 4/(64 x 256)) B: NF4, its constants quantised again"
        return each, "(1/2 + 4/64) B: NF4 with fp32 constants"
    if work.quantization == "int8":
        return 1.0, "1 B: int8"
    return float(work.weight_bytes), f"{work.weight_bytes} B"


def _term(name: str, size: float, formula: str) -> MemoryTerm:
    return MemoryTerm(name, round(size), formula)


def _weights(parameters: Parameters, shape: Shape, work: Workload) -> list[MemoryTerm]:
    each, formula = linear_bytes(work)
    if work.shards:  # their constants are a term of their own, which is not shared
        each, formula = packed_bytes(work), f"{packed_bytes(work):g} B"
    wide = work.weight_bytes
    plain = f"x {wide} B"
    terms = [_term("linear layers", parameters.linear * each, f"{parameters.linear:,} x {formula}")]
    if work.quantization == "int8":
        rows = sum(outputs for layer in layers_of(shape) for _, outputs in _projections(shape, layer))
        terms.append(_term("scales of int8 rows", 4 * rows, f"{rows:,} rows x 4 B"))
    why = ", never quantised" if work.quantization != "none" else ""
    for name, size in (
        ("embedding and head" if not shape.tied else "embedding (also the head)", parameters.embedding),
        ("per-layer embedding", parameters.per_layer_embedding),
        ("experts", parameters.experts),
        ("norms and small layers", parameters.norms_and_rest),
    ):
        terms.append(_term(name, size * wide, f"{size:,} {plain}{why}"))
    towers = parameters.towers or 0
    upper = ", at most: what of them is linear is quantised too" if work.quantization != "none" else ""
    terms.append(_term("vision and audio towers", towers * wide, f"{towers:,} {plain}{upper}"))
    return terms


def trained_parameters(parameters: Parameters, work: Workload) -> int:
    """Parameters that receive gradients: the adapter, or the text decoder (towers stay frozen)."""
    return work.rank * parameters.lora_per_rank[work.targets] if work.rank else parameters.text


def _training(parameters: Parameters, shape: Shape, work: Workload) -> list[MemoryTerm]:
    trained = trained_parameters(parameters, work)
    what = "adapter" if work.rank else "model"
    held = []
    if work.rank:
        pairs = parameters.lora_per_rank[work.targets]
        held.append(_term("adapter", 4 * trained, f"r {work.rank} x {pairs:,} x 4 B: fp32"))
    if work.frozen_rank:
        pairs = parameters.lora_per_rank[work.frozen_targets]
        why = "the reference, as the training began" if has_reference(work.stage) else "what the new adapter stands on"
        formula = f"r {work.frozen_rank} x {pairs:,} x 4 B: {why}; no gradient, no state"
        held.append(_term("frozen adapter", 4 * work.frozen_rank * pairs, formula))
    held.append(_term(f"gradients of the {what}", 4 * trained, f"{trained:,} x 4 B: fp32"))
    if work.optimizer == "adafactor":
        # A row and a column of statistics a matrix, instead of the matrix.
        factored = trained / (work.rank or shape.hidden / 2)
        held.append(_term("optimizer state", 4 * factored, f"{round(factored):,} x 4 B: rows and columns (adafactor)"))
    else:
        held.append(_optimizer_state(parameters, trained, work))
    if work.shards:
        return [*(part(term, work) for term in held), *_summed_up(trained, work)]
    if not work.rank and work.autocast:
        copies = parameters.linear + parameters.experts
        held.append(_term("weights in compute type", work.compute_bytes * copies, f"{copies:,} x d: autocast's copies"))
    if work.world_size > 1:
        what = "all of them as one tensor" if work.roles else "what DistributedDataParallel sends"
        held.append(_term("gradient buckets", 4 * trained, f"{trained:,} x 4 B: {what}"))
    return held


def _summed_up(trained: int, work: Workload) -> list[MemoryTerm]:
    """An adapter's gradients are sent once a step, and are whole until then; those of all weights after each pass."""
    if not work.rank:
        return []
    formula = f"{trained:,} x 4 B: summed up over the passes of a step, then sent"
    return [_term("gradients before they are sent", 4 * trained, formula)]


def _roles(parameters: Parameters, shape: Shape, work: Workload, roles: Roles) -> list[MemoryTerm]:
    """Critic and reward models of PPO, on the base that the policy has: an adapter and a scalar head each."""
    head = shape.hidden + 1
    terms = []
    if roles.critic:
        pairs = parameters.lora_per_rank[roles.critic_targets]
        trained = roles.critic_rank * pairs + head
        what = f"r {roles.critic_rank} x {pairs:,} + {head:,}" if roles.critic_rank else f"{head:,}, a head alone,"
        if work.optimizer == "adafactor":
            rows = head + (pairs if roles.critic_rank else 0)
            state, why = 4.0 * rows, f"{rows:,} x 4 B: rows and columns (adafactor)"
        else:
            each = OPTIMIZER_BYTES[work.optimizer]
            state, why = each * trained, f"{trained:,} x {each:.4g} B: two moments ({work.optimizer})"
        terms += [
            _term("critic", 4 * trained, f"({what}) x 4 B: fp32"),
            _term("gradients of the critic", 4 * trained, f"{trained:,} x 4 B: fp32"),
            _term("optimizer state of the critic", state, why),
        ]
        if work.world_size > 1:
            formula = f"{trained:,} x 4 B: all of them as one tensor"
            terms.append(_term("gradient buckets of the critic", 4 * trained, formula))
    ranks = ", ".join(str(rank) for rank, _ in roles.rewards)
    held = sum(rank * parameters.lora_per_rank[targets] + head for rank, targets in roles.rewards)
    formula = f"{held:,} x 4 B: adapters of r {ranks} and their heads, frozen"
    terms.append(_term("reward models", 4 * held, formula))
    return terms


def _rollout(shape: Shape, work: Workload, roles: Roles) -> list[MemoryTerm]:
    """What drawing responses holds at its largest: the cache when they are longest, and the buffers of the prompts."""
    each = cache_bytes(shape, work.length, work.compute_bytes)
    formula = f"{roles.together} responses x {each:,} B: keys and values of {work.length} tokens"
    if shape.sliding_window is not None and work.length > shape.sliding_window:
        formula += f", of the last {shape.sliding_window} in sliding layers"
    # The logits in d, in fp32, divided by the temperature, and their softmax (transformers 5.23, `_sample`).
    logits = roles.together * shape.vocab * (work.compute_bytes + 12)
    return [
        _term("KV cache of a rollout", roles.together * each, formula),
        _term(
            "logits of a rollout",
            logits,
            f"assumption: {roles.together} x {shape.vocab:,} x (d + 12) B: fp32, scaled, softmax",
        ),
        _workspace(shape, work, roles.together * roles.prompt),
    ]


def cache_bytes(shape: Shape, length: int, each: int) -> int:
    """Keys and values of one sequence of `length` tokens in all layers, in a type of `each` bytes.

    A layer that shares those of another has none of its own; a sliding one forgets what is behind its window
    (transformers 5.23, `DynamicSlidingWindowLayer`).
    """
    seen = min(length, shape.sliding_window or length)
    held = (
        (length if layer.is_global else seen) * layer.kv_heads * layer.head_dim
        for layer in layers_of(shape)
        if layer.has_k
    )
    return 2 * each * sum(held)


def _optimizer_state(parameters: Parameters, trained: int, work: Workload) -> MemoryTerm:
    each = OPTIMIZER_BYTES[work.optimizer]
    # transformers asks bitsandbytes for 32-bit states of embeddings (Trainer.get_optimizer_cls_and_kwargs).
    wide = 0 if work.rank or each == 8 else parameters.embedding + parameters.per_layer_embedding
    formula = f"{trained - wide:,} x {each:.4g} B: two moments ({work.optimizer})"
    if wide:
        formula += f" + {wide:,} x 8 B: embeddings keep 32 bits"
    return _term("optimizer state", (trained - wide) * each + wide * 8, formula)


def _activations(shape: Shape, work: Workload) -> list[MemoryTerm]:
    layers = [layer_bytes(shape, layer, work) for layer in layers_of(shape)]
    kept = f"{work.tokens:,} tokens ({work.sequences_text} x {work.length})"
    terms = []
    if work.checkpointing:
        streams = shape.altup_inputs or 1
        # A full fine-tune keeps its residual stream in fp32: autocast casts what enters a matrix product only.
        stream = shape.hidden * streams * (work.compute_bytes if work.rank else work.weight_bytes)
        terms.append(
            _term("layer inputs", work.tokens * shape.layers * stream, f"{kept} x {shape.layers} layers x {stream:,} B")
        )
        terms.append(
            _term(
                "one layer, recomputed",
                work.tokens * max(layers),
                f"{kept} x {round(max(layers)):,} B: the largest layer",
            )
        )
    else:
        mean = sum(layers) / len(layers)
        formula = f"{kept} x {shape.layers} layers x {round(mean):,} B on average, no recomputation"
        terms.append(_term("activations", work.tokens * sum(layers), formula))
    copies = [layer_copies(shape, layer, work) for layer in layers_of(shape)]
    terms.append(
        _term(
            "DoRA's copies of weights",
            max(copies) if work.checkpointing else sum(copies),
            "fp32, of each adapted layer: dropout above 0 makes DoRA multiply by the weight again",
        )
    )
    if work.masked and work.attention != "flash_attention_2":
        kinds = 1 if shape.sliding_window is None else 2
        each = work.compute_bytes if work.attention == "eager" else 1
        size = work.sequences * work.length**2 * kinds * each
        formula = f"{work.sequences_text} x {work.length}^2 x {kinds} kinds x {each} B"
        terms.append(_term("attention masks", size, formula))
    return terms


def _projections(shape: Shape, layer: Layer) -> list[tuple[int, int]]:
    """(inputs, outputs) of the seven linear layers, fewer where keys or values are shared."""
    queries, keys = shape.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    attention = [(shape.hidden, queries), (queries, shape.hidden)]
    attention += [(shape.hidden, keys)] * (layer.has_k + layer.has_v)
    return attention + _mlp_projections(shape, layer)


def _adapted(shape: Shape, layer: Layer, work: Workload) -> list[tuple[int, int]]:
    """The projections that carry an adapter; all of them in a full fine-tune."""
    pairs = _projections(shape, layer)
    if work.targets == "all-linear":
        return pairs
    mlp = _mlp_projections(shape, layer)
    return mlp if work.targets == "mlp" else pairs[: -len(mlp)]


def _mlp_projections(shape: Shape, layer: Layer) -> list[tuple[int, int]]:
    return [(shape.hidden, layer.intermediate)] * 2 + [(layer.intermediate, shape.hidden)]


def layer_bytes(shape: Shape, layer: Layer, work: Workload) -> float:
    """Bytes a token that autograd keeps for the backward pass of one decoder layer."""
    return (
        _norm_bytes(shape, layer, work)
        + _attention_bytes(shape, layer, work)
        + _mlp_bytes(shape, layer, work)
        + _update_bytes(shape, layer, work)
    )


def layer_copies(shape: Shape, layer: Layer, work: Workload) -> int:
    """Bytes that a layer keeps for its backward pass however many tokens there are.

    DoRA behind dropout multiplies by the whole weight again (peft 0.21, tuners/lora/dora.py) and keeps an fp32 copy.
    """
    if not (work.dora and work.dropout) or (work.quantization == "none" and work.weight_bytes == 4):
        return 0
    return 4 * sum(inputs * outputs for inputs, outputs in _adapted(shape, layer, work))


def _norm_bytes(shape: Shape, layer: Layer, work: Workload) -> float:
    """RMSNorm computes in fp32 and keeps its input, for trained weights its result as well."""
    family = FAMILIES[shape.family]
    width = family.norms_per_layer * shape.hidden
    if family.qk_norm:
        width += shape.heads * layer.head_dim + layer.kv_heads * layer.head_dim * layer.has_k
    if shape.per_layer_dim:
        width += shape.hidden
    kept = 4 * width * (1 if work.rank else 2)
    # AltUp (Gemma 3n): predicts and corrects all streams, each once.
    return kept + 2 * shape.altup_inputs * shape.hidden * work.compute_bytes


def _attention_bytes(shape: Shape, layer: Layer, work: Workload) -> float:
    """Queries, keys and values (repeated to one a query head), the result, and what the kind of attention keeps."""
    d, queries = work.compute_bytes, shape.heads * layer.head_dim
    if work.attention == "flash_attention_2":
        return d * (2 * queries + 2 * layer.kv_heads * layer.head_dim) + 4 * shape.heads
    if work.attention == "eager":
        # Scores: softmax in fp32 and its copy in d, and tanh's result where scores are capped.
        capped = FAMILIES[shape.family].attention_softcap is not None
        return d * 3 * queries + shape.heads * work.length * (4 + d * (2 if capped else 1))
    # sdpa turns a boolean mask into one of its own type in every layer, and keeps it.
    mask = d * work.length if work.masked else 0
    return d * 4 * queries + 4 * shape.heads + mask


def _mlp_bytes(shape: Shape, layer: Layer, work: Workload) -> float:
    """Gate before and after its activation, and up; the same for the experts that a token visits."""
    d = work.compute_bytes
    kept = 3 * layer.intermediate * d + 2 * shape.per_layer_dim * d
    if shape.experts:
        kept += shape.experts_per_token * (3 * shape.expert_dim + shape.hidden) * d
    return kept


def _update_bytes(shape: Shape, layer: Layer, work: Workload) -> float:
    """What the weight gradients need: inputs of the adapters, or of the linear layers in a full fine-tune."""
    d = work.compute_bytes
    pairs = _adapted(shape, layer, work)
    if not work.rank:
        if work.autocast:  # a cast copy for each layer
            return d * sum(inputs for inputs, _ in pairs)
        return d * sum(_shared_inputs(shape, layer, "all-linear"))
    each = d if work.autocast else 4  # without autocast peft casts what enters an adapter to the adapter's fp32
    kept = work.rank * each * len(pairs)
    if work.dropout:
        # The mask is a byte an element on CUDA, and a tensor of the input's type on a CPU.
        kept += (each + (each if work.device == "cpu" else 1)) * sum(inputs for inputs, _ in pairs)
    elif each != d:  # a cast copy for each adapter
        kept += each * sum(inputs for inputs, _ in pairs)
    else:  # q, k and v share one input, so do gate and up
        kept += each * sum(_shared_inputs(shape, layer, work.targets))
    if work.dora:
        # DoRA scales what the base and what LoRA gave, and keeps both; behind dropout the base's is made anew in fp32.
        kept += (4 + (4 if work.dropout else d)) * sum(outputs for _, outputs in pairs)
    return kept


def _shared_inputs(shape: Shape, layer: Layer, targets: str) -> list[int]:
    attention = [shape.hidden, shape.heads * layer.head_dim]
    mlp = [shape.hidden, layer.intermediate]
    return {"attention": attention, "mlp": mlp, "all-linear": attention + mlp}[targets]


def _loss_head(shape: Shape, work: Workload) -> MemoryTerm:
    """Hidden states and their gradient in fp32, and the tile of logits that exists at a time."""
    hidden = work.tokens * shape.hidden * 8
    formula = f"{work.tokens:,} tokens x {shape.hidden:,} x 8 B"
    if not work.rank:
        # TRL accumulates the head's gradient in fp32 beside the embedding's own.
        weight = shape.vocab * shape.hidden * 4
        hidden += weight
        formula += f" + {shape.vocab * shape.hidden:,} x 4 B: its own gradient"
    elif work.device == "cpu" or work.roles:  # PPO takes log-probabilities at a temperature, which TRL's head has not
        return _term("loss head", hidden + CPU_HEAD_BYTES, f"{formula} + 3 buffers of 128 MiB")
    rows, words = min(work.tokens, HEAD_TOKENS), min(shape.vocab, HEAD_WORDS)
    return _term(
        "loss head", hidden + rows * words * work.compute_bytes, f"{formula} + {rows:,} x {words:,} x d: one tile"
    )


def _reward_head(shape: Shape, work: Workload) -> MemoryTerm:
    """A scalar for each sequence, read at its last token: the vocabulary is never scored."""
    hidden = work.tokens * shape.hidden * 2 * work.compute_bytes
    head = shape.hidden + 1
    formula = f"{work.tokens:,} tokens x {shape.hidden:,} x 2 d: last states and their gradient"
    return _term("reward head", hidden + head * 16, f"{formula} + {head:,} x 16 B: fp32 scalar head, AdamW")


def _workspace(shape: Shape, work: Workload, tokens: int) -> MemoryTerm:
    """Passing buffers of a pass: what is inside one MLP, backward its gradients, and one weight brought back to the
    compute type."""
    width = max(layer.intermediate for layer in layers_of(shape))
    gradients = tokens * width * (2 * work.compute_bytes + 4)
    formula = f"assumption: {tokens:,} tokens x {width:,} x (2 d + 4) B"
    weight = shape.hidden * width
    if work.quantization != "none":
        gradients += weight * work.compute_bytes
        formula += f" + {weight:,} x d: one dequantised weight"
    if work.dora:
        # An identity as wide as the widest input, the update and the weight that its norm is taken of.
        dense = width**2 + 2 * weight
        gradients += 4 * dense
        formula += f" + {dense:,} x 4 B: DoRA's weight norm"
    return _term("passing buffers", gradients, formula)


def _overhead(work: Workload) -> MemoryTerm:
    if work.device == "cuda":
        return _term("CUDA and allocator", CUDA_OVERHEAD, "assumption: context, cuBLAS workspace, fragments")
    return _term("Python and libraries", CPU_OVERHEAD, "measured with the 270M: imports, tokenizer, data, heap")
