"""tunix's Gemma with linear maps and adapters of our own, sharded over a mesh.

From tunix come attention, rotary positions, norms and recomputation; from qwix the arithmetic of NF4. The linear maps
are ours because an adapter must be what PEFT means by one. qwix 0.1.8 (providers/lora.py) gives keys and values one
common A, keeps adapters in the type of the base, which in bf16 loses small updates, and drops out in evaluation too.
And tunix's reader of safetensors has no Gemma 1, and takes every tensor of a file for the type of the first one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.interpreters import pxla
from jax.sharding import NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma12
from tunix.models.gemma3 import model as gemma3
from tunix.utils import sharding_utils

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.tpu.plan import BLOCK, Mesh

Read = Callable[[str, tuple[int, ...]], Any]
"""(name behind `model.`, shape) -> an array on the host, or a jax.ShapeDtypeStruct where nothing is to be loaded."""


class Noise(nnx.Variable):
    """The random keys of a pass, one a row; each map folds its own number in.

    A key a row, so that the same row loses the same inputs however many rows and chips share a pass.
    """


class Frozen(nnx.Variable):
    """A weight of the base."""


class Linear(nnx.Module):
    """x -> W x + scale * B A dropout(x). W, A and B lie as in PEFT: (out, in), (r, in), (out, r).

    `constants` are those of NF4, (out, in / 64); None where W is not quantised. A and B are fp32.
    """

    def __init__(self, name: str, number: int, weight: Any, constants: Any | None, noise: Noise) -> None:
        self.name, self.number = name, number
        self.weight = Frozen(weight)
        self.constants = Frozen(constants) if constants is not None else None
        self.a: Any = nnx.data(None)
        self.b: Any = nnx.data(None)
        self.scale, self.dropout, self.training = 0.0, 0.0, True
        self.noise = noise

    def __call__(self, x: Any) -> Any:
        """[B, T, in] -> [B, T, out], in the type of x."""
        weight = self.weight[...]
        if self.constants is not None:
            packed = qwix.QArray(qvalue=weight, scale=self.constants[...], qtype="nf4")
            weight = qwix.dequantize(packed).astype(x.dtype)
        y = jnp.einsum("...i,oi->...o", x, weight)
        if self.a is None:
            return y
        seen = x.astype(jnp.float32)
        if self.training and self.dropout:
            keys = jax.vmap(jax.random.fold_in, (0, None))(self.noise[...], self.number)
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, seen.shape[1:]))(keys)
            seen = jnp.where(kept, seen / (1 - self.dropout), 0.0)
        update = jnp.einsum("...i,ri->...r", seen, self.a[...])
        update = jnp.einsum("...r,or->...o", update, self.b[...])
        return (y.astype(jnp.float32) + self.scale * update).astype(y.dtype)


class Heads(nnx.Module):
    """Maps that read the same x, in place of an einsum of tunix. `shape` is the einsum's: tunix reads sizes off it."""

    def __init__(self, shape: tuple[int, ...], maps: list[Linear], head_dim: int | None) -> None:
        self.shape, self.head_dim = shape, head_dim
        self.maps = nnx.List(maps)

    def __call__(self, x: Any) -> Any:
        """[B, T, in] or [B, T, heads, head_dim] -> [B, T, out], or a [B, T, heads, head_dim] of each map."""
        if self.head_dim is None:
            return self.maps[0](x.reshape(*x.shape[:2], -1))
        found = tuple(one(x).reshape(*x.shape[:2], -1, self.head_dim) for one in self.maps)
        return found if len(found) > 1 else found[0]


# --- sharding


def device_mesh(mesh: Mesh, devices: Any = None) -> jax.sharding.Mesh:
    """The mesh over JAX's devices, or over those of a topology."""
    chips = np.array(jax.devices() if devices is None else devices).reshape(mesh.fsdp, mesh.tp)
    return jax.sharding.Mesh(chips, ("fsdp", "tp"))


def fitted(spec: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`spec` without the axes that do not divide their dimension: one head of keys cannot be split over two chips."""
    axes = (axis if axis and not size % mesh.shape[axis] else None for axis, size in zip(spec, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*axes))


def _constrain(x: Any, spec: tuple[str | None, ...], eager: bool = False) -> Any:
    mesh = pxla.thread_resources.env.physical_mesh
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fitted(spec, x.shape, mesh))


def constrain_everywhere() -> None:
    """Let tunix's constraints on activations hold on simulated devices and in compilation without chips too.

    tunix 0.1.7 leaves them out where JAX's own devices are CPUs (utils/sharding_utils.py, models/gemma/model.py), so
    that a test on a CPU, or a compilation there, is of another program than the one that the chips run; and on chips
    they fail where an axis does not divide a dimension (the 270M, 1B and 2B have one head of keys).
    """
    sharding_utils.shard = _constrain
    gemma12.shard = _constrain


_OUT_IN = ("tp", "fsdp")
_IN_OUT = ("fsdp", "tp")
"""How W is split: columns of a head or of the MLP over `tp`, the width of the model over `fsdp`, as tunix does it."""


@dataclass(frozen=True, slots=True)
class Builder:
    """Puts arrays where they belong.

    Attributes:
        mesh: of JAX's devices.
        dtype: of the base, where it is not quantised, and of what is computed.
        nf4: whether linear maps are quantised.
        read: where tensors come from.
    """

    mesh: jax.sharding.Mesh
    dtype: Any
    nf4: bool
    read: Read

    def put(self, value: Any, spec: tuple[str | None, ...], dtype: Any = None) -> Any:
        """`value` on the chips, or its description where it is one."""
        place = fitted(spec, value.shape, self.mesh)
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, dtype or self.dtype, sharding=place)
        return jax.device_put(np.asarray(value).astype(dtype or self.dtype), place)

    def weight(self, name: str, shape: tuple[int, int], spec: tuple[str | None, ...]) -> tuple[Any, Any | None]:
        """(W, None), or W in NF4 with its constants."""
        value = self.put(self.read(name, shape), spec)
        if not self.nf4:
            return value, None
        if isinstance(value, jax.ShapeDtypeStruct):
            tiles = jax.ShapeDtypeStruct((shape[0], shape[1] // BLOCK), jnp.float32)
            return self.put(value, spec, jnp.uint4), self.put(tiles, spec, jnp.float32)
        packed = _nf4(value)
        placed = [jax.device_put(one, fitted(spec, one.shape, self.mesh)) for one in (packed.qvalue, packed.scale)]
        return placed[0], placed[1]


@jax.jit
def _nf4(weight: Any) -> Any:
    """In blocks of 64 along the input: value by value what bitsandbytes makes of it without double quantisation."""
    return qwix.quantize(weight.astype(jnp.float32), "nf4", channelwise_axes=(0,), tiled_axes={1: BLOCK})


# --- the model


def build(
    family: Family,
    shape: Shape,
    config: Mapping[str, Any],
    builder: Builder,
    lora: Mapping[str, Any],
    *,
    seed: int,
    recompute: bool,
) -> Any:
    """The model with weights and a new adapter.

    Args:
        family, shape: of the base.
        config: its text config, as in config.json; empty where nothing is loaded and values do not matter.
        builder: where arrays come from and go.
        lora: keywords of peft.LoraConfig.
        seed: of A.
        recompute: keep only what enters a layer, and compute it again in the backward pass.

    Raises:
        UserError: tunix would compute something else than this config says.
    """
    constrain_everywhere()
    make, module = (_gemma3, gemma3) if family.qk_norm else (_gemma12, gemma12)
    remat = module.RematConfig.DECODER if recompute else module.RematConfig.NONE
    model = nnx.eval_shape(lambda: make(shape, config, remat))
    _check(model, shape, config)
    noise = Noise(jax.random.key(0)[None])  # `step.split` takes it out, and each pass brings its own
    names = dict(_NORMS[family.name])
    for index, layer in enumerate(model.layers):
        _fill_layer(layer, index, shape, builder, noise, names)
    table = builder.read("embed_tokens.weight", (shape.vocab, shape.hidden))
    model.embedder.input_embedding = Frozen(builder.put(table, ("tp", "fsdp")))
    model.final_norm.scale = Frozen(builder.put(builder.read("norm.weight", (shape.hidden,)), (None,)))
    _adapt(model, lora, seed, builder, family)
    return model


def _gemma12(shape: Shape, config: Mapping[str, Any], remat: Any) -> Any:
    kinds = gemma12.AttentionType
    second = shape.family == "gemma2"
    return gemma12.Gemma(
        gemma12.ModelConfig(
            num_layers=shape.layers,
            num_embed=shape.vocab,
            embed_dim=shape.hidden,
            hidden_dim=shape.intermediate,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.kv_heads,
            final_logit_softcap=config.get("final_logit_softcapping", 30.0) if second else None,
            attn_logits_soft_cap=config.get("attn_logit_softcapping", 50.0) if second else None,
            use_post_attn_norm=second,
            use_post_ffw_norm=second,
            attention_types=[
                kinds.LOCAL_SLIDING if shape.sliding_window and index not in shape.global_layers else kinds.GLOBAL
                for index in range(shape.layers)
            ],
            sliding_window_size=shape.sliding_window,
            remat_config=remat,
        ),
        rngs=nnx.Rngs(params=0),
    )


def _gemma3(shape: Shape, config: Mapping[str, Any], remat: Any) -> Any:
    narrow = config.get("query_pre_attn_scalar", shape.head_dim) != shape.head_dim
    scales = gemma3.QueryPreAttentionNormalisation
    kinds = gemma3.AttentionType
    model = gemma3.Gemma3(
        gemma3.ModelConfig(
            num_layers=shape.layers,
            num_embed=shape.vocab,
            embed_dim=shape.hidden,
            hidden_dim=shape.intermediate,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.kv_heads,
            sliding_window_size=shape.sliding_window,
            query_pre_attn_norm=scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
            if narrow
            else scales.BY_ONE_OVER_SQRT_HEAD_DIM,
            remat_config=remat,
        ),
        rngs=nnx.Rngs(params=0),
    )
    ropes = _ropes(config)
    for index, layer in enumerate(model.layers):  # tunix makes every sixth global, whatever the config says
        is_global = index in shape.global_layers
        layer.attn.attn_type = kinds.GLOBAL if is_global else kinds.LOCAL_SLIDING
        layer.attn.rope_base_frequency, layer.attn.rope_scale_factor = ropes[is_global]
    return model


def _ropes(config: Mapping[str, Any]) -> dict[bool, tuple[float, float]]:
    """Is global -> (base, linear factor); both layouts of config.json, transformers 4's and 5's."""
    new = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    far = new.get("full_attention") or {"rope_theta": config.get("rope_theta", 1e6), **scaling}
    near = new.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    for one in (far, near):
        if one.get("rope_type", "default") not in ("default", "linear"):
            raise UserError(f"tunix has no rotary positions of type {one['rope_type']}", where="model.name")
    return {kind: (one["rope_theta"], one.get("factor", 1.0)) for kind, one in ((True, far), (False, near))}


def _check(model: Any, shape: Shape, config: Mapping[str, Any]) -> None:
    """What tunix has as constants must be what the config says."""
    attention = model.layers[0].attn
    scalar = getattr(attention, "query_pre_attn_scalar", None) or attention.head_dim**-0.5
    said = config.get("query_pre_attn_scalar") or shape.head_dim
    rope = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 1e4)
    wrong = {
        "query_pre_attn_scalar": not math.isclose(scalar, said**-0.5),
        "rms_norm_eps": not math.isclose(config.get("rms_norm_eps", 1e-6), 1e-6, rel_tol=1e-6),
        "hidden_activation": (config.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh",
        "attention_bias": bool(config.get("attention_bias")),
        "rope_theta": isinstance(model, gemma12.Gemma) and rope != 1e4,
    }
    if found := [key for key, differs in wrong.items() if differs]:
        raise UserError(
            f"tunix computes this model with another {' and '.join(found)} than its config.json says",
            where="model.name",
            fix="train this one with torch",
        )


_NORMS = {
    "gemma1": {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"},
    "gemma2": {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "gemma3_text": {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_NORMS["gemma3"] = _NORMS["gemma3_text"]
"""transformers' names of the norms in a layer -> tunix's. The same name is another norm in Gemma 1 and 2."""


def _fill_layer(layer: Any, index: int, shape: Shape, builder: Builder, noise: Noise, norms: Mapping[str, str]) -> None:
    """Give a layer that tunix described its norms, and our maps in place of its einsums."""
    begin = f"layers.{index}."
    wide, inner, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    assert isinstance(shape.intermediate, int)
    sizes = {
        "self_attn.q_proj": ((inner, wide), _OUT_IN),
        "self_attn.k_proj": ((keys, wide), _OUT_IN),
        "self_attn.v_proj": ((keys, wide), _OUT_IN),
        "self_attn.o_proj": ((wide, inner), _IN_OUT),
        "mlp.gate_proj": ((shape.intermediate, wide), _OUT_IN),
        "mlp.up_proj": ((shape.intermediate, wide), _OUT_IN),
        "mlp.down_proj": ((wide, shape.intermediate), _IN_OUT),
    }
    maps = {
        name: Linear(
            begin + name, len(sizes) * index + number, *builder.weight(f"{begin}{name}.weight", size, spec), noise
        )
        for number, (name, (size, spec)) in enumerate(sizes.items())
    }
    q, k, v, o, gate, up, down = maps.values()
    attention, dim = layer.attn, shape.head_dim
    if attention.use_qkv_einsum:
        attention.qkv_einsum = Heads(attention.qkv_einsum.shape, [q, k, v], dim)
    else:
        attention.q_einsum = Heads(attention.q_einsum.shape, [q], dim)
        attention.kv_einsum = Heads(attention.kv_einsum.shape, [k, v], dim)
    attention.attn_vec_einsum = Heads(attention.attn_vec_einsum.shape, [o], None)
    layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = gate, up, down
    for theirs, ours in norms.items():
        getattr(layer, ours).scale = Frozen(builder.put(builder.read(f"{begin}{theirs}.weight", (wide,)), (None,)))
    if hasattr(attention, "_query_norm"):
        for theirs, norm in (("q_norm", attention._query_norm), ("k_norm", attention._key_norm)):
            norm.scale = Frozen(builder.put(builder.read(f"{begin}self_attn.{theirs}.weight", (dim,)), (None,)))


def linears(model: Any) -> Iterator[Linear]:
    """All maps of the decoder, in a fixed order."""
    for layer in model.layers:
        attention = layer.attn
        heads = [attention.qkv_einsum] if attention.use_qkv_einsum else [attention.q_einsum, attention.kv_einsum]
        for one in (*heads, attention.attn_vec_einsum):
            yield from one.maps
        yield from (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)


def _adapt(model: Any, lora: Mapping[str, Any], seed: int, builder: Builder, family: Family) -> None:
    """A new adapter on the maps that the plan targets: A uniform in +-1/sqrt(in), as PEFT draws it, and B zero."""
    targets, r = re.compile(lora["target_modules"]), lora["r"]
    for one in linears(model):
        out, size = one.weight.get_value().shape
        if not targets.fullmatch(f"{family.adapter_prefix.removesuffix('layers')}{one.name}"):
            continue
        one.scale = lora["lora_alpha"] / (math.sqrt(r) if lora["use_rslora"] else r)
        one.dropout = lora["lora_dropout"]
        described = isinstance(one.weight.get_value(), jax.ShapeDtypeStruct)
        drawn = np.random.default_rng([seed, one.number]).uniform(-1, 1, (r, size)) / math.sqrt(size)
        a: Any = jax.ShapeDtypeStruct((r, size), jnp.float32) if described else drawn
        b: Any = jax.ShapeDtypeStruct((out, r), jnp.float32) if described else np.zeros((out, r))
        one.a = nnx.LoRAParam(builder.put(a, (None, "fsdp"), jnp.float32))
        one.b = nnx.LoRAParam(builder.put(b, ("fsdp", None), jnp.float32))


def hidden_states(model: Any, tokens: Any, segments: Any) -> Any:
    """[B, T] tokens and the document that each is of -> [B, T, hidden] behind the last norm.

    Positions run through the whole row. Attention stays inside a document, and rotary positions only know distances, so
    that this is the same as beginning at 0 in each; and tunix's sliding mask of Gemma 2 takes positions for indices.
    """
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    x = model.embedder.encode(tokens)
    for layer in model.layers:
        _, x = layer(x, positions, None, mask)
    return model.final_norm(x)
