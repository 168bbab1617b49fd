"""The notebooks, each executed from its first cell to its last in an empty folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from gemma_tune import notebook as around
from gemma_tune.cli import main
from gemma_tune.errors import GemmaTuneError
from gemma_tune.models.reference import QUICKSTART
from tests.integration.tiny_runs import document, lines, write_recipe

ROOT = Path(__file__).parents[2]


def read_notebook(name: str, **settings: str) -> Any:
    """The notebook, with other values below its cell of parameters, as papermill would put them there."""
    notebook = nbformat.read(ROOT / "recipes" / "notebooks" / f"{name}.ipynb", as_version=4)
    place = next(number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in; Jupyter's own files go elsewhere."""
    folder = tmp_path / "empty"
    folder.mkdir()
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return folder


# --- the real Gemma 3 270M, by a kernel, as Jupyter does it


def printed(notebook: Any, words: str) -> str:
    """What the last cell with `words` printed."""
    cell = [cell for cell in code(notebook) if words in cell.source][-1]
    return "".join(output.get("text", "") for output in cell.outputs)


def shown(notebook: Any, words: str) -> str:
    """The HTML that the cell displayed."""
    cell = next(cell for cell in code(notebook) if words in cell.source)
    return "".join(output["data"].get("text/html", "") for output in cell.outputs if "data" in output)


@pytest.mark.slow
def test_english_quotes_from_the_first_cell_to_the_last(real_270m: Path, empty: Path) -> None:
    """On what the first cell offers to those without a GPU: the 270M, and all rows of the sample."""
    from nbclient import NotebookClient

    notebook = read_notebook("english_quotes_colab")
    text = notebook.cells[0].source
    assert QUICKSTART in text
    extra = " ".join(line.strip() for line in text.splitlines() if line.startswith("    "))
    notebook = read_notebook("english_quotes_colab", MODEL=QUICKSTART, MACHINE="cpu", EXTRA=extra)
    where = {"metadata": {"path": str(empty)}}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=where).execute()

    assert "gemma-tune" in printed(notebook, "begin(") and str(empty) in printed(notebook, "begin(")
    assert "residual_exponent" not in printed(notebook, "gemma_tune check"), "this plan is the CPU's"
    assert "⟦Quote: " in printed(notebook, "gemma_tune show")
    run = empty / "runs" / "english-quotes"
    record = document(run / "run.json")
    steps = record["results"]["steps"]
    assert record["status"] == "finished" and f"step {steps} of {steps}: loss" in printed(notebook, "--resume auto")
    base, tuned = record["results"]["base"], record["results"]["tuned"]
    print(f"held-out loss {base['loss']:.3f} -> {tuned['loss']:.3f}")
    assert tuned["loss"] < 0.5 * base["loss"]
    assert record["data"]["report"]["read"] == {"sample:english_quotes": 60}, "all of them"
    assert record["data"]["report"]["dropped"] == {}
    found = document(run / "evaluation.json")
    # The run's own figure; eval reads the same rows through the same mask.
    assert found["held_out"]["tuned"]["loss"] == pytest.approx(tuned["loss"], rel=1e-3)
    # The base goes on until it is cut; the tuned model has learned to stop.
    assert found["held_out"]["base"]["ended"] == 0 and found["held_out"]["tuned"]["ended"] >= 1
    assert "perplexity" in printed(notebook, "gemma_tune eval")
    assert "srcdoc" in shown(notebook, "show_report") and (run / "report.html").is_file()
    assert len(printed(notebook, "gemma_tune chat").strip()) > 10
    assert "in fp32 logits differ from base + adapter by at most" in printed(notebook, "gemma_tune merge")
    assert (run / "merged" / "model.safetensors").stat().st_size > 500e6
    assert "merged: 5" in printed(notebook, "download(")
    assert sorted(path.name for path in empty.iterdir()) == ["english_quotes_t4.yaml", "runs"]


# --- tiny models, by IPython in this process, which spares the start of seven commands


@pytest.fixture
def shell(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """IPython in an empty folder, whose commands run in this process instead of one of their own."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    def here(*words: str) -> None:
        if exit_code := main(words):
            raise around.CommandFailed(words, exit_code)

    monkeypatch.setattr(around, "run", here)
    monkeypatch.chdir(empty)
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


SMALLER = "data.max_length=256 data.holdout=4 optim.max_steps=2 batch.size=2 evaluation.every=2"
SHORT = "samples.held_out=1 samples.max_new_tokens=3"


@pytest.mark.parametrize(
    ("name", "sample"), [("ultrachat_colab", "ultrachat_200k"), ("dpo_colab", "ultrafeedback_binarized")]
)
def test_the_others_on_a_tiny_model(
    name: str,
    sample: str,
    shell: Any,
    empty: Path,
    tiny: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = f"data.sources.0.name=sample:{sample} data.sources.0.limit=40 {SMALLER} {SHORT}"
    notebook = read_notebook(name, MODEL=str(tiny("gemma3_text")), MACHINE="cpu", EXTRA=extra, OUTPUT="out")
    for cell in code(notebook):
        shell.run_cell(cell.source).raise_error()
    record = document(empty / "out" / "run.json")
    assert record["status"] == "finished" and record["results"]["steps"] == 2
    # "Run all" after a disconnect: the run is not trained again.
    shell.run_cell(next(cell.source for cell in code(notebook) if "--resume auto" in cell.source)).raise_error()
    assert "is finished" in capsys.readouterr().out
    assert len(document(empty / "out" / "run.json")["segments"]) == 1
    assert (empty / "out" / "evaluation.json").is_file() and (empty / "out" / "report.html").is_file()
    assert (empty / "out" / "merged" / "model.safetensors").is_file()


def test_a_cell_that_fails_stops_the_notebook(shell: Any) -> None:
    notebook = read_notebook("dpo_colab", MODEL="/no/such/model")
    done = []
    with pytest.raises(GemmaTuneError, match="gemma-tune check"):
        for cell in code(notebook):
            shell.run_cell(cell.source).raise_error()
            done.append(cell.source)
    assert "begin(" in done[-1]


# --- a kernel that dies


def test_a_run_whose_kernel_is_killed_leaves_a_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A restart of the kernel, or its death for want of memory. The run notices, saves, and does not go on alone."""
    recipe = write_recipe(tmp_path, tiny("gemma3_text"), optim={"max_steps": 2000}, checkpoint={"every": 2000})
    code = "import sys, gemma_tune.notebook as n; n.run('sft', sys.argv[1], '--resume', 'auto')"
    kernel = subprocess.Popen([sys.executable, "-c", code, str(recipe)], stdout=subprocess.DEVNULL, cwd=ROOT)
    run = tmp_path / "run"
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(lines(run / "metrics.jsonl")) > 3)
    finally:
        kernel.send_signal(signal.SIGKILL)
        kernel.wait()
    wait_for(lambda: document(run / "run.json")["status"] == "stopped")
    step = document(run / "run.json")["segments"][-1]["to_step"]
    assert 0 < step < 2000 and (run / f"checkpoint-{step}" / "COMPLETE.json").is_file()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
