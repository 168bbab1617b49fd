"""Job files for schedulers, from the texts in templates/.

The files hold the command that one would type, `gemma-tune STAGE RECIPE --accelerate FILE --resume auto`, once a node.
Number, rank and address of the nodes are found in the scheduler's variables when the job runs (`nodes.py`), so a file
stays right when its number of nodes is edited. Sources of what the files say are in their own comments.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import Problem, UserError
from gemma_tune.recipe.schema import Recipe

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"slurm": "slurm.sh", "kubeflow": "kubeflow.yaml", "skypilot": "skypilot.yaml", "ray": "ray.txt"}

DDP = "ddp"
"""The accelerate file of a job for which none is named."""

SHARED = "/shared"
"""Where the files mount the storage that all nodes see."""

CPUS_A_GPU = 4
"""Cores that a SLURM job asks for with each GPU: one for the process, others for tokenising. Else a task gets one."""

_TAKES = {
    "slurm": {"time"},
    "kubeflow": {"time", "image", "volume"},
    "skypilot": {"gpu", "image", "volume"},
    "ray": set[str](),
}
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_GPU = re.compile(r"[A-Za-z0-9.-]+")
_BREAKS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")  # YAML takes them for ends of lines, or not at all
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")


@dataclass(frozen=True, slots=True)
class Job:
    """What a job file is to start.

    Attributes:
        template: a key of `FILES`.
        recipe: path of the recipe.
        overrides: its overrides, in order.
        nodes: machines.
        gpus: GPUs of each.
        gpu: their kind as SkyPilot names it.
        time: limit as SLURM writes it.
        image: container image that holds gemma-tune.
        volume: storage that all nodes see: a PersistentVolumeClaim, or a URI of SkyPilot's.
        accelerate: accelerate file or the name of a shipped one; None for `DDP`, and for Ray, which takes none.
    """

    template: str
    recipe: str
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    gpu: str | None
    time: str | None
    image: str | None
    volume: str | None
    accelerate: str | None


def render_job(job: Job, recipe: Recipe, text: str) -> str:
    """The job file of `job`.

    Args:
        job: what is asked for.
        recipe: the recipe, its overrides applied.
        text: the recipe as written; Kubeflow's file carries it.

    Raises:
        UserError: options that the scheduler has no place for, or that it needs and were not given.
    """
    _check_options(job, recipe)
    values = {
        "name": job_name(recipe.output),
        "nodes": str(job.nodes),
        "gpus": str(job.gpus),
        "workers": str(job.nodes * job.gpus),
        "cpus": str(CPUS_A_GPU * job.gpus),
        "stage": recipe.stage,
        # It stands in comments, which it must not end.
        "recipe": re.sub(r"[^\w ./+,=@-]", "?", job.recipe),
    }
    make = {"slurm": _slurm, "kubeflow": _kubeflow, "skypilot": _skypilot, "ray": _ray}[job.template]
    values |= make(job, recipe, text)
    return _filled((TEMPLATES / FILES[job.template]).read_text(encoding="utf-8"), values)


def job_name(output: str) -> str:
    """A name that every scheduler takes, from the run folder: small letters, digits and hyphens, 50 at most."""
    plain = re.sub(r"[^a-z0-9]+", "-", Path(output).name.lower()).strip("-")
    return f"gemma-{plain}"[:50].rstrip("-")


def seconds_of(time: str) -> int:
    """A time limit of SLURM's in seconds: minutes, HH:MM:SS, D-HH, D-HH:MM:SS (sbatch(1), --time).

    Raises:
        UserError: it is none.
    """
    found = _TIME.fullmatch(time)
    if not found:
        raise UserError(f"'{time}' is no time limit", where="--time", fix="write e.g. 12:00:00 or 2-00:00:00")
    days, *rest = (int(part) if part else None for part in found.groups())
    given = [part for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:
        hours, minutes, seconds = 0, given[0], given[1] if len(given) == 2 else 0
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def _check_options(job: Job, recipe: Recipe) -> None:
    given = {name for name in ("time", "gpu", "image", "volume") if getattr(job, name) is not None}
    problems = [
        Problem(f"{job.template} has no place for it", f"--{name}", f"leave --{name} out")
        for name in sorted(given - _TAKES[job.template])
    ]
    if job.template == "kubeflow":
        problems += [
            Problem("is needed: a pod brings nothing of this machine", f"--{name}", f"--{name} {example}")
            for name, example in (("image", "REGISTRY/gemma-tune:TAG"), ("volume", "CLAIM"))
            if name not in given
        ]
    if job.template == "skypilot" and "gpu" not in given:
        problems.append(Problem("is needed: SkyPilot looks for machines by it", "--gpu", "--gpu H100"))
    if job.template == "skypilot" and job.nodes > 1 and "volume" not in given:
        problems.append(
            Problem("is needed: all nodes read the run folder", "--volume", "--volume s3://BUCKET, or one node")
        )
    if job.template == "ray" and not Path(recipe.output).is_absolute():
        problems.append(
            Problem(
                f"{recipe.output} would lie in a folder that Ray makes on each machine and removes",
                "output",
                f"output=/STORAGE/{recipe.output}, where all machines see it",
            )
        )
    if job.gpu is not None and not _GPU.fullmatch(job.gpu):
        problems.append(Problem(f"{job.gpu!r} names no kind of GPU", "--gpu", "letters, digits, . and -, such as H100"))
    if job.template == "ray" and job.accelerate is not None:
        problems.append(
            Problem(
                "Ray starts the processes, without an accelerate file",
                "--accelerate",
                "leave it out; distributed.strategy: fsdp2 in the recipe asks for FSDP",
            )
        )
    if job.time is not None:
        seconds_of(job.time)
    if problems:
        raise UserError.of(problems)


def _command(job: Job, recipe: Recipe, path: str, *more: str) -> list[str]:
    words = ["gemma-tune", recipe.stage, path, *job.overrides, *more]
    return [*words, "--accelerate", job.accelerate or DDP, "--resume", "auto"]


def _on_shared(recipe: Recipe) -> list[str]:
    """The override that puts the run folder onto the shared storage; none where the recipe names a full path."""
    return [] if Path(recipe.output).is_absolute() else [f"output={SHARED}/{recipe.output}"]


def _slurm(job: Job, recipe: Recipe, text: str) -> dict[str, str]:
    return {"time": job.time or "1-00:00:00", "command": shlex.join(_command(job, recipe, job.recipe))}


def _kubeflow(job: Job, recipe: Recipe, text: str) -> dict[str, str]:
    words = _command(job, recipe, "/recipe/recipe.yaml", *_on_shared(recipe))
    deadline = f"  activeDeadlineSeconds: {seconds_of(job.time)}\n" if job.time else ""
    return {
        "recipe_text": "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines()).rstrip("\n"),
        # Kubernetes puts variables in for $(NAME) in a command; $$ stands for one $.
        "command": "\n".join(f"      - {_quoted(word.replace('$', '$$'))}" for word in words),
        "deadline": deadline,
        "image": _quoted(job.image),
        "volume": _quoted(job.volume),
        "shared": SHARED,
    }


def _skypilot(job: Job, recipe: Recipe, text: str) -> dict[str, str]:
    words = _command(job, recipe, job.recipe, *(_on_shared(recipe) if job.volume else []))
    mount = f"  {SHARED}:\n    source: {_quoted(job.volume)}\n    mode: MOUNT_CACHED\n"
    return {
        "accelerators": _quoted(f"{job.gpu}:{job.gpus}"),
        "image": f"  image_id: {_quoted(f'docker:{job.image}')}\n" if job.image else "",
        "setup": "" if job.image else "setup: |\n  pip install .  # of the folder that you start from: a checkout\n",
        "storage": f"file_mounts:\n{mount}" if job.volume else "",
        "home": f"{SHARED}/huggingface" if job.volume else "~/.cache/huggingface",
        # A block of YAML ends at a line that is not indented, and leaves its indentation out again.
        "command": shlex.join(words).replace("\n", "\n  "),
    }


def _ray(job: Job, recipe: Recipe, text: str) -> dict[str, str]:
    words = [recipe.stage, job.recipe, *job.overrides, "--resume", "auto"]
    return {"arguments": json.dumps(words, ensure_ascii=False), "quoted_name": json.dumps(job_name(recipe.output))}


def _quoted(text: str | None) -> str:
    """`text` as a double-quoted scalar of YAML. Not in ASCII: JSON's pairs of surrogates are two broken signs there."""
    return _BREAKS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(text, ensure_ascii=False))


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with the value of each `{{name}}`; a name without a value is a bug and raises KeyError."""
    return _PLACE.sub(lambda found: values[found[1]], text)
