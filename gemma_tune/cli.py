"""The command line: argv -> a command, and every failure -> an exit code and a message.

typer only parses. Each command here returns what is to be done, and `main` does it outside of typer, so that this one
place decides what becomes of an exception. A command's module is imported when it is chosen: `--help` imports neither
torch nor pydantic.

Exit codes: 0 done; 1 a bug of ours; 2 the user's input; 3 environment or access; 4 the training failed; 75 stopped by a
signal and resumable; 130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import typer

from gemma_tune import __version__, console
from gemma_tune.errors import AccessError, GemmaTuneError, LostProcess, UserError
from gemma_tune.privacy import keep_private

Job = Callable[[], int]

BROKEN_PIPE = 141
INTERRUPTED = 130

OVERRIDES_HELP = (
    "Values that replace the recipe's own: `optim.learning_rate=1e-4` or `--optim.learning_rate 1e-4`. "
    "A number picks a list item: `data.sources.0.name=mine.jsonl`."
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Unknown options are overrides; they reach the recipe reader, which knows the keys."""

app = typer.Typer(
    name="gemma-tune",
    help="Fine-tune Google's Gemma models from YAML recipes.",
    epilog="Start with: gemma-tune recipes list. `--debug` with any command shows the traceback of an error.",
    add_completion=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with gemma-tune.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(help="Data that is tokenised once, for many processes and runs.", rich_markup_mode=None)
app.add_typer(data_app, name="data")


class Resume(Enum):
    """What to do with checkpoints that are in the run folder already."""

    never = "never"
    auto = "auto"
    must = "must"


RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES_HELP, show_default=False)]
Resuming = Annotated[
    Resume, typer.Option(help="Go on from the newest good checkpoint: if there is one (auto), or fail (must).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Accelerate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Start on all GPUs by this accelerate file, or the shipped one of this name: ddp, fsdp2, ...",
        show_default=False,
    ),
]
NumProcesses = Annotated[
    int | None, typer.Option(min=1, help="Of all machines together. Default: a process for each GPU.")
]
NumMachines = Annotated[int | None, typer.Option(min=1, help="Default: what the scheduler says, else one.")]
MachineRank = Annotated[int | None, typer.Option(min=0, help="Of this machine. Default: what the scheduler says.")]
MainProcessIp = Annotated[str | None, typer.Option(help="Of the first machine. Default: what the scheduler says.")]
MainProcessPort = Annotated[int | None, typer.Option(min=1, max=65535, help="Where the machines meet.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.out(f"gemma-tune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def _training_command(stage: str, about: str) -> None:
    """Register the command of a stage: all have the same options."""

    @app.command(stage, context_settings=OVERRIDES, help=about)
    def train(
        context: typer.Context,
        recipe: RecipeFile,
        overrides: Overrides = None,
        resume: Resuming = Resume.never,
        accelerate: Accelerate = None,
        num_processes: NumProcesses = None,
        num_machines: NumMachines = None,
        machine_rank: MachineRank = None,
        main_process_ip: MainProcessIp = None,
        main_process_port: MainProcessPort = None,
    ) -> Job:
        company = (num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
        return _training(stage, context, recipe, overrides, resume, accelerate, company)


_training_command("sft", "Supervised fine-tuning: QLoRA, LoRA or full.")
_training_command("reward", "A reward model from pairs of answers.")
_training_command("dpo", "Direct preference optimisation from pairs of answers.")
_training_command("kto", "KTO, from single answers that are judged good or bad.")
_training_command("ppo", "PPO against a reward model or function, on one base.")


def _training(
    stage: str,
    context: typer.Context,
    recipe: str,
    overrides: Sequence[str] | None,
    resume: Resume,
    accelerate: str | None,
    company: Sequence[int | str | None],
) -> Job:
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    if accelerate is None and all(item is None for item in company):
        return lambda: _command("train").run(stage, path, changes, resume.value)
    return lambda: _command("launch").start(stage, path, changes, resume.value, accelerate, company)


class Template(Enum):
    """Schedulers that job files are written for."""

    slurm = "slurm"
    kubeflow = "kubeflow"
    skypilot = "skypilot"
    ray = "ray"


@app.command(context_settings=OVERRIDES)
def launch(
    context: typer.Context,
    recipe: RecipeFile,
    template: Annotated[Template, typer.Option(help="The scheduler.", show_default=False)],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="Their kind, for SkyPilot: H100, L4, ...", show_default=False)] = None,
    limit: Annotated[
        str | None,
        typer.Option("--time", help="Limit, for SLURM (default: 1-00:00:00) and Kubeflow.", show_default=False),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image with gemma-tune, for Kubeflow and SkyPilot.", show_default=False)
    ] = None,
    volume: Annotated[
        str | None, typer.Option(help="Shared storage: a claim for Kubeflow, a URI for SkyPilot.", show_default=False)
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            help="Accelerate file, or the name of a shipped one (default: ddp). Not for Ray.", show_default=False
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="File to write. Default: stdout.", show_default=False)] = None,
) -> Job:
    """Write a job file for SLURM, Kubeflow, SkyPilot or Ray.

    The job starts the recipe on all GPUs of all machines, goes on where it was stopped, and is put back into the queue
    when a signal stops it.
    """
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    order = (template.value, path, tuple(changes), nodes, gpus_per_node, gpu, limit, image, volume, accelerate)
    return lambda: _command("launch").render(order, out)


MeshText = Annotated[
    str | None, typer.Option("--mesh", help="TPU chips: fsdp=4,tp=2. Default: all fsdp.", show_default=False)
]


@app.command(context_settings=OVERRIDES)
def tpu(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    mesh: MeshText = None,
    resume: Resuming = Resume.never,
) -> Job:
    """LoRA and QLoRA SFT on the TPUs of this host, with JAX.

    In an environment of its own: make setup-tpu, then .venv-tpu/bin/gemma-tune tpu RECIPE.
    """
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    return lambda: _command("tpu").sft(path, changes, mesh, resume.value)


@app.command(context_settings=OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="Plan for another: cpu, t4, l4, rtx4090, a100, a100-80gb, h100, 8xh100. Default: this one. Several: "
            "4xl4 has four GPUs, 2x8xh100 is two nodes of eight."
        ),
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Plan as under this accelerate file, and look for what would fail there."),
    ] = None,
    mesh: MeshText = None,
    as_json: AsJson = False,
) -> Job:
    """Print a recipe's plan, with reasons and memory.

    Each derived value comes with its reason, and the memory that the run will need term by term. Nothing is loaded.
    """
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    if machine and re.match(r"v\d", machine):  # v5e-8: a TPU, whose compiler says what a step needs
        return lambda: _command("tpu").check(path, changes, machine, mesh, as_json)
    return lambda: _command("check").run(path, changes, machine, as_json, accelerate)


@app.command(context_settings=OVERRIDES)
def show(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to show.")] = 3,
    as_json: AsJson = False,
) -> Job:
    """Show training rows: tokens, loss mask, prompt.

    Every token that carries loss is coloured; pack borders and the prompt as it will be at inference are shown as well.
    """
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    return lambda: _command("show").run(path, changes, rows, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> Job:
    """Examine this machine and its libraries."""
    return lambda: _command("doctor").run(as_json)


@app.command()
def chat(
    target: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A hub id, a model or run folder, or a GGUF file.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Answer this and leave; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens in an answer at most.")] = 256,
    system: Annotated[str | None, typer.Option(help="A system turn.")] = None,
) -> Job:
    """Talk to a model or to the result of a run."""
    return lambda: _command("chat").run(target, list(prompts or ()), max_new_tokens, system)


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL", help="A run, adapter or model folder, a hub id, or a GGUF file."),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Two targets on the held-out rows of the first, with intervals.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Use the held-out rows of this recipe. A plain model needs one, and is opened in its type.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, e.g. arc_easy,piqa.", show_default=False)
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A table of tasks: gemma-card, the Gemma 1.1 model card.", show_default=False)
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder with further tasks, as YAML files.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in a task's prompt. Default: the task's.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows, prompts, or items of a task at most.", show_default=False)
    ] = None,
    memorisation: Annotated[
        bool, typer.Option("--memorisation", help="Planted canaries, and training rows that it writes verbatim.")
    ] = False,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure what the training began with too.")] = True,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in an answer at most. Default: the run's.", show_default=False)
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask tasks as user turns, or as plain text. Default: turns if it was tuned to answer.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="File to write. Default: evaluation.json in the run.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> Job:
    """Evaluate a run or a model.

    Without further options: loss, perplexity and token accuracy on the run's held-out rows, fixed prompts answered
    before and after, how many answers end by themselves and are well-formed; of a reward model how many pairs it rates
    right, and whether it counts tokens. With --tasks, --suite, --memorisation or --compare only that is measured, and
    what evaluation.json holds already stays.
    """

    def job() -> int:
        command = _command("evaluate")
        names = tuple(name for name in (tasks or "").split(",") if name.strip())
        if tasks is not None and not names:
            raise UserError("no task is named", where="--tasks", fix="name some: --tasks arc_easy,piqa")
        return command.run(
            targets,
            command.Wanted(
                compare=compare,
                recipe=recipe,
                tasks=tuple(name.strip() for name in names),
                suite=suite,
                include_path=include_path,
                shots=shots,
                limit=limit,
                memorisation=memorisation,
                base=base,
                max_new_tokens=max_new_tokens,
                output=output,
                as_json=as_json,
                chat=chat,
            ),
        )

    return job


class BaseKind(Enum):
    """What an adapter is merged into."""

    original = "original"
    dequantized = "dequantized"


class FileType(Enum):
    """Types of safetensors files."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Format(Enum):
    """What export writes."""

    safetensors = "safetensors"
    gguf = "gguf"
    lora_gguf = "lora-gguf"
    ollama = "ollama"
    adapter = "adapter"


Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="A run or adapter folder; several of one base are combined."),
]
Out = Annotated[str | None, typer.Option(help="Folder to make. Default: in the run.", show_default=False)]
Into = Annotated[
    BaseKind, typer.Option("--base", help="Into the 16-bit base, or the dequantised 4-bit base of the training.")
]
AsType = Annotated[
    FileType | None, typer.Option(help="Type of the safetensors. Default: the base's.", show_default=False)
]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", help="Which one of the run's, e.g. checkpoint-40.", show_default=False)
]
Shares = Annotated[
    str | None, typer.Option("--weights", help="Weights of several adapters, e.g. 0.7,0.3.", show_default=False)
]
BasePath = Annotated[str | None, typer.Option(help="Where the base is, if no longer where it was.", show_default=False)]


@app.command()
def merge(
    runs: Runs,
    out: Out = None,
    base: Into = BaseKind.original,
    dtype: AsType = None,
    adapter: AdapterName = None,
    weights: Shares = None,
    base_path: BasePath = None,
) -> Job:
    """Merge an adapter into its base, and prove it.

    The result is compared with base + adapter in fp32 and refused if it differs.
    """
    shares = _numbers(weights)
    kind = dtype.value if dtype else None
    return lambda: _command("merge").run(runs, out, base.value, kind, adapter, shares, base_path)


@app.command()
def export(
    runs: Runs,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.safetensors,
    out: Out = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Type of a GGUF: f32, bf16, f16, q8_0 (default), q6_k, q4_k_m, ...", show_default=False),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Open it and compare its texts with the adapter's.")] = False,
    base: Into = BaseKind.original,
    dtype: AsType = None,
    adapter: AdapterName = None,
    weights: Shares = None,
    base_path: BasePath = None,
) -> Job:
    """Write a run or a model as servers load it."""
    shares = _numbers(weights)
    kind = dtype.value if dtype else None
    return lambda: _command("export").run(
        runs, format.value, out, base.value, kind, quantize, verify, adapter, shares, base_path
    )


@app.command()
def gather(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN/checkpoint-N", help="A checkpoint in parts.")],
    out: Annotated[str | None, typer.Option(help="Folder to make. Default: beside it.", show_default=False)] = None,
) -> Job:
    """Make one folder of a sharded checkpoint: weights and config."""
    return lambda: _command("gather").run(checkpoint, out)


@app.command()
def push(
    target: Annotated[str, typer.Argument(metavar="RUN|DIR", help="A run, or what merge or export wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository of the hub: account/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch. Default: main.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
) -> Job:
    """Upload a result to the hub, with its licence papers."""
    return lambda: _command("push").run(target, repo, private, revision, message)


def _numbers(text: str | None) -> list[float]:
    """`0.7,0.3` -> numbers.

    Raises:
        UserError: they are none.
    """
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"'{text}' is no list of numbers", where="--weights", fix="write e.g. --weights 0.7,0.3")
    return numbers


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    output: Annotated[
        str | None, typer.Option(help="File to write. Default: report.html in the run.", show_default=False)
    ] = None,
) -> Job:
    """Write report.html of a run again: curves, answers, data, plan.

    Every training command writes it at its end. One file that asks the network for nothing.
    """
    return lambda: _command("report").run(run, output)


@recipes_app.command("list")
def recipes_list() -> Job:
    """List the recipes that come with gemma-tune."""
    return lambda: _command("recipes").list_()


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from `gemma-tune recipes list`.")],
    destination: Annotated[str | None, typer.Argument(help="File or folder. Default: this folder.")] = None,
) -> Job:
    """Copy one of them, to be changed."""
    return lambda: _command("recipes").copy(name, destination)


@recipes_app.command("schema")
def recipes_schema() -> Job:
    """Print the JSON Schema of recipes, for editors."""
    return lambda: _command("recipes").schema()


@recipes_app.command("reference")
def recipes_reference() -> Job:
    """Print every key of a recipe as Markdown: docs/recipes.md."""
    return lambda: _command("recipes").reference()


PreparedRoot = Annotated[
    str | None,
    typer.Option("--out", help="Below this folder instead of the cache, e.g. on shared storage.", show_default=False),
]


@data_app.command("prepare", context_settings=OVERRIDES)
def data_prepare(
    context: typer.Context, recipe: RecipeFile, overrides: Overrides = None, out: PreparedRoot = None
) -> Job:
    """Tokenise a recipe's data once; its runs find it.

    They find it by what it was made of: settings, tokenizer, contents of the files. Nothing is trained, no weight is
    loaded, and no GPU is needed.
    """
    path, changes = split_recipe([recipe, *(overrides or ())], context)
    return lambda: _command("data").prepare(path, changes, out)


@data_app.command("list")
def data_list(out: PreparedRoot = None) -> Job:
    """List what is prepared, and where."""
    return lambda: _command("data").list_(out)


def _command(name: str) -> Any:
    return import_module(f"gemma_tune.commands.{name}")


def split_recipe(words: Sequence[str], context: typer.Context) -> tuple[str, list[str]]:
    """The recipe's path and the overrides, whatever their order.

    Raises:
        UserError: no recipe is named, or an option is misspelt.
    """
    overrides: list[str] = []
    recipe = None
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            _refuse_misspelt_option(word, context)
            overrides.append(word)
            if "=" not in word:
                overrides.extend(value for value in [next(rest, None)] if value is not None)
        elif word.startswith("-"):
            raise _no_such_option(word, context)
        elif recipe is None and not _is_assignment(word):
            recipe = word
        else:
            overrides.append(word)
    if recipe is None:
        raise UserError("no recipe is named", where="command line", fix=f"{context.command_path} RECIPE.yaml")
    return recipe, overrides


def _is_assignment(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and all(part.isidentifier() or part.isdecimal() for part in key.split("."))


def _refuse_misspelt_option(word: str, context: typer.Context) -> None:
    """`--resum auto` and `--verbose` look like overrides of keys; say what they really are.

    What resembles a key of a recipe, here or in another tool, is left to the recipe reader.
    """
    name = word.removeprefix("--").partition("=")[0]
    if "." in name:
        return
    from gemma_tune.recipe.names import nearest
    from gemma_tune.recipe.schema import Recipe
    from gemma_tune.recipe.unknown import resembles_a_key

    if name.replace("-", "_") in Recipe.model_fields:
        return
    options = [option.removeprefix("--") for parameter in context.command.params for option in parameter.opts]
    near = nearest(name, options, limit=1)
    if near:
        raise UserError(f"no such option: --{name}", where="command line", fix=f"did you mean --{near[0]}?")
    if not resembles_a_key(name):
        raise _no_such_option(f"--{name}", context)


def _no_such_option(word: str, context: typer.Context) -> UserError:
    return UserError(f"no such option: {word}", where="command line", fix=f"see: {context.command_path} --help")


_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
}
"""Failures of the operating system that are the machine's, wherever they happen."""
_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
"""Those of a path that nobody could have made: it was written so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run gemma-tune with `argv` (default: sys.argv without its first item) and return the exit code."""
    keep_private(os.environ)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars are for a terminal, not for a log
    # A terminal that cannot show a character gets its number instead of a crash, and one may type what is no UTF-8.
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    try:
        code = _run([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; give it something that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        _debug_traceback(debug)
        console.err("interrupted")
        return INTERRUPTED
    except Exception as error:
        _debug_traceback(debug)
        failure = _as_ours(error)
        if not _left_to_the_launcher(failure):
            rank = os.environ.get("RANK", "")
            _report(failure, int(rank) if rank.isdecimal() else 0)
        return failure.exit_code


_SAME_SECONDS, _LOST_SECONDS = 3.0, 10.0


def _report(failure: GemmaTuneError, rank: int) -> None:
    """Print a failure; of several processes, once, and the one that failed first.

    A launcher ends all processes as soon as one leaves. So the first process speaks at once; another waits a moment, in
    which it is ended where the first one has failed too; and one that only lost another waits until that has spoken.
    """
    if isinstance(failure, LostProcess):
        time.sleep(_LOST_SECONDS)
    if rank:
        time.sleep(_SAME_SECONDS)
        console.err(f"process {rank} on {socket.gethostname()}:")
    console.print_error(failure)


def _left_to_the_launcher(failure: GemmaTuneError) -> bool:
    """One of several processes reports to who started it; ours prints the first of them, torchrun only that there are.

    Called while the exception is being handled.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from gemma_tune.launch.failure import report_failure
    from gemma_tune.launch.world import ASKED

    return report_failure(failure, os.environ, time.time()) and ASKED in os.environ


def _debug_traceback(wanted: bool) -> None:
    if wanted:
        sys.stderr.write(console.masked(traceback.format_exc()))


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    job = command.main(args=arguments, prog_name="gemma-tune", standalone_mode=False)
    return (job() or 0) if callable(job) else int(job or 0)


def _as_ours(error: Exception) -> GemmaTuneError:
    """Any exception as one that we can show."""
    if isinstance(error, GemmaTuneError):
        return error
    # typer brings its own copy of click since 0.16; both mark a usage error by these two attributes.
    if hasattr(error, "format_message") and getattr(error, "exit_code", None) == 2:
        return _usage_error(error)
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        return AccessError(
            f"{error.strerror}", where=str(error.filename or ""), fix="check the disk, its quota and the rights"
        )
    if isinstance(error, OSError) and error.errno in _PATH:
        return UserError(f"{error.strerror}", where=str(error.filename or "")[:80], fix="correct the path")
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":  # pathlib's words
        return UserError("a path begins with ~, and that home folder is not known", fix="write it out, or set HOME")
    if isinstance(error, MemoryError):
        return AccessError("this machine has not enough memory", fix="gemma-tune check RECIPE shows what a run needs")
    summary = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return GemmaTuneError(
        f"internal error: {summary}", fix="run the same command with --debug and report what it prints: this is a bug"
    )


def _usage_error(error: Any) -> UserError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gemma-tune"
    message = error.format_message().strip()
    fix = f"see: {path} --help"
    name = getattr(error, "message", "").partition("'")[2].partition("'")[0]
    if message.startswith("No such command") and name.endswith((".yaml", ".yml")):
        fix = f"gemma-tune sft {name}"
    return UserError(message, where="command line", fix=fix)
