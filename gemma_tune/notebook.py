"""What a notebook needs around the command line, so that each of its cells is one call.

`begin` is the first of them. After it, `%gemma_tune sft recipe.yaml` runs that command in a process of its own:

- What it holds of the GPU's memory is free again when the cell ends, and the kernel imports neither torch nor numpy.
- It prints while it runs. `%%bash` shows everything at the end in Colab's IPython (7.34).
- A command that fails ends the cell, and "run all" stops there. With `!gemma-tune` both would go on.
- Interrupting the cell asks the command to stop, once, and waits: a run writes a checkpoint. The same happens to a run
  whose kernel is killed.

Everything works outside of Colab too; what belongs to Colab (secrets, Drive, downloads) is left out there.
"""

from __future__ import annotations

import codecs
import html
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from gemma_tune.errors import AccessError, GemmaTuneError, UserError
from gemma_tune.launch.parent import LAUNCHER
from gemma_tune.recipe.shipped import copy_shipped

DRIVE = Path("/content/drive")
"""Where Colab mounts Google Drive."""

ON_DRIVE = DRIVE / "MyDrive" / "gemma-tune"
"""The folder in which runs outlive a session."""

SHOWN_VERSIONS = ("torch", "numpy", "pandas", "transformers", "trl", "peft", "accelerate", "bitsandbytes")

RESUMABLE = 75


class CommandFailed(GemmaTuneError):
    """A command ended with another exit code than 0, which is `exit_code` here. What it printed says why."""

    def __init__(self, words: Sequence[str], code: int) -> None:
        fix = "run this cell again to go on" if code == RESUMABLE else "see what it printed above"
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        super().__init__(f"gemma-tune {shlex.join(words)} ended with {how}", fix=fix)
        self.exit_code = code

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback, which would be of no use here."""
        return [f"error: {self}"]


def begin(recipe: str, *, drive: bool = True) -> None:
    """Token, Google Drive, the recipe, and `%gemma_tune`. Prints where and with what the next cells will run.

    In Colab the secret HF_TOKEN becomes the environment variable of this name, and with `drive` the working folder is
    `ON_DRIVE`. `recipe` is copied to the working folder, unless it is there already.

    Args:
        recipe: `NAME.yaml`, a shipped recipe or a file of one's own.
        drive: mount Google Drive and work there. Without effect outside of Colab.

    Raises:
        UserError: there is no such recipe.
        AccessError: Google Drive cannot be mounted.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        load_ipython_extension(shell)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for name in replaced():
        print(f"note: {name} was imported before it was replaced. Cells of your own that use it need a restart first")
    print(graphics())
    if in_colab():
        print(take_secret())
        if drive:
            mount_drive()
    elif not os.environ.get("HF_TOKEN"):
        print("HF_TOKEN is not set: the token of `hf auth login` is used, if there is one")
    if not Path(recipe).exists():
        copy_shipped(recipe, Path(recipe).name)
    print(f"working in {Path.cwd()}")


def load_ipython_extension(shell: Any) -> None:
    """Make the line magic `%gemma_tune` known; `%load_ext gemma_tune.notebook` calls this."""
    shell.register_magic_function(lambda line: _command(shlex.split(line)), "line", "gemma_tune")


def _command(words: list[str]) -> None:
    """`run`, but for a merge that is there already: after a disconnect all cells are run again."""
    if made := merged_already(words):
        print(f"{made} is there already, and newer than the adapter; remove it to have it made again")
    else:
        run(*words)


def merged_already(words: Sequence[str]) -> Path | None:
    """The folder that `merge RUN` would make, where it was made after the last change of the run's adapter."""
    if len(words) != 2 or words[0] != "merge":
        return None
    weights = Path(words[1]) / "adapter" / "adapter_model.safetensors"
    made = Path(words[1]) / "merged"
    written = made / "config.json"
    there = weights.is_file() and written.is_file()
    return made if there and written.stat().st_mtime >= weights.stat().st_mtime else None


def run(*words: str) -> None:
    """`gemma-tune WORDS` in a process of its own, whose output appears here while it runs.

    Raises:
        CommandFailed: it ended with another exit code than 0.
    """
    sys.stdout.flush()
    child = subprocess.Popen(
        command_of(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment_of(os.environ),
        # The kernel's group gets an interrupt too. Twice would end a run without a checkpoint.
        process_group=0,
    )
    while True:
        try:
            _show(child)
            code = child.wait()
            break
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
    if code:
        raise CommandFailed(words, code)


def command_of(words: Sequence[str]) -> list[str]:
    """The program and its arguments: this package in this Python, whatever PATH says."""
    return [sys.executable, "-m", "gemma_tune", *words]


def environment_of(kernel: Mapping[str, str]) -> dict[str, str]:
    """The variables of a command: the kernel's, but for those by which it asks for colour.

    ipykernel sets FORCE_COLOR, which makes a progress bar redraw itself, and a cell keeps each state of it as a line.
    """
    asks_for_colour = ("FORCE_COLOR", "CLICOLOR_FORCE")
    kept = {name: value for name, value in kernel.items() if name not in asks_for_colour}
    return kept | {"PYTHONUNBUFFERED": "1", LAUNCHER: str(os.getpid())}


def _show(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while piece := os.read(child.stdout.fileno(), 1 << 16):
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()


def show_report(run_folder: str) -> None:
    """Write `report.html` of a run anew and show it in the cell.

    Raises:
        CommandFailed: `gemma-tune report` did.
    """
    from IPython.display import HTML, display

    run("report", run_folder)
    page = html.escape((Path(run_folder) / "report.html").read_text("utf-8"), quote=True)
    # A frame of its own: the page's style must not reach the notebook.
    display(HTML(f'<div><iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe></div>'))


def download(folder: str) -> None:
    """Bring `folder` to the user's machine: through the browser, unless it lies on Google Drive or not in Colab.

    Raises:
        UserError: there is no such folder.
        AccessError: the disk has no room for the archive.
    """
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError("there is no such folder", where=folder, fix="run the cells above first")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{path}: {size / 2**20:,.0f} MiB")
    if not in_colab():
        return
    if path.is_relative_to(DRIVE):
        print(f"on your Google Drive: {path.relative_to(DRIVE)}")
        return
    archive = pack(path)
    import_module("google.colab.files").download(str(archive))


def pack(folder: Path) -> Path:
    """`folder.zip` beside it. Weights do not become smaller by compression, so there is none."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if shutil.disk_usage(folder).free < size:
        raise AccessError("no room for a copy", where=str(folder), fix=f"{size / 2**30:.1f} GiB are needed")
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, Path(folder.name) / path.relative_to(folder))
    return archive


# --- Colab


def in_colab() -> bool:
    """Whether this is Colab, whose kernel has google.colab imported from the start."""
    return "google.colab" in sys.modules


def take_secret() -> str:
    """Colab's secret HF_TOKEN -> the environment variable, where every command looks for it. Returns what to print."""
    userdata = import_module("google.colab.userdata")
    # Newer versions have the last: secrets come from the browser, and other front ends do not answer.
    names = ("SecretNotFoundError", "NotebookAccessError", "TimeoutException")
    try:
        token = userdata.get("HF_TOKEN").strip()
    except tuple(getattr(userdata, name) for name in names if hasattr(userdata, name)) as error:
        return f"no token: {error} (the key symbol on the left). Models on the hub that are gated will be refused"
    if not token:
        return "no token: the secret HF_TOKEN is empty"
    os.environ["HF_TOKEN"] = token
    return "token: the secret HF_TOKEN"


def mount_drive() -> None:
    """Mount Google Drive and work in `ON_DRIVE`.

    Raises:
        AccessError: it cannot be mounted.
    """
    refused = import_module("google.colab.errors").Error  # the browser's window was closed or its answer was no
    try:
        import_module("google.colab.drive").mount(str(DRIVE))
    except (ValueError, refused) as error:  # the first: it timed out, or the folder is in use
        fix = "allow it, or set DRIVE = False: then a disconnect loses the run"
        raise AccessError(f"Google Drive: {error}", fix=fix) from None
    ON_DRIVE.mkdir(parents=True, exist_ok=True)
    os.chdir(ON_DRIVE)


# --- what is here


def versions() -> dict[str, str]:
    """Name -> installed version of this package, Python, and the libraries that decide most. Imports none of them."""
    found = {name: metadata.version(name) for name in SHOWN_VERSIONS if util.find_spec(name)}
    return {"gemma-tune": metadata.version("gemma-tune"), "Python": sys.version.split()[0], **found}


def replaced() -> list[str]:
    """Imported modules of this process whose installed version is another one by now."""
    owners = metadata.packages_distributions()
    stale = []
    for name in sorted(module for module in sys.modules if "." not in module):
        held, owner = vars(sys.modules[name]).get("__version__"), owners.get(name)
        if isinstance(held, str) and owner and held != metadata.version(owner[0]):
            stale.append(name)
    return stale


def graphics() -> str:
    """The GPUs, as nvidia-smi calls them; or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return "; ".join(found.stdout.strip().splitlines())
    return "no GPU: training will run on the CPU" + (" (Runtime > Change runtime type)" if in_colab() else "")
