"""What processes send each other in a step, and whether that or the computing takes longer: arithmetic, not measured.

Volumes are those of the best algorithms: what a process or a node has not, it receives once. What is sent while
something is computed costs nothing, so the longest of the times is the bound and their sum the worst case.

Units: bytes and seconds; `N` parameters, `D` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.gemma.shape import Shape, count
from gemma_tune.plan.gathered import layer_sizes, root_size
from gemma_tune.plan.memory import trained_parameters
from gemma_tune.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Peak rates, and the share of them that is taken to be reached.

    Attributes:
        flops: of one GPU a second, dense, in bf16.
        compute_share: of these.
        nvlink: bytes a second that one GPU receives from others of its node.
        network: bytes a second that one node receives from others.
        link_share: of both.
    """

    flops: float
    compute_share: float
    nvlink: float
    network: float
    link_share: float


# NVIDIA's H100 data sheet (SXM): 1,979 TFLOP/s in bf16 with sparsity, so 989 without; NVLink 900 GB/s, both directions
# together. Network: eight ports of 400 Gb/s a node, as in NVIDIA's DGX H100 data sheet. The shares are assumptions.
H100_NODES = Cluster(flops=989e12, compute_share=0.4, nvlink=450e9, network=8 * 400e9 / 8, link_share=0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step of one process.

    Attributes:
        gathered: bytes of parameters that it receives.
        reduced: bytes of gradients that it receives.
        inside, across: bytes that a GPU receives over NVLink, and a node over the network.
        compute, nvlink, network: seconds that each takes at the cluster's rates.
    """

    gathered: float
    reduced: float
    inside: float
    across: float
    compute: float
    nvlink: float
    network: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "nvlink", "network"), key=lambda name: getattr(self, name))


def step_of(shape: Shape, work: Workload, *, passes: int, nodes: int, cluster: Cluster = H100_NODES) -> Step:
    """Volumes and times of one step.

    Args:
        shape: of the loaded model.
        work: of one pass; `shards` 0 is DDP.
        passes: of one process in a step (gradient accumulation).
        nodes: that the processes are on, evenly; the processes of a group are neighbours.
        cluster: the rates.
    """
    parameters, world = count(shape), work.world_size
    trained = trained_parameters(parameters, work)
    if work.shards:
        layers, root = sum(layer_sizes(shape, work)), root_size(shape, parameters, work)
        # Forward and backward gather each layer; embedding, head and the rest stay whole in between.
        whole = passes * (layers * (2 if work.reshard else 1) + root)
        groups = world // work.shards
        sums = 1 if work.rank else passes
        gradient = sums * trained * (4 if work.rank else work.compute_bytes)
    else:
        whole, groups, gradient = 0, world, trained * 4
    shards = max(1, work.shards)
    spread = max(1, nodes // groups)  # nodes that one group is on
    gathered = whole * _rest(shards)
    # Scattered sums within a group; then each part is added up over the groups, which takes it there and back.
    scattered, summed = gradient * _rest(shards), 2 * gradient / shards * _rest(groups)
    between = nodes // spread  # nodes that hold the same parts; those of one node's GPUs make up `gradient / spread`
    across = (whole + gradient) * _rest(spread) + 2 * gradient / spread * _rest(between)
    inside = gathered + scattered + (summed if groups > between else 0)
    return Step(
        gathered=gathered,
        reduced=scattered + summed,
        inside=inside,
        across=across,
        compute=passes * flops_of_pass(shape, work) / (cluster.flops * cluster.compute_share),
        nvlink=inside / (cluster.nvlink * cluster.link_share),
        network=across / (cluster.network * cluster.link_share),
    )


def _rest(parts: int) -> float:
    """Share of something in equal parts that the holder of one part has to receive."""
    return (parts - 1) / parts


def flops_of_pass(shape: Shape, work: Workload) -> float:
    """Operations of one pass of one process: 2 N D forward, 2 N D for the gradients of activations, 2 N D for those of
    the weights where they are trained, and 2 N D again where the forward pass is recomputed.

    The products of attention with itself and of the adapters, and dequantisation, are left out: they only make the
    computing longer. Embeddings are looked up; the head is a product.
    """
    parameters = count(shape)
    head = shape.vocab * shape.hidden
    experts = parameters.experts * shape.experts_per_token / shape.experts if shape.experts else 0
    multiplied = parameters.linear + experts + head
    times = 4 + (0 if work.rank else 2)
    recomputed = parameters.linear + experts if work.checkpointing else 0
    return work.tokens * (times * multiplied + 2 * recomputed)
