"""What a user waits for: the import, and the default notebook."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figure import Figure, best, timed
from kit import paths

__all__ = ["imports", "notebook"]


def imports() -> list[Figure]:
    """`import kit` in a new interpreter, less the interpreter's own start."""
    empty = best(5, lambda: timed(lambda: subprocess.run([sys.executable, "-c", ""], check=True)))
    whole = best(5, lambda: timed(lambda: subprocess.run([sys.executable, "-c", "import kit"], check=True)))
    return [Figure("import kit", whole - empty, 0.3, "s", False, f"beside the interpreter's own start: {empty:.3f} s")]


def notebook() -> list[Figure]:
    """The notebook with its own parameters through papermill, as a user types it."""
    empty = {"cells": [], "metadata": {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}}
    with tempfile.TemporaryDirectory() as folder:
        nothing, out = Path(folder, "nothing.ipynb"), Path(folder, "out.ipynb")
        nothing.write_text(json.dumps({**empty, "nbformat": 4, "nbformat_minor": 5}))
        beside = best(2, lambda: timed(lambda: _papermill(nothing, out)))
        wall = best(2, lambda: timed(lambda: _papermill(paths.notebook("cuda_demand_paging"), out)))
    return [
        Figure("default notebook through papermill", wall, 10, "s", False, f"an empty notebook takes {beside:.1f} s")
    ]


def _papermill(notebook: Path, out: Path) -> None:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", str(notebook), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
