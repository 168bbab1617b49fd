"""Memory per chip of a training step, from the compiler itself: XLA for TPUs runs without a TPU (`libtpu`)."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gemma_tune.errors import AccessError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.types import Plan
from gemma_tune.tpu import model as gemma
from gemma_tune.tpu.plan import Mesh, Topology
from gemma_tune.tpu.step import CHUNK, make_step, optimizer, split

_WITHOUT_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def memory_of(plan: Plan, shape: Shape, topology: Topology) -> dict[str, Any]:
    """`terms` (name -> bytes a chip), their sum `bytes`, whether it `fits`, and the `seconds` of the compilation.

    Raises:
        AccessError: libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise AccessError("the compiler for TPUs is missing", fix="make setup-tpu LIBTPU=1 (about 200 MB)")
    # Otherwise libtpu asks the metadata server of a cloud machine, for minutes, and JAX looks for chips.
    for name, value in _WITHOUT_CHIPS.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    mesh = gemma.device_mesh(Mesh(**plan.machine["mesh"]), described.devices)
    trainer, family = plan.values("trainer"), FAMILIES[plan.family]
    model = gemma.build(
        family,
        shape,
        {},
        gemma.Builder(
            mesh,
            jnp.dtype(plan.values("model")["dtype"]),
            bool(plan.values("quantization").get("load_in_4bit")),
            lambda name, size: jax.ShapeDtypeStruct(size, jnp.float32),
        ),
        plan.values("lora"),
        seed=0,
        recompute=trainer["gradient_checkpointing"],
    )
    params, join, frozen = split(model)
    update = optimizer(trainer, 100)
    whole = NamedSharding(mesh, PartitionSpec())
    places = {one.shape: one.sharding for one in params.values()}
    state = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=places.get(one.shape, whole)),
        jax.eval_shape(update.init, params),
    )
    length = -(-plan.values("data")["max_length"] // CHUNK) * CHUNK
    size = (trainer["gradient_accumulation_steps"], trainer["per_device_train_batch_size"], length)
    split_rows = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    rows = {
        name: jax.ShapeDtypeStruct(size, jnp.int32, sharding=split_rows) for name in ("tokens", "labels", "segments")
    }
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    begun = time.monotonic()
    with mesh:
        step = make_step(join, update, mesh, family.final_softcap, params, state)
        found = step.lower(params, state, frozen, rows, key).compile().memory_analysis()
    terms = {
        "weights, adapter, optimizer and rows": found.argument_size_in_bytes,
        "activations and buffers": found.temp_size_in_bytes,
        "results that are no arguments": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    need = sum(terms.values())
    return {
        "terms": terms,
        "bytes": need,
        "fits": need <= topology.bytes,
        "seconds": round(time.monotonic() - begun, 1),
        "mesh": dict(plan.machine["mesh"]),
    }
