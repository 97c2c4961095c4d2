"""One row a run: what the summary table, the index page and the sweep's CSV say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

__all__ = ["COLUMNS", "METRICS", "amount", "bytes_in_words", "figures", "summary_table"]

# Column of the summary: the metric that it is, or else those that it adds up; and what it is multiplied with.
METRICS = {
    "simulated s": ("simulated_us", (), 1e-6),
    "faults": ("faults", ("cpu_faults", "gpu_faulting_pages"), 1),
    "bytes moved": ("bytes_moved", ("htod_bytes", "dtoh_bytes"), 1),
}
COLUMNS = ("flow", "scenario", "wall s", *METRICS, "steps reached", "lost pages")


def amount(found: object) -> int:
    """Return a count that a result gives as a number or as the list of what is counted."""
    return len(found) if isinstance(found, Sized) else int(str(found))


def bytes_in_words(count: float) -> str:
    """Return `count` bytes with a binary unit, such as ``8.00 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's key figures.

    Parameters
    ----------
    result : mapping
        A run's result object.

    Returns
    -------
    dict
        The columns of `METRICS` plus ``steps reached``, ``steps documented``, ``violations``,
        ``pages checked`` and ``lost pages``; None where the run has no such metric.
    """
    metrics, steps, content = result["metrics"], result["conformance"], result["integrity"]
    found: dict[str, Any] = {}
    for column, (name, parts, scale) in METRICS.items():
        had = [metrics[name]] if name in metrics else [metrics[part] for part in parts if part in metrics]
        found[column] = sum(had) * scale if had else None
    found["steps reached"] = amount(steps["steps_reached"])
    found["steps documented"] = amount(steps["steps_documented"])
    found["violations"] = amount(steps["violations"])
    found["pages checked"], found["lost pages"] = content["pages_checked"], content["lost"]
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the summary as words, in the order of `COLUMNS`."""
    if row.get("error"):
        return [row["flow"], row["scenario"], f"{row['wall s']:.2f}", *["-"] * (len(METRICS) + 1), "failed"]
    simulated, faults, moved = (row[column] for column in METRICS)
    return [
        row["flow"],
        row["scenario"],
        f"{row['wall s']:.2f}",
        "-" if simulated is None else f"{simulated:.6f}",
        "-" if faults is None else f"{faults:,.0f}",
        "-" if moved is None else f"{moved:,.0f}",
        f"{row['steps reached']}/{row['steps documented']}",
        str(row["lost pages"]),
    ]


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as one text table; numbers stand to the right."""
    table = [list(COLUMNS), *map(cells, rows)]
    wide = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(wide[i]) if i < 2 else cell.rjust(wide[i]) for i, cell in enumerate(line)).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in wide), *lines[1:]])
