"""Files with documented steps, and what one of them takes over from others.

Flows that stand on the same driver or on the same kernel share its steps: they are written down
once, and each ``flow.yaml`` says from where it takes them, and which roots are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Calls", "complete", "flat", "read_file"]

Calls: TypeAlias = "list[str | Calls]"
Rows: TypeAlias = "dict[str, dict[str, Any]]"


def read_file(path: Path) -> dict[str, Any]:
    """Return what one file says itself."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data: dict[str, Any] = yaml.load(path.read_text("utf-8"), Loader=loader)
    return data


def complete(path: Path, variant: str = "") -> dict[str, Any]:
    """Return a flow's data, completed from the files that its ``extends`` names.

    A file may say, beside its own steps:

    ``extends``
        Other files, relative to the folder ``scenarios``. Of their steps those are taken over that
        the flow's own roots reach; a step that several files define is the first file's.
    ``pointers``
        Operation tables: ``{member, functions}``. Where the source calls through such a member, the
        call lists hold one of its functions; in the flow they hold every one that the flow has.
    ``without``
        Patterns of step names that have no place in this flow.
    ``variants``
        Other versions of the system: name to the files that come before those of ``extends``.

    Parameters
    ----------
    path : Path
        The flow's file, in ``scenarios/<flow>/``.
    variant : str
        One of its ``variants``; any other name, the empty one included, is the flow as the file has it.
    """
    files = list(_chain(path, path.parent.parent, set(), variant))
    if len(files) == 1:
        return files[0]
    own = files[0]
    rows: Rows = {}
    for row in own["steps"]:
        rows.setdefault(row["name"], row)
    if len(rows) < len(own["steps"]):
        return own  # a step twice in one file is for `Documented` to refuse
    for data in files[1:]:
        for row in data["steps"]:
            rows.setdefault(row["name"], row)
    for pattern in own.get("without", ()):
        rows = {name: row for name, row in rows.items() if not fnmatchcase(name, pattern)}
    members = [p["functions"] for data in files for p in data.get("pointers", ())]
    left_out = {row["name"] for data in files for row in data["steps"]} - rows.keys()
    left_out |= {name for functions in members for name in functions} - rows.keys()
    rows = {name: {**row, "calls": _calls(row["calls"], members, left_out)} for name, row in rows.items()}
    reached = _reached(own["roots"], rows)
    merged = {key: _union(data.get(key, ()) for data in files) for key in ("events", "hardware", "together")}
    return {**own, **merged, "steps": [row for name, row in rows.items() if name in reached]}


def _chain(path: Path, folder: Path, seen: set[Path], variant: str = "") -> Iterator[dict[str, Any]]:
    """Yield a file's data, then that of every file behind it, each once."""
    data = read_file(path)
    seen.add(path.resolve())
    yield data
    for name in (*data.get("variants", {}).get(variant, ()), *data.get("extends", ())):
        if (folder / name).resolve() not in seen:
            yield from _chain(folder / name, folder, seen)


def _calls(calls: Calls, members: list[list[str]], left_out: set[str]) -> Calls:
    """Open calls through pointers, and drop calls of what is left out."""
    found: Calls = []
    for call in calls:
        if not isinstance(call, str):
            inner = _calls(call, members, left_out)
            if inner:
                found.append(inner)
            continue
        beside = next((functions for functions in members if call in functions), [call])
        found += [name for name in beside if name not in left_out and (name == call or name not in calls)]
    return found


def _reached(roots: Iterable[str], rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the names that the roots lead to."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += flat(rows[name]["calls"]) if name in rows else []
    return found


def flat(calls: Calls) -> Iterator[str]:
    """Yield the callees of `calls` by position, loops opened."""
    for call in calls:
        if isinstance(call, str):
            yield call
        else:
            yield from flat(call)


def _union(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for each in lists for name in each))
