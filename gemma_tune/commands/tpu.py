"""`gemma-tune tpu` and `gemma-tune check --machine v5e-8`: a recipe on TPUs, in the environment of `make setup-tpu`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune import console
from gemma_tune.commands.figures import figures
from gemma_tune.commands.report import reported
from gemma_tune.errors import AccessError
from gemma_tune.plan.facts import model_facts
from gemma_tune.recipe import yaml
from gemma_tune.recipe.reader import read_recipe_text

if TYPE_CHECKING:
    from gemma_tune.train.session import Resume


def require_jax() -> None:
    """Raise where this is not the environment for TPUs.

    Raises:
        AccessError: tunix, qwix or JAX is missing.
    """
    missing = [name for name in ("jax", "tunix", "qwix") if find_spec(name) is None]
    if missing:
        raise AccessError(
            f"this environment has no {', '.join(missing)}; TPU runs have one of their own",
            fix="make setup-tpu, then .venv-tpu/bin/gemma-tune tpu ...",
        )


def sft(recipe: str, overrides: Sequence[str], mesh: str | None, resume: Resume) -> int:
    """Train what `recipe` says on all chips of this host.

    Args:
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        mesh: `fsdp=4,tp=2`; by default all chips are fsdp.
        resume: `never`, `auto` or `must`.
    """
    require_jax()
    text = yaml.decode(yaml.read_bytes(recipe), recipe)
    read = read_recipe_text(text, recipe, overrides)
    family, shape = model_facts(read.model.name, read.model.revision)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no torch
    import jax

    from gemma_tune.tpu.plan import make_tpu_plan, read_mesh
    from gemma_tune.tpu.run import run_plan
    from gemma_tune.train.session import RunFolder

    RunFolder(read.output, resume=resume).check()
    devices = jax.devices()
    plan = make_tpu_plan(read, family, shape, read_mesh(mesh, len(devices)), devices[0].device_kind)
    sizes = plan.machine["mesh"]
    console.out(
        f"{read.model.name} on {len(devices)} x {devices[0].device_kind}, fsdp {sizes['fsdp']}, tp {sizes['tp']}"
    )
    for note in plan.notes:
        console.note(note)
    with reported(Path(read.output)):
        results = run_plan(plan, shape, text, resume=resume, console=console.stdout())
        for line in figures("sft", results):
            console.out(line)
        console.out(f"result: {Path(read.output) / results['weights']['folder']}")
    return 0


def check(recipe: str, overrides: Sequence[str], machine: str, mesh: str | None, as_json: bool) -> int:
    """Compile the training step of `recipe` for `machine`, which need not be there, and print its memory per chip.

    Args:
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        machine: `v5e-8`, see `tpu.plan.TOPOLOGIES`.
        mesh: `fsdp=4,tp=2`; by default all chips are fsdp.
        as_json: print JSON.
    """
    from gemma_tune.tpu.plan import make_tpu_plan, named_topology, read_mesh

    topology = named_topology(machine)
    require_jax()
    read = read_recipe_text(yaml.decode(yaml.read_bytes(recipe), recipe), recipe, overrides)
    family, shape = model_facts(read.model.name, read.model.revision)
    from gemma_tune.tpu.compile import memory_of

    plan = make_tpu_plan(read, family, shape, read_mesh(mesh, topology.chips), machine)
    found = memory_of(plan, shape, topology)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for name, size in found["terms"].items():
        console.out(f"{size / 2**30:8.2f} GiB  {name}")
    need, room = found["bytes"] / 2**30, topology.bytes / 2**30
    console.out(f"{need:8.2f} GiB  of {room:.0f} a chip: {'fits' if found['fits'] else 'does not fit'}")
    console.out(f"compiled for {machine} ({plan.machine['mesh']}) in {found['seconds']:.0f} s; nothing was executed")
    return 0 if found["fits"] else AccessError.exit_code
