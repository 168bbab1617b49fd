"""What a file of accelerate asks for and this recipe cannot have, or would not get: found before the hours."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_tune.errors import Problem
from gemma_tune.gemma.families import Family
from gemma_tune.plan.accelerate_files import KEYS, AccelerateFile
from gemma_tune.plan.choices_model import DTYPES, Precision
from gemma_tune.plan.machine import STATE_DICTS, is_false, is_true
from gemma_tune.plan.sharding import wrapped_layers
from gemma_tune.recipe.names import did_you_mean, nearest
from gemma_tune.recipe.schema import Recipe

KINDS = ("NO", "MULTI_GPU", "FSDP")
"""Values of distributed_type that work. MULTI_GPU also starts several processes on a CPU."""

_PRECISIONS = ("no", "fp16", "bf16", "fp8")

_NOT_STARTED = {
    "MULTI_CPU": (
        "accelerate 1.15 starts one single process for MULTI_CPU, without a word",
        "write `distributed_type: MULTI_GPU` with `use_cpu: true`",
    ),
    "DEEPSPEED": (
        "DeepSpeed is not supported: it leaves empty adapters (trl#4416) and fails with Gemma 3 (axolotl#3298)",
        "use `distributed_type: FSDP`, as accelerate_configs/fsdp2.yaml",
    ),
    "MEGATRON_LM": ("Megatron-LM is not supported", "use `distributed_type: FSDP`, as accelerate_configs/fsdp2.yaml"),
    "XLA": ("torch_xla is no longer developed", "see docs/clusters.md for TPUs"),
}

# fmt: off
_SWITCHES = frozenset({
    "offload_params", "reshard_after_forward", "forward_prefetch", "use_orig_params", "cpu_ram_efficient_loading",
    "sync_module_states", "activation_checkpointing", "activation_checkpointing_offload",
})
# fmt: on

FSDP_KEYS = frozenset(f"fsdp_{name}" for name in _SWITCHES) | {
    "fsdp_version",
    "fsdp_min_num_params",
    "fsdp_sharding_strategy",
    "fsdp_auto_wrap_policy",
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_backward_prefetch",
    "fsdp_state_dict_type",
    "fsdp_ignored_modules",
}
"""Keys of fsdp_config that accelerate launch 1.15 passes on: its options, and fsdp_ignored_modules. It drops others."""

MESH_KEYS = frozenset(
    f"parallelism_config_{name}"
    for name in (
        "dp_replicate_size",
        "dp_shard_size",
        "tp_size",
        "cp_size",
        "cp_backend",
        "cp_comm_strategy",
        "sp_size",
        "sp_backend",
        "sp_seq_length",
        "sp_seq_length_is_variable",
        "sp_attn_implementation",
    )
)
"""Keys of parallelism_config, likewise."""


def file_problems(file: AccelerateFile, recipe: Recipe, family: Family, precision: Precision) -> Iterator[Problem]:
    """Findings about `file` for a run of `recipe`, in order of importance; each has what, where (file:line) and fix.

    Args:
        file: as `read_accelerate_file` gives it.
        recipe: what is to be trained.
        family: the generation of its model.
        precision: its types on the machine (`choose_precision`).
    """
    yield from _form(file)
    yield from _parallel(file)
    if file.kind == "FSDP":
        yield from _section(file, "fsdp_config", FSDP_KEYS)
        yield from _version(file)
        yield from _switches(file)
        yield from _checkpointing(file, family)
        yield from _wrapping(file, recipe, family)
        yield from _state(file)
        yield from _storage(file, recipe, precision)
        yield from _groups(file)
    yield from _types(file, family)


def _form(file: AccelerateFile) -> Iterator[Problem]:
    for key in dict.fromkeys(name.partition(".")[0] for name in file.values):
        if key not in KEYS:
            hint = did_you_mean(nearest(key, KEYS)) or "remove it"
            place = next(file.where(name) for name in file.values if name.partition(".")[0] == key)
            yield Problem(f"accelerate knows no key {key!r} and would stop", place, hint)
    environment = file.text("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        yield Problem(
            f"{environment} is started by services that gemma-tune does not know",
            file.where("compute_environment"),
            "write `compute_environment: LOCAL_MACHINE`",
        )
    if "distributed_type" not in file.values:
        yield Problem(
            "names no distributed_type, at which accelerate stops", str(file.path), f"one of {', '.join(KINDS)}"
        )
    elif file.kind not in KINDS:
        unknown = (f"{file.kind} is nothing that gemma-tune runs under", f"use one of {', '.join(KINDS)}")
        what, fix = _NOT_STARTED.get(file.kind, unknown)
        yield Problem(what, file.where("distributed_type"), fix)


def _parallel(file: AccelerateFile) -> Iterator[Problem]:
    """Tensor, context and sequence parallelism, and misspelt keys beside them."""
    yield from _section(file, "parallelism_config", MESH_KEYS)
    for short, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        key = f"parallelism_config.parallelism_config_{short}_size"
        if (size := file.number(key) or 1) > 1:
            yield Problem(
                f"{name} parallelism ({short}_size: {size}) is not supported",
                file.where(key),
                "remove the line; to share a model's memory: fsdp2, or hsdp on several machines",
            )


def _section(file: AccelerateFile, section: str, known: frozenset[str]) -> Iterator[Problem]:
    """Keys that accelerate launch would drop without a word."""
    for dotted in file.values:
        outer, _, key = dotted.partition(".")
        if outer == section and key and key not in known:
            meant = nearest(key, known) or nearest(f"{section}_{key}", known)
            yield Problem(
                f"accelerate knows no key {key!r} in {section}, and would do without it",
                file.where(dotted),
                did_you_mean(meant) or "remove the line",
            )


def _switches(file: AccelerateFile) -> Iterator[Problem]:
    for name in sorted(_SWITCHES):
        said = file.fsdp(name, "false")
        if not is_true(said) and not is_false(said):
            where = file.where(f"fsdp_config.fsdp_{name}")
            yield Problem(f"fsdp_{name}: {said} is neither true nor false", where, "write `true` or `false`")


def _version(file: AccelerateFile) -> Iterator[Problem]:
    version = file.fsdp("version", "1")
    if version not in ("1", "2"):
        where = file.where("fsdp_config.fsdp_version")
        yield Problem(f"there is no FSDP of version {version}", where, "write `fsdp_version: 2`")
    elif version == "1":
        said = (
            f"fsdp_version: {version}" if "fsdp_config.fsdp_version" in file.values else "no fsdp_version, which is 1,"
        )
        yield Problem(
            f"{said} is the first FSDP: transformers gives it up, and saving crashed with it",
            file.where("fsdp_config.fsdp_version"),
            "write `fsdp_version: 2`",
        )


def _checkpointing(file: AccelerateFile, family: Family) -> Iterator[Problem]:
    if is_true(file.fsdp("activation_checkpointing")):
        shared = f"; and layers of {family.label} share keys and values" if family.kv_shared else ""
        yield Problem(
            "fsdp_activation_checkpointing renames modules, after which peft saves an empty adapter with exit code 0"
            + shared,
            file.where("fsdp_config.fsdp_activation_checkpointing"),
            "write `false`; memory.gradient_checkpointing recomputes, without reentrance, at no further communication",
        )
    elif is_true(file.fsdp("activation_checkpointing_offload")):
        yield Problem(
            "fsdp_activation_checkpointing_offload stops accelerate where its kind of checkpointing is not on",
            file.where("fsdp_config.fsdp_activation_checkpointing_offload"),
            "remove the line",
        )


def _wrapping(file: AccelerateFile, recipe: Recipe, family: Family) -> Iterator[Problem]:
    right = wrapped_layers(recipe, family)
    key = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"
    written = file.values.get(key)
    named = written if isinstance(written, list) else str(written or "").split(",")
    missing = [name.strip() for name in map(str, named) if name.strip() and name.strip() not in right]
    if missing:
        yield Problem(
            f"this {family.label} has no layers of class {', '.join(missing)}: accelerate would not find them",
            file.where(key),
            f"remove the line: gemma-tune names {', '.join(right)}",
        )
    policy = file.fsdp("auto_wrap_policy", "TRANSFORMER_BASED_WRAP").upper()
    if policy == "SIZE_BASED_WRAP":
        why = "groups by size would put the embedding, which is the head too, into two, which torch 2.13 refuses"
    elif policy != "TRANSFORMER_BASED_WRAP":
        why = f"fsdp_auto_wrap_policy: {policy} would gather the whole model at once"
    else:
        return
    yield Problem(why, file.where("fsdp_config.fsdp_auto_wrap_policy"), "write `TRANSFORMER_BASED_WRAP`")


def _state(file: AccelerateFile) -> Iterator[Problem]:
    kind = file.fsdp("state_dict_type", "FULL_STATE_DICT").upper()
    if kind not in STATE_DICTS:
        yield Problem(
            f"FSDP2 has no {kind}",
            file.where("fsdp_config.fsdp_state_dict_type"),
            f"one of {', '.join(STATE_DICTS)}",
        )
    if is_true(file.fsdp("cpu_ram_efficient_loading")) and not is_true(file.fsdp("sync_module_states", "true")):
        yield Problem(
            "accelerate launch stops: what one process has loaded must be sent to the others",
            file.where("fsdp_config.fsdp_sync_module_states"),
            "remove the line",
        )
    if is_true(file.fsdp("offload_params")) and is_true(file.text("use_cpu")):
        yield Problem(
            "on a CPU there is nothing to offload from (accelerate: Cannot access accelerator device)",
            file.where("fsdp_config.fsdp_offload_params"),
            "write `fsdp_offload_params: false`",
        )
    if ignored := file.fsdp("ignored_modules"):
        yield Problem(
            f"modules that FSDP ignores ({ignored}) would be whole on each process, and their gradients never added up",
            file.where("fsdp_config.fsdp_ignored_modules"),
            "remove the line",
        )


def _storage(file: AccelerateFile, recipe: Recipe, precision: Precision) -> Iterator[Problem]:
    """Packed 4-bit weights that are gathered as another type than they are stored as."""
    gathered = DTYPES.get(file.text("mixed_precision", "no"))
    if recipe.model.quantization == "nf4" and gathered not in (None, precision.weights):
        yield Problem(
            f"packed weights are stored as {precision.weights} and would be gathered as {gathered}, which rounds their "
            "bytes like numbers",
            file.where("mixed_precision"),
            "write `mixed_precision: 'no'`: types are the recipe's (model.precision)",
        )


def _groups(file: AccelerateFile) -> Iterator[Problem]:
    sizes = {
        name: (key, file.number(key) or 1)
        for name in ("dp_replicate", "dp_shard")
        if (key := f"parallelism_config.parallelism_config_{name}_size") in file.values
    }
    processes = file.number("num_processes")
    product = 1
    for _, size in sizes.values():
        product *= size
    if sizes and processes is not None and product != processes:
        text = " x ".join(str(size) for _, size in sizes.values())
        yield Problem(
            f"groups of {text} processes are not the {processes} of num_processes ({file.where('num_processes')})",
            file.where(next(iter(sizes.values()))[0]),
            "make dp_replicate x dp_shard equal to num_processes",
        )


def _types(file: AccelerateFile, family: Family) -> Iterator[Problem]:
    precision = file.text("mixed_precision", "no").lower()
    if precision not in _PRECISIONS:
        yield Problem(
            f"mixed_precision: {precision} is nothing that accelerate knows",
            file.where("mixed_precision"),
            "write `mixed_precision: 'no'`: types are the recipe's (model.precision)",
        )
    if precision == "fp16" and (file.kind == "FSDP" or family.fp16 != "plain"):
        why = "fp16 cannot be sharded" if file.kind == "FSDP" else f"{family.label} overflows fp16"
        yield Problem(
            f"mixed_precision: fp16, but {why}",
            file.where("mixed_precision"),
            "write `mixed_precision: 'no'`: types are the recipe's (model.precision)",
        )
    if precision == "fp8":
        yield Problem(
            "gemma-tune does not train in fp8", file.where("mixed_precision"), "write `mixed_precision: 'no'`"
        )
