"""Files of accelerate: where the shipped ones are, and what one says, with lines. Read without accelerate and torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemma_tune.errors import Problem, UserError
from gemma_tune.plan.machine import STATE_DICTS, Launch, is_true
from gemma_tune.recipe import yaml
from gemma_tune.recipe.names import did_you_mean, nearest
from gemma_tune.recipe.shipped import shipped_folder

FOLDER: Final = "accelerate_configs"

# fmt: off
KEYS = frozenset({
    "compute_environment", "distributed_type", "mixed_precision", "use_cpu", "debug", "num_processes",
    "machine_rank", "num_machines", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend",
    "same_network", "main_training_function", "enable_cpu_affinity", "downcast_bf16", "tpu_name", "tpu_zone",
    "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "dynamo_backend",
    "fp16", "fsdp_config", "parallelism_config", "deepspeed_config", "megatron_lm_config", "mpirun_config",
    "fp8_config", "dynamo_config",
})
# fmt: on
"""Keys that accelerate 1.15 knows (commands/config/config_args.py); it stops at any other."""

_LISTS = frozenset({"commands", "tpu_vm", "tpu_env"})
_LISTS_IN_SECTIONS = ("fsdp_config.fsdp_transformer_layer_cls_to_wrap", "fsdp_config.fsdp_ignored_modules")


def accelerate_file(name: str) -> Path:
    """The file that `--accelerate` names: a path, or the name of a shipped one with or without `.yaml`.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_files()
    known = shipped.get(name.removeprefix(f"{FOLDER}/").removesuffix(".yaml"))
    if known is not None:
        return known
    if len(path.parts) > 1 or path.suffix in (".yaml", ".yml", ".json"):
        raise UserError("there is no such file", where=name, fix=f"shipped are: {', '.join(shipped)}")
    hint = did_you_mean(nearest(name, shipped)) or f"there are: {', '.join(shipped)}"
    raise UserError(f"there is no accelerate file {name!r}", where="--accelerate", fix=hint)


def shipped_files() -> dict[str, Path]:
    """Name -> file of those that come with gemma-tune."""
    return {path.stem: path for path in sorted(shipped_folder(FOLDER).glob("*.yaml"))}


@dataclass(frozen=True, slots=True)
class AccelerateFile:
    """What a file says. Keys are dotted where they stand in a section: `fsdp_config.fsdp_version`.

    Attributes:
        path: the file.
        values: key -> value, in the file's order; keys of `fsdp_config` carry their prefix, as accelerate adds it.
        lines: key -> its line.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, key: str) -> str:
        """`file:line` of a key; the file alone where the key is not written."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)

    def text(self, key: str, default: str = "") -> str:
        """A value as text; null and what is not written are `default`."""
        value = self.values.get(key)
        return default if value is None else str(value)

    def fsdp(self, key: str, default: str = "") -> str:
        return self.text(f"fsdp_config.fsdp_{key}", default)

    def number(self, key: str) -> int | None:
        """A positive whole number; None where it is left out, as accelerate's -1 does.

        Raises:
            UserError: it is none.
        """
        value = self.values.get(key)
        if value in (None, -1, 0):
            return None
        if isinstance(value, str) and re.fullmatch(r"[1-9]\d*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{key} is no whole number: {value!r}", where=self.where(key), fix="write a whole number")
        return value

    @property
    def kind(self) -> str:
        """Its distributed_type. Unquoted, YAML 1.1 reads `NO` as false."""
        kind = self.text("distributed_type", "NO").upper()
        return "NO" if kind == "FALSE" else kind


def read_accelerate_file(path: Path) -> AccelerateFile:
    """Read the YAML file `path`.

    Raises:
        UserError: it cannot be read, is no YAML, or no mapping; or a section or value has another form than accelerate
            reads.
    """
    name = str(path)
    document = yaml.parse(yaml.decode(yaml.read_bytes(name), name), name, mapping=False)
    if not isinstance(document.root.value, dict):
        raise UserError("is no accelerate file: it holds no keys", where=name, fix="`accelerate config` writes one")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems = list(document.problems)
    for key, node in document.root.value.items():
        if key in KEYS and (problem := _misshapen(key, node.value, f"{name}:{node.line}")):
            problems.append(problem)
            continue
        if key == "mixed_precision" and node.plain and node.text.lower() in ("no", "off", "false"):
            what = f"{node.text} without quotes is false for accelerate, which stops at it"
            problems.append(Problem(what, f"{name}:{node.line}", "write `mixed_precision: 'no'`"))
        content = node.value
        section = (
            {key: node} if not isinstance(content, dict) else {f"{key}.{inner}": one for inner, one in content.items()}
        )
        for dotted, one in section.items():
            full = re.sub(r"^fsdp_config\.(?!fsdp_)", "fsdp_config.fsdp_", dotted)
            inside = full.startswith(("fsdp_config.", "parallelism_config."))
            if inside and not _is_single(one.value, full in _LISTS_IN_SECTIONS):
                problems.append(Problem(f"{full} is no single value", f"{name}:{one.line}", "write one value"))
            values[full] = [item.value for item in one.value] if isinstance(one.value, list) else one.value
            lines[full] = one.line
    if problems:
        raise UserError.of(problems)
    return AccelerateFile(path, values, lines)


def _misshapen(key: str, value: Any, where: str) -> Problem | None:
    """A section that is none, or a single value that is a list or a section."""
    if key.endswith("_config"):
        if value is None or isinstance(value, dict):
            return None
        return Problem(f"{key} is no section", where, "write its keys below it, indented, or remove the line")
    if key == "gpu_ids" and not isinstance(value, str | None):
        return Problem("gpu_ids is no text, which accelerate splits at commas", where, "write such as `gpu_ids: '0,1'`")
    if _is_single(value, key in _LISTS):
        return None
    return Problem(f"{key} is no single value", where, "write one value behind it")


def _is_single(value: Any, may_be_list: bool) -> bool:
    if may_be_list and isinstance(value, list):
        return all(_is_single(item.value, False) for item in value)
    return not isinstance(value, list | dict)


def launch_in(file: AccelerateFile, processes: int) -> Launch:
    """What accelerate's launcher would tell each process under this file.

    Args:
        file: the file.
        processes: how many there are where the file leaves it open.

    Raises:
        UserError: a number is none.
    """
    sharded = file.kind == "FSDP"
    mesh = any(key.startswith("parallelism_config.") for key in file.values)
    size = "parallelism_config.parallelism_config_{}_size"
    other = [f"{name.upper()} parallelism" for name in ("tp", "cp", "sp") if (file.number(size.format(name)) or 1) > 1]
    if engine := {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.get(file.kind):
        other.append(engine)
    return Launch(
        world_size=1 if file.kind == "NO" else file.number("num_processes") or processes,
        nodes=file.number("num_machines") or 1,
        fsdp=(file.number("fsdp_config.fsdp_version") or 1) if sharded else None,
        replicas=(file.number(size.format("dp_replicate")) or 1) if mesh else None,
        shards=(file.number(size.format("dp_shard")) or 1) if mesh else None,
        checkpoint=STATE_DICTS.get(file.fsdp("state_dict_type").upper()) if sharded else None,
        offload=is_true(file.fsdp("offload_params")) if sharded else None,
        reshard_after_forward=is_true(file.fsdp("reshard_after_forward", "true")) if sharded else None,
        other=", ".join(other),
    )
