"""The strict check of a notebook's parameters, which papermill leaves to others.

papermill warns about a parameter that the notebook does not have, and runs on with the defaults.
Here such a name reaches the parameter model, which refuses it by name.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NOTEBOOK_ONLY", "collect"]

NOTEBOOK_ONLY = ("result_path",)  # read by the notebook itself, not by the flow
_MARK = "# Parameters of "  # first line of the generated cell; papermill's own begins "# Parameters"
_PLAIN = (bool, int, float, str, list, dict, type(None))


def collect(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that a notebook has set, for the flow to check.

    Parameters
    ----------
    namespace : mapping
        The notebook's ``globals()``. With a history of cells in it, the names are those assigned in
        the last parameters cell that ran and in what papermill injected after it; without one,
        every public name that holds plain data.

    Returns
    -------
    dict
        Name to value, those that only the notebook reads left out.
    """
    names = _assigned(namespace.get("In", ()))
    if names is None:
        names = [name for name, value in namespace.items() if not name.startswith("_") and type(value) in _PLAIN]
        names = [name for name in names if name not in ("In", "Out")]
    return {name: namespace[name] for name in names if name in namespace and name not in NOTEBOOK_ONLY}


def _assigned(cells: Sequence[str]) -> list[str] | None:
    """Return the names assigned by the last parameters cell and by the injected one; None without any."""
    marked = [i for i, cell in enumerate(cells) if cell.startswith(_MARK)]
    if not marked:
        return None
    chosen = [cells[marked[-1]], *(cell for cell in cells[marked[-1] + 1 :] if cell.startswith("# Parameters\n"))]
    names = [
        target.id
        for cell in chosen
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
    return list(dict.fromkeys(names))
