"""The notebook's parameters cell, written from the parameter model.

``python -m kit.lab.parameters_cell FLOW`` prints it; with ``--write`` it goes into the flow's notebook.
"""

from __future__ import annotations

import argparse
import json
from inspect import get_annotations
from pathlib import Path
from textwrap import wrap
from typing import Any

from kit.flows.parameters import Parameters

__all__ = ["grouped_rows", "main", "parameters_cell", "write"]

_LINE = 116  # characters that a code cell shows without scrolling on a 1400 pixel screen


def parameters_cell(model: type[Parameters]) -> str:
    """Return the source of the cell tagged ``parameters``: a plain assignment a line, help and unit as comment."""
    lines = [
        f"# Parameters of {model.flow}: change a value, or let papermill inject another; the next cell checks them."
    ]
    for group, rows in grouped_rows(model).items():
        lines.append(f"\n# {group}")
        for row in rows:
            lines += _lines(row)
    lines += ["\n# This notebook", 'result_path = ""  # file for the result as JSON; empty: none']
    return "\n".join(lines)


def grouped_rows(model: type[Parameters]) -> dict[str, list[dict[str, Any]]]:
    """Return the model's rows by group: the flow's own parameters first, inherited ones (a driver's) after them."""
    own = get_annotations(model)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(model.rows(), key=lambda row: row["name"] not in own):
        groups.setdefault(row["group"], []).append(row)
    return groups


def _lines(row: dict[str, Any]) -> list[str]:
    """Return one parameter's lines: the assignment, after a comment of its own when it would get too long."""
    default = row["default"]
    literal = json.dumps(default) if isinstance(default, str) else repr(default)
    # papermill gives up on a line with a second "=", in a comment too.
    help_text = row["help"].replace(" = ", " is ")
    assigned = f"{row['name']} = {literal}  # {help_text}" + (f", in {row['unit']}" if row["unit"] else "")
    told = all(str(choice) in row["help"] for choice in row["choices"])
    choices = "" if told else " | ".join(map(str, row["choices"]))
    programs = f"[{', '.join(row['programs'])}]" if row["programs"] else ""
    above = f"# {row['name']}" + (f": {choices}" if choices else " is for") + (f" {programs}" if programs else "")
    whole = assigned + (f": {choices}" if choices else "") + (f" {programs}" if programs else "")
    if len(whole) <= _LINE:
        return [whole]
    if len(assigned) <= _LINE:
        return [*(f"# {line}" for line in wrap(above[2:], _LINE - 2, break_on_hyphens=False)), assigned]
    words = wrap(f"{row['name']}: {whole.split('# ', 1)[1]}", _LINE - 2, break_on_hyphens=False)
    return [*(f"# {line}" for line in words), f"{row['name']} = {literal}"]


def write(model: type[Parameters], notebook: Path) -> bool:
    """Put the cell into a notebook; return whether that changed it."""
    content = json.loads(notebook.read_text("utf-8"))
    cells = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    source = parameters_cell(model).splitlines(keepends=True)
    if cells[0]["source"] == source:
        return False
    cells[0]["source"] = source
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return True


def main(arguments: list[str] | None = None) -> None:
    """Print a flow's parameters cell, or write it into the flow's notebook."""
    from kit import paths
    from kit.flows import registry

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("flow")
    parser.add_argument("--write", action="store_true", help="put the cell into the flow's notebook")
    options = parser.parse_args(arguments)
    model = registry.entry(options.flow).load().Parameters
    if options.write:
        write(model, paths.notebook(options.flow))
    else:
        print(parameters_cell(model))


if __name__ == "__main__":
    main()
