"""report.html: one file that shows a run.

    read.py           the files of a run folder, with what is missing
    series.py         metrics.jsonl -> curves       curves.py   which curves a stage has
    axes.py           scales and ticks              chart.py    a chart as SVG
    tables.py         a table, also of parts that have no name here
    audits.py         memorisation and comparisons
    head.py, answers.py, data.py, mask.py, plan.py, evaluation.py, provenance.py    a section each
    words.py          figures as people read them   page.py     the sections -> HTML, by templates/

Nothing here measures or decides: what a page says stands in the run folder.
"""

from __future__ import annotations

from pathlib import Path

NAME = "report.html"


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the report of the run in `run_folder`, in one rename. Returns its path.

    Args:
        run_folder: what a recipe's `output` named.
        output: the file to write; by default report.html in the run folder.

    Raises:
        UserError: there is no run here.
        OSError: the file cannot be written.
    """
    from gemma_tune.report.page import render
    from gemma_tune.report.read import load_run_files
    from gemma_tune.train.checkpoint import write_atomically

    path = output or run_folder / NAME
    write_atomically(path, render(load_run_files(run_folder)))
    return path
