"""Execute the three lessons as notebooks, outputs and figures inside, beside this file: python docs/lessons/make.py"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LESSONS = ("feature_ablate_1", "feature_ablate_2", "feature_ablate_3")


def execute(lesson: str) -> nbformat.NotebookNode:
    """The lesson as a notebook, run from top to bottom; without progress bars and times, which are others each time."""
    notebook = jupytext.read(ROOT / f"{lesson}.py")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=900, resources=resources, record_timing=False).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id, kept = f"cell-{number}", []
        for out in cell.get("outputs", []):
            if kept and out.get("name") == kept[-1].get("name") == "stdout":
                kept[-1].text += out.text  # what a kernel sends in how many parts is chance
            elif out.get("name") != "stderr":
                kept.append(out)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


if __name__ == "__main__":
    for lesson in sys.argv[1:] or LESSONS:
        path = HERE / f"{lesson}.ipynb"
        nbformat.write(execute(lesson), path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")
