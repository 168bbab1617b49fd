"""The shape of a Gemma, and its parameters counted by class.

The counts are exact: a test builds the transformers model of every published shape without memory and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gemma_tune.gemma.families import FAMILIES, text_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Every number that decides how many parameters and activations a Gemma has.

    Attributes:
        family: name of its row in `families.FAMILIES`.
        layers, hidden, heads, kv_heads, head_dim, vocab: of the text decoder.
        intermediate: width of the MLP, one number or one a layer.
        max_positions: tokens that it can attend to.
        tied: whether the output head is the embedding.
        sliding_window: tokens that a local layer sees; None where all layers are global.
        global_layers: indices of the layers that see everything (all of them where there is no window).
        global_head_dim, global_kv_heads: of the global layers, where they differ (Gemma 4).
        k_eq_v: whether the values of global layers are their keys (no v_proj).
        kv_shared_layers: last layers that reuse the keys and values of an earlier one (no k_proj, v_proj).
        double_wide: whether those layers have an MLP of twice the width.
        per_layer_dim, per_layer_vocab: of the per-layer embedding; 0 where there is none.
        experts, expert_dim, experts_per_token: mixture of experts beside the MLP; 0 where there is none.
        altup_inputs, laurel_rank: Gemma 3n's parallel streams and low-rank residual; 0 where there are none.
        towers: parameters outside the text decoder (vision, audio, their projections); None where nobody knows.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int | tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool = True
    sliding_window: int | None = None
    global_layers: tuple[int, ...] = ()
    global_head_dim: int | None = None
    global_kv_heads: int | None = None
    k_eq_v: bool = False
    kv_shared_layers: int = 0
    double_wide: bool = False
    per_layer_dim: int = 0
    per_layer_vocab: int = 0
    experts: int = 0
    expert_dim: int = 0
    experts_per_token: int = 0
    altup_inputs: int = 0
    laurel_rank: int = 0
    towers: int | None = 0

    @property
    def text(self) -> Shape:
        """The same decoder without towers, as the text-only class loads it."""
        return replace(self, family=text_only(FAMILIES[self.family]).name, towers=0)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: the sizes of its heads and of its MLP."""

    is_global: bool
    head_dim: int
    kv_heads: int
    has_k: bool
    has_v: bool
    intermediate: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, by what quantisation does to them.

    Attributes:
        linear: weights of the decoder's linear layers, which NF4 and int8 quantise.
        embedding: token embedding, and the output head where it is not tied; never quantised.
        per_layer_embedding: Gemma 3n's and 4's per-layer table; never quantised.
        experts: Gemma 4 26B-A4B's experts, three-dimensional tensors that bitsandbytes leaves in 16 bits.
        norms_and_rest: norms, and the small linear layers that are kept from quantisation (router, AltUp, Laurel).
        towers: everything outside the text decoder; None where nobody knows.
        lora_per_rank: parameters that one rank of LoRA adds, by target preset.
    """

    linear: int
    embedding: int
    per_layer_embedding: int
    experts: int
    norms_and_rest: int
    towers: int | None
    lora_per_rank: Mapping[str, int]

    @property
    def text(self) -> int:
        """All parameters of the text decoder."""
        return self.linear + self.embedding + self.per_layer_embedding + self.experts + self.norms_and_rest


def layers_of(shape: Shape) -> Iterator[Layer]:
    """The decoder layers in order."""
    global_layers = set(shape.global_layers)
    first_shared = shape.layers - shape.kv_shared_layers
    for index in range(shape.layers):
        is_global, shared = index in global_layers, index >= first_shared
        width = shape.intermediate if isinstance(shape.intermediate, int) else shape.intermediate[index]
        yield Layer(
            is_global=is_global,
            head_dim=(is_global and shape.global_head_dim) or shape.head_dim,
            kv_heads=(is_global and shape.global_kv_heads) or shape.kv_heads,
            has_k=not shared,
            has_v=not shared and not (is_global and shape.k_eq_v),
            intermediate=2 * width if shared and shape.double_wide else width,
        )


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Numbers of parameters of one decoder layer, by class as in `Parameters`."""

    linear: int
    experts: int
    norms_and_rest: int
    lora_per_rank: Mapping[str, int]


def layer_parameters(shape: Shape, layer: Layer) -> LayerParameters:
    """Parameters of one decoder layer; exact."""
    family, streams = FAMILIES[shape.family], shape.altup_inputs
    queries, keys = shape.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    pairs = [(shape.hidden, queries), (queries, shape.hidden)]
    pairs += [(shape.hidden, keys)] * (layer.has_k + layer.has_v)
    linear = sum(a * b for a, b in pairs) + 3 * shape.hidden * layer.intermediate
    norms = family.norms_per_layer * shape.hidden
    norms += (1 + layer.has_k) * layer.head_dim if family.qk_norm else 0
    if shape.per_layer_dim:
        # A gate and a projection of the per-layer embedding, and a norm.
        linear += 2 * shape.hidden * shape.per_layer_dim
        norms += shape.hidden
    if shape.experts:
        # Router: its projection, its scale and a scale an expert; three more norms beside the dense MLP's.
        norms += shape.hidden * shape.experts + shape.hidden + shape.experts + 3 * shape.hidden
    if streams:
        # Gemma 3n: AltUp's maps, scale and norm, and Laurel.
        norms += streams**2 + streams**3 + shape.hidden * streams + 2 * shape.hidden
        norms += 2 * shape.hidden * shape.laurel_rank + shape.hidden
    attention = sum(a + b for a, b in pairs)
    mlp = 3 * (shape.hidden + layer.intermediate)
    return LayerParameters(
        linear=linear,
        experts=shape.experts * 3 * shape.hidden * shape.expert_dim,
        norms_and_rest=norms,
        lora_per_rank={"all-linear": attention + mlp, "attention": attention, "mlp": mlp},
    )


def count(shape: Shape) -> Parameters:
    """Parameters by class; exact for the text decoder."""
    layers = [layer_parameters(shape, layer) for layer in layers_of(shape)]
    linear = sum(layer.linear for layer in layers)
    norms = sum(layer.norms_and_rest for layer in layers) + shape.hidden  # the last one before the head
    if shape.per_layer_dim:
        # Once: the projection of the embedding into all layers, and its norm.
        linear += shape.layers * shape.hidden * shape.per_layer_dim
        norms += shape.per_layer_dim
    if shape.altup_inputs:
        # Once: the projections of Gemma 3n's streams.
        norms += 2 * (shape.altup_inputs - 1) * shape.hidden**2
    return Parameters(
        linear=linear,
        embedding=shape.vocab * shape.hidden * (1 if shape.tied else 2),
        per_layer_embedding=shape.per_layer_vocab * shape.layers * shape.per_layer_dim,
        experts=sum(layer.experts for layer in layers),
        norms_and_rest=norms,
        towers=shape.towers,
        lora_per_rank={
            targets: sum(layer.lora_per_rank[targets] for layer in layers)
            for targets in ("all-linear", "attention", "mlp")
        },
    )


def every(step: int, layers: int) -> tuple[int, ...]:
    """Indices of every `step`-th of so many layers, beginning with the `step`-th."""
    return tuple(range(step - 1, layers, step))
