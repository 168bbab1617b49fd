"""What FSDP2 makes of memory: a part of everything that is held, and the layers that are whole for a while.

accelerate 1.15 (utils/fsdp_utils.py, `fsdp2_prepare_model`) makes a group of each decoder layer, one of embedding, head
and last norm, and one of the rest; the last two stay whole from the forward pass on to the end of the backward pass.
"""

from __future__ import annotations

from dataclasses import replace

from gemma_tune.gemma.shape import Parameters, Shape, layer_parameters, layers_of
from gemma_tune.plan.types import MemoryTerm
from gemma_tune.plan.workload import Workload

# bitsandbytes quantises NF4 weights in blocks of 64 with one constant each; double quantisation quantises 256 of those
# to 8 bits with one fp32 constant (QLoRA, arXiv 2305.14314, section 3).
NF4_BLOCK = 64
NF4_CONSTANTS_BLOCK = 256

LAYERS_AT_ONCE = 2
"""A layer at work, and the next one that is gathered meanwhile (torch 2.13, fsdp/_fully_shard: prefetching)."""


def packed_bytes(work: Workload) -> float:
    """Bytes of one weight of a linear layer in the tensor that is sharded and sent, without constants and scales."""
    return {"nf4": 0.5, "int8": 1.0, "none": float(work.weight_bytes)}[work.quantization]


def constants_bytes(work: Workload) -> tuple[float, str]:
    """Bytes of NF4's constants for one weight, and the formula; 0 for other types."""
    if work.quantization != "nf4":
        return 0.0, ""
    if work.double_quantization:
        return 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_CONSTANTS_BLOCK), "(1/64 + 4/(64 x 256)) B: constants of NF4"
    return 4 / NF4_BLOCK, "4/64 B: constants of NF4"


def part(term: MemoryTerm, work: Workload) -> MemoryTerm:
    """What one process holds of something that all of its group hold together."""
    if work.offload:
        return replace(term, bytes=0)
    if work.shards == 1:
        return term
    return MemoryTerm(term.name, -(-term.bytes // work.shards), f"{term.formula}; a part of {work.shards}")


def layer_sizes(shape: Shape, work: Workload) -> list[int]:
    """Bytes of each decoder layer as it is gathered, adapters (fp32) included, in order."""
    wide = gathered_type(work)
    linear = wide if work.quantization == "none" else packed_bytes(work)
    sizes = []
    for layer in layers_of(shape):
        own = layer_parameters(shape, layer)
        adapters = work.rank * own.lora_per_rank[work.targets]
        adapters += work.frozen_rank * own.lora_per_rank[work.frozen_targets]
        sizes.append(round(own.linear * linear + (own.experts + own.norms_and_rest) * wide + 4 * adapters))
    return sizes


def root_size(shape: Shape, parameters: Parameters, work: Workload) -> int:
    """Bytes of what belongs to no decoder layer: embeddings, head, last norm, towers."""
    layers = [layer_parameters(shape, layer) for layer in layers_of(shape)]
    linear = parameters.linear - sum(layer.linear for layer in layers)
    rest = parameters.norms_and_rest - sum(layer.norms_and_rest for layer in layers)
    wide = gathered_type(work)
    kept = parameters.embedding + parameters.per_layer_embedding + rest + (parameters.towers or 0)
    return round(kept * wide + linear * (wide if work.quantization == "none" else packed_bytes(work)))


def gathered_type(work: Workload) -> int:
    """Bytes of a gathered parameter: under autocast accelerate's FSDP2 casts before it sends."""
    return work.compute_bytes if work.autocast else work.weight_bytes


def gathered(shape: Shape, parameters: Parameters, work: Workload) -> list[MemoryTerm]:
    """What is whole on a process for a while; empty where nothing is sharded."""
    if not work.shards:
        return []
    sizes, root = layer_sizes(shape, work), root_size(shape, parameters, work)
    largest = max(sizes)
    if work.reshard:
        size, formula = LAYERS_AT_ONCE * largest, f"2 x {largest:,} B: the largest layer at work, the next on its way"
    else:
        size, formula = sum(sizes), f"{len(sizes)} layers, kept from the forward pass to the backward pass"
    towers = ", towers at most" if parameters.towers else ""
    rest = f"{root:,} B{towers}: whole until the backward pass ends"
    terms = [MemoryTerm("gathered layers", size, formula), MemoryTerm("gathered embeddings and rest", root, rest)]
    if not work.rank:
        # Gradients of a whole layer, and the buffer that is reduced; those of the embedding until its turn comes.
        heads = parameters.embedding * work.compute_bytes
        text = f"2 x {largest:,} B of the largest layer, {heads:,} B of the embedding, before they are summed up"
        terms.append(MemoryTerm("gradients of gathered layers", 2 * largest + heads, text))
    return terms
