"""recipes/notebooks/*.py -> *.ipynb: `make notebooks`. The Python files are the source, in jupytext's percent format.

The same source always gives the same bytes: cell ids are numbers, and there are no outputs.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes" / "notebooks"

METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    # papermill refuses a kernelspec without language.
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""What Colab and Jupyter read."""


def render_notebook(source: str) -> str:
    """The text of a Python file in the percent format -> the text of the notebook."""
    import jupytext
    import nbformat

    notebook = jupytext.reads(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells, start=1):
        cell["id"] = f"cell-{number:02d}"
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    for source in sorted(FOLDER.glob("*.py")):
        target = source.with_suffix(".ipynb")
        target.write_text(render_notebook(source.read_text("utf-8")), "utf-8")
        print(target)


if __name__ == "__main__":
    main()
