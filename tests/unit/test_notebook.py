"""gemma_tune.notebook: commands in processes of their own, and what Colab has, by stand-ins of its modules."""

from __future__ import annotations

import os
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma_tune import notebook
from gemma_tune.errors import AccessError, UserError
from gemma_tune.launch.parent import LAUNCHER
from gemma_tune.notebook import CommandFailed
from scripts.notebooks import FOLDER

Child = Callable[[str], None]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """`child(code)`: from now on `run` starts this Python code instead of gemma-tune."""

    def instead(code: str) -> None:
        monkeypatch.setattr(notebook, "command_of", lambda words: [sys.executable, "-c", code, *words])

    return instead


def test_a_command_is_this_package_in_this_python() -> None:
    assert notebook.command_of(["check", "a.yaml"]) == [sys.executable, "-m", "gemma_tune", "check", "a.yaml"]


def test_what_it_prints_is_seen_while_it_runs(child: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command goes on only when the cell has shown its first line."""
    seen = tmp_path / "seen"

    class Cell:
        text = ""

        def write(self, text: str) -> None:
            self.text += text
            if "é" in self.text:
                seen.touch()

        def flush(self) -> None:
            pass

    child(
        "import os, sys, time; from pathlib import Path\n"
        "os.write(1, 'é'.encode()[:1]); os.write(1, 'é'.encode()[1:])\n"  # in two pieces
        "end = time.monotonic() + 10\n"
        "while not Path(sys.argv[1]).exists() and time.monotonic() < end: time.sleep(0.01)\n"
        "print('in time' if Path(sys.argv[1]).exists() else 'late'); print('a note', file=sys.stderr)\n"
    )
    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    notebook.run(str(seen))
    assert cell.text.startswith("éin time\n") and "a note" in cell.text


def test_a_command_that_fails_ends_the_cell(child: Child) -> None:
    child("raise SystemExit(3)")
    with pytest.raises(CommandFailed, match=r"sft 'my recipe\.yaml' ended with exit code 3") as failed:
        notebook.run("sft", "my recipe.yaml")
    assert failed.value.exit_code == 3
    assert failed.value._render_traceback_()[0].startswith("error: gemma-tune sft")
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(CommandFailed, match="SIGKILL"):
        notebook.run("sft")


def test_an_interrupt_reaches_the_command_once_and_is_waited_for(
    child: Child, capsys: pytest.CaptureFixture[str]
) -> None:
    child(
        "import signal, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "print('ready')\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.3); print(f'saved after {len(heard)} signal'); raise SystemExit(75)\n"
    )

    def interrupt_when_ready() -> None:
        for _ in range(1000):
            if "ready" in written:
                break
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    written: list[str] = []
    original = sys.stdout.write

    def write(text: str) -> int:
        written.extend(text.split())
        return original(text)

    sys.stdout.write = write  # type: ignore[method-assign]
    thread = threading.Thread(target=interrupt_when_ready)
    thread.start()
    try:
        with pytest.raises(CommandFailed, match="run this cell again") as failed:
            notebook.run("sft")
    finally:
        thread.join()
        sys.stdout.write = original  # type: ignore[method-assign]
    assert failed.value.exit_code == 75
    assert "saved after 1 signal" in capsys.readouterr().out


def test_a_command_neither_draws_nor_outlives_its_kernel() -> None:
    given = {"PATH": "/bin", "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}  # ipykernel sets the second
    assert notebook.environment_of(given) == {"PATH": "/bin", "PYTHONUNBUFFERED": "1", LAUNCHER: str(os.getpid())}


def test_the_magic_is_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    magics: dict[str, Any] = {}

    class Shell:
        def register_magic_function(self, function: Any, kind: str, name: str) -> None:
            assert kind == "line"
            magics[name] = function

    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(notebook, "run", lambda *words: called.append(words))
    notebook.load_ipython_extension(Shell())
    magics["gemma_tune"]("chat runs/a --prompt 'two words'  ")
    assert called == [("chat", "runs/a", "--prompt", "two words")]


# --- Colab


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """google.colab as far as it is used, with what it was asked for."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(notebook, "ON_DRIVE", tmp_path / "drive" / "MyDrive" / "gemma-tune")
    state: dict[str, Any] = {"secrets": {}, "mounted": [], "downloaded": [], "refuse": None, "no browser": False}
    names = ("userdata", "drive", "files", "errors")
    userdata, drive, files, errors = (ModuleType(f"google.colab.{name}") for name in names)

    class Error(Exception):
        pass

    class MessageError(Error):
        pass

    class TimeoutException(Exception):
        pass

    class SecretNotFoundError(Exception):
        pass

    class NotebookAccessError(Exception):
        pass

    def get(key: str) -> str:
        if state["no browser"]:
            raise TimeoutException(f"Requesting secret {key} timed out.")
        if state["refuse"]:
            raise NotebookAccessError("Notebook does not have access to secret HF_TOKEN")
        if key not in state["secrets"]:
            raise SecretNotFoundError(f"Secret {key} does not exist.")
        return str(state["secrets"][key])

    def mount(place: str) -> None:
        if state["no browser"]:
            raise MessageError("Error: credential propagation was unsuccessful")
        if state["refuse"]:
            raise ValueError("mount failed")
        state["mounted"].append(place)

    userdata.__dict__.update(get=get, SecretNotFoundError=SecretNotFoundError, NotebookAccessError=NotebookAccessError)
    userdata.__dict__["TimeoutException"] = TimeoutException  # not in the older ones
    errors.__dict__["Error"] = Error
    drive.__dict__["mount"] = mount
    files.__dict__["download"] = state["downloaded"].append
    for module in (ModuleType("google.colab"), userdata, drive, files, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state


def test_the_secret_becomes_the_token(colab: dict[str, Any]) -> None:
    assert notebook.in_colab()
    assert "does not exist" in notebook.take_secret() and "HF_TOKEN" not in os.environ
    colab["secrets"]["HF_TOKEN"] = " hf_x\n"
    printed = notebook.take_secret()
    assert os.environ["HF_TOKEN"] == "hf_x" and "hf_x" not in printed
    colab["refuse"] = True
    assert "does not have access" in notebook.take_secret()
    del os.environ["HF_TOKEN"]


def test_work_goes_on_on_drive(colab: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.begin("quickstart.yaml", drive=True)
    assert colab["mounted"] == [str(tmp_path / "drive")]
    assert Path.cwd() == tmp_path / "drive" / "MyDrive" / "gemma-tune"
    assert Path("quickstart.yaml").read_text().startswith("# yaml-language-server")
    Path("quickstart.yaml").write_text("mine")
    notebook.begin("quickstart.yaml", drive=True)  # after a disconnect
    assert Path("quickstart.yaml").read_text() == "mine"
    out = capsys.readouterr().out
    assert "gemma-tune " in out and "torch " in out and "does not exist" in out


def test_drive_that_was_refused_is_an_error(colab: dict[str, Any]) -> None:
    colab["refuse"] = True
    with pytest.raises(AccessError, match="DRIVE = False"):
        notebook.begin("quickstart.yaml", drive=True)


def test_a_browser_that_does_not_answer_is_no_traceback(
    colab: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What most people see who close the window that asks for Drive: no ValueError (colabtools#5531)."""
    colab["no browser"] = True
    with pytest.raises(AccessError, match=r"(?s)credential propagation.*DRIVE = False"):
        notebook.begin("quickstart.yaml", drive=True)
    assert "no token: Requesting secret HF_TOKEN timed out" in capsys.readouterr().out


def test_a_result_that_is_not_on_drive_comes_through_the_browser(
    colab: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "merged"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    notebook.download("runs/merged")
    assert colab["downloaded"] == [str(tmp_path / "runs" / "merged.zip")]
    with zipfile.ZipFile(tmp_path / "runs" / "merged.zip") as archive:
        assert archive.read("merged/sub/a.txt") == b"a"
    (tmp_path / "drive" / "merged").mkdir(parents=True)
    notebook.download("drive/merged")
    assert len(colab["downloaded"]) == 1
    assert "on your Google Drive: merged" in capsys.readouterr().out


# --- anywhere


def test_elsewhere_nothing_of_colab_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert not notebook.in_colab()
    notebook.begin("quickstart.yaml", drive=True)
    assert Path.cwd() == tmp_path and (tmp_path / "quickstart.yaml").is_file()
    assert "HF_TOKEN is not set" in capsys.readouterr().out
    notebook.download(".")
    with pytest.raises(UserError, match="no shipped recipe"):
        notebook.begin("quikstart.yaml")
    with pytest.raises(UserError, match="no such folder"):
        notebook.download("merged")


def test_a_library_that_was_replaced_after_its_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydantic

    assert "pydantic" not in notebook.replaced()
    monkeypatch.setattr(pydantic, "__version__", "0.1")
    assert "pydantic" in notebook.replaced()


def test_the_report_is_a_frame_of_its_own(child: Child, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import IPython.display

    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    child(
        "import sys; from pathlib import Path\n"
        "assert sys.argv[1] == 'report'\n"
        "Path(sys.argv[2], 'report.html').write_text('<p class=\"a\">1 &lt; 2</p>')\n"
    )
    notebook.show_report(str(tmp_path))
    assert 'srcdoc="&lt;p class=&quot;a&quot;&gt;1 &amp;lt; 2&lt;/p&gt;"' in shown[0].data


def test_nothing_heavy_is_imported() -> None:
    import subprocess

    code = "import sys, gemma_tune.notebook; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, list[tuple[str, ...]]]]:
    """IPython with `%gemma_tune`, and the words that it would run."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(notebook, "run", lambda *words: ran.append(words))
    monkeypatch.chdir(tmp_path)
    found = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    notebook.load_ipython_extension(found)
    yield found, ran
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_settings_may_hold_spaces(file: Path, shell: tuple[Any, list[tuple[str, ...]]]) -> None:
    """A folder of Google Drive may; and EXTRA may be empty."""
    ipython, ran = shell
    values = {"RECIPE": "a b.yaml", "MODEL": "My Drive/m", "OUTPUT": "my runs/a", "EXTRA": "", "MACHINE": "t4"}
    ipython.push(values)
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("# %gemma_tune "):
            ipython.run_cell(line.removeprefix("# ")).raise_error()
    check, show, train, *others = ran
    assert check == ("check", "a b.yaml", "model.name=My Drive/m", "output=my runs/a", "--machine", "t4")
    assert show[1:4] == check[1:4] and train[1:] == (*check[1:4], "--resume", "auto")
    assert [words[:2] for words in others] == [(name, "my runs/a") for name in ("eval", "chat", "merge")]


def test_a_merge_that_is_there_is_not_made_again(
    shell: tuple[Any, list[tuple[str, ...]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ipython, ran = shell
    merge = '%gemma_tune merge "my run"'
    weights, written = tmp_path / "my run/adapter/adapter_model.safetensors", tmp_path / "my run/merged/config.json"
    for file in (weights, written):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(weights, (1, 1))
    ipython.run_cell(merge).raise_error()
    assert not ran and "merged is there already" in capsys.readouterr().out
    ipython.run_cell(merge + " --out other").raise_error()
    os.utime(written, (0, 0))  # trained on since then: the command says what it finds
    ipython.run_cell(merge).raise_error()
    assert ran == [("merge", "my run", "--out", "other"), ("merge", "my run")]
