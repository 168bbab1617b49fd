"""Loss, gradient and optimizer: what is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gemma_tune.tpu.model import Frozen, Noise, hidden_states, linears

IGNORED = -100
CHUNK = 128
"""Tokens of a row whose logits are there at a time. 128 x 262,144 logits in fp32 are 128 MiB."""

Params = dict[str, Any]
"""Arrays by name: of the adapter `layers.0.self_attn.q_proj.lora_A` and so on, in fp32."""


def split(model: Any) -> tuple[Params, Callable[[Params, Params, Any], Any], Params]:
    """(adapter, (adapter, base, keys of the rows or None) -> model, base): arrays for jax.jit, which takes no model."""
    graph, trained, noise, rest = nnx.split(model, nnx.LoRAParam, Noise, ...)
    adapter = {_name(model, path): tuple(path) for path, _ in trained.flat_state()}
    base = {".".join(map(str, path)): tuple(path) for path, _ in rest.flat_state()}
    values = {tuple(path): leaf.get_value() for state in (trained, rest) for path, leaf in state.flat_state()}
    (at, _), *_ = noise.flat_state()

    def join(params: Params, frozen: Params, keys: Any) -> Any:
        flat = {adapter[name]: nnx.LoRAParam(value) for name, value in params.items()}
        flat |= {base[name]: Frozen(value) for name, value in frozen.items()}
        flat |= {tuple(at): Noise(jax.random.key(0)[None] if keys is None else keys)}
        found = nnx.merge(graph, nnx.State.from_flat_path(flat))
        for one in linears(found):
            one.training = keys is not None
        return found

    trained, frozen = ({name: values[path] for name, path in paths.items()} for paths in (adapter, base))
    return trained, join, frozen


def _name(model: Any, path: Sequence[str | int]) -> str:
    """`layers.0.self_attn.q_proj.lora_A` for the place of an adapter's tensor in the model."""
    found = model
    for part in path[:-1]:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    return f"{found.name}.lora_{str(path[-1]).upper()}"


def sums(model: Any, rows: Mapping[str, Any], mesh: Any, softcap: float | None, *, accuracy: bool = False) -> Any:
    """Over the trained tokens of `rows`: (sum of -log p, how many, how many were the likeliest).

    The logits of the vocabulary are there for a chunk of a row at a time, and made again in the backward pass.
    """
    hidden = hidden_states(model, rows["tokens"], rows["segments"])
    labels = jnp.pad(rows["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    table = model.embedder.input_embedding[...]
    table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec("tp", None)))

    @jax.checkpoint
    def of_chunk(found: Any, part: Any) -> Any:
        seen, wanted = part
        logits = jnp.einsum("btd,vd->btv", seen, table, preferred_element_type=jnp.float32)
        if softcap is not None:
            logits = jnp.tanh(logits / softcap) * softcap
        kept = wanted != IGNORED
        taken = jnp.where(kept, wanted, 0)
        log_p = jnp.take_along_axis(logits, taken[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
        best = (jnp.argmax(logits, -1) == taken) & kept if accuracy else jnp.zeros_like(kept)
        more = (-jnp.sum(log_p * kept), jnp.sum(kept), jnp.sum(best))
        return jax.tree.map(jnp.add, found, more), None

    def chunks(array: Any) -> Any:
        batch, length = array.shape[:2]
        return array.reshape(batch, length // CHUNK, CHUNK, *array.shape[2:]).swapaxes(0, 1)

    start = (jnp.float32(0), jnp.int32(0), jnp.int32(0))
    return jax.lax.scan(of_chunk, start, (chunks(hidden), chunks(labels)))[0]


def schedule(trainer: Mapping[str, Any], steps: int) -> Any:
    """The learning rate of step 0, 1, ... as transformers' schedules have it.

    Args:
        trainer: `Plan.values("trainer")`; `warmup_steps` below 1 is a share of the steps, rounded up.
    """
    peak, kind, share = trainer["learning_rate"], trainer["lr_scheduler_type"], trainer["warmup_steps"]
    warm = 0 if kind == "constant" else math.ceil(steps * share)
    left = max(steps - warm, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, left),
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        "constant": lambda: optax.constant_schedule(peak),
        "constant_with_warmup": lambda: optax.constant_schedule(peak),
    }[kind]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm]) if warm else after


def optimizer(trainer: Mapping[str, Any], steps: int) -> Any:
    """AdamW behind clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(trainer["max_grad_norm"]),
        optax.adamw(
            schedule(trainer, steps),
            b1=trainer["adam_beta1"],
            b2=trainer["adam_beta2"],
            eps=trainer["adam_epsilon"],
            weight_decay=trainer["weight_decay"],
        ),
    )


def make_step(join: Any, update: Any, mesh: Any, softcap: float | None, params: Params, state: Any) -> Any:
    """(adapter, state, base, rows, key) -> (adapter, state, loss, gradient norm). The first two are donated.

    `rows` holds arrays of [passes, rows of a pass, tokens]. Every trained token of the step weighs the same, whatever
    pass it is in. What comes out lies as `params` and `state` lie: otherwise the next step would be compiled again.
    """

    def step(params: Params, state: Any, frozen: Any, rows: Mapping[str, Any], key: Any) -> Any:
        count = jnp.maximum(jnp.sum(rows["labels"][:, :, 1:] != IGNORED), 1)

        def loss(params: Params, part: Any, keys: Any) -> Any:
            return sums(join(params, frozen, keys), part, mesh, softcap)[0]

        def of_pass(found: Any, part: Any) -> Any:
            more = jax.value_and_grad(loss)(params, *part)
            return jax.tree.map(jnp.add, found, more), None

        shape = rows["tokens"].shape[:2]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0] * shape[1])).reshape(shape)
        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (total, gradient), _ = jax.lax.scan(of_pass, start, (rows, keys))
        gradient = jax.tree.map(lambda one: one / count, gradient)
        norm = optax.global_norm(gradient)
        change, state = update.update(gradient, state, params)
        return optax.apply_updates(params, change), state, total / count, norm

    whole = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda one: one.sharding, (params, state))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, whole, whole))


def make_score(join: Any, mesh: Any, softcap: float | None) -> Any:
    """A function for jax.jit: (adapter, frozen, rows) -> `sums` without dropout."""

    def score(params: Params, frozen: Any, rows: Mapping[str, Any]) -> Any:
        return sums(join(params, frozen, None), rows, mesh, softcap, accuracy=True)

    return score
