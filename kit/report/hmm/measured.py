"""Measured against simulated: what was published about faults that move 2 MiB to a device, beside the kit's own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.report.figures.window import COLUMN, spans_of
from kit.report.tables import Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["PUBLISHED", "measured", "simulated"]

_XE = "Intel Xe SVM, F. Dugast, dri-devel January 2026 (msg582528)"
_YAN = "move_pages between sockets, E5-2640v3, Z. Yan 2017"
PUBLISHED: tuple[tuple[str, str, float, bool, str], ...] = (
    ("4 KiB device pages", "fault", 966.0, True, _XE),
    ("4 KiB device pages", "migrate", 942.0, True, _XE),
    ("4 KiB device pages", "copy", 223.0, True, _XE),
    ("4 KiB device pages", "get_pages", 9.0, True, _XE),
    ("4 KiB device pages", "bind", 10.0, True, _XE),
    ("2 MiB device pages", "fault", 132.0, False, _XE),
    ("2 MiB device pages", "migrate", 128.0, False, _XE),
    ("2 MiB device pages", "copy", 106.0, True, _XE),
    ("2 MiB device pages", "get_pages", 1.0, False, _XE),
    ("2 MiB device pages", "bind", 2.0, False, _XE),
)
"""Pages, quantity, microseconds, whether the machine profile was made from it, origin; all about a fault of 2 MiB."""
_ELSEWHERE = ((62.47, "one 4 KiB page"), (658.54, "one 2 MiB page"), (1987.38, "512 pages of 4 KiB"))
_WORDS = {
    "fault": "the device's fault, all of it (us)", "migrate": "migration (us)", "copy": "its copy (us)",
    "get_pages": "hmm_range_fault over 2 MiB (us)", "bind": "the device's page table (us)",
}  # fmt: skip


@cache
def simulated(huge: bool) -> dict[str, float]:
    """Return what one fault on 2 MiB takes here, by the quantities of `PUBLISHED`.

    The real driver migrates, then reads the CPU's page table, then binds; the test driver enters what it has migrated
    by itself. So get_pages is taken from the mirror stage of the same run, and counts into the fault.
    """
    from kit.flows import registry

    given: dict[str, Any] = {
        "bytes": 2 << 20, "order": "sequential", "visits": 1, "write_fraction": 0.0, "explicit_copies": False,
        "cpu_fraction": 0.0, "children": 0, "thp": huge,
    }  # fmt: skip
    run = registry.run("hmm_mirror", given=given)
    table = run.trace.spans.array()
    times = {name: (start, end) for name, start, end in run.stages}

    def spent(step: str, stage: str) -> float:
        rows = spans_of(run.trace, table, (step,))
        rows = rows[(rows[:, 0] >= times[stage][0]) & (rows[:, 0] < times[stage][1])]
        return float(np.sum(rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]]))

    bind = spent("dmirror_migrate_finalize_and_map", "migrate")
    found = {
        "migrate": spent("dmirror_migrate_to_device", "migrate") - bind, "copy": spent("device_copy", "migrate"),
        "get_pages": spent("hmm_range_fault", "mirror"), "bind": bind,
    }  # fmt: skip
    return {"fault": spent("device_stall", "migrate") + found["get_pages"], **found}


def measured(run: Run) -> Table:
    """Return the published times of a 2 MiB fault beside those that the kit simulates, whatever `run` itself did."""
    rows: list[tuple[Any, ...]] = []
    for pages, quantity, value, used, origin in PUBLISHED:
        found = simulated(pages.startswith("2"))[quantity]
        rows.append((pages, _WORDS[quantity], value, found, found / value, "yes" if used else "no", origin))
    for value, what in _ELSEWHERE:
        rows.append((what, "moved to the other socket (us)", value, None, None, "no", _YAN))
    columns = (
        "A fault of 2 MiB with",
        "Quantity",
        "Published",
        "Simulated",
        "Simulated / published",
        "Used for the profile",
        "Origin",
    )
    caption = (
        "Published times of one device fault that moves 2 MiB, beside the same fault here. The test driver asks for 32 "
        "pages at a time and writes 512 entries where a real one asks for and binds one huge entry: that is why these "
        "two rows are high. Below, for scale, migration between two sockets, which the kit does not simulate."
    )
    return Table("measured", columns, rows, caption, ("", "", ",.2f", ",.2f", ".2f", "", ""))
