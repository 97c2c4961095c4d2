"""Published totals of two machines against simulated ones: a short table that does not depend on the run at hand."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from kit.report.measured import Published, published_rows, simulated, words
from kit.report.tables import Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["MACHINES", "TOTALS", "measured_totals", "totals_of"]

MACHINES = ("p100_pcie3", "t4")
"""Machines whose published programs are run: ten programs of some milliseconds, about a second in all."""
TOTALS = (
    "kernel_us", "init_kernel_us", "kernel_first_us", "kernel_min_us", "htod_us", "dtoh_us", "gpu_fault_us",
    "htod_count", "gpu_fault_groups",
)  # fmt: skip
"""Quantities shown, in this order: sums over a run and whole kernels, not single copies or groups."""
_COLUMNS = ("Measurement", "Quantity", "Published", "Simulated", "Simulated / published")


def totals_of(row: Published) -> dict[str, float | None]:
    """Run a published measurement with its own parameters; return the simulated `TOTALS` that were published."""
    from kit.flows import registry

    run = registry.run("cuda_demand_paging", given={**row.parameters, "machine": row.machine})
    return simulated(run, [quantity for quantity in TOTALS if quantity in row.published])


def _published() -> list[Published]:
    """Return the measurements of `MACHINES`, machine by machine."""
    return [row for machine in MACHINES for row in published_rows() if row.machine == machine]


@cache
def _rows() -> tuple[tuple[Any, ...], ...]:
    """Run the measurements, once a process."""
    rows: list[tuple[Any, ...]] = []
    for row in _published():
        for quantity, found in totals_of(row).items():
            value = row.published[quantity]
            rows.append((row.name, words(quantity), value, found, found and found / value))
    return tuple(rows)


def measured_totals(run: Run) -> Table:
    """Return published totals of the P100 and of the T4 beside those of fresh runs, whatever `run` itself did."""
    origins = "; ".join(dict.fromkeys(row.origin.split(" (")[0] for row in _published()))
    caption = (
        f"Published totals of {len(_published())} programs on a P100 and on a T4, beside the same programs run by the "
        "kit with their own parameters. Constants of the two profiles come in part from these publications (each says "
        "so). How many copies and groups many blocks make is the choice of a warp scheduler that no source describes: "
        f"there the kit is too low. From: {origins}."
    )
    return Table("measured_totals", _COLUMNS, list(_rows()), caption, ("", "", ",.2f", ",.2f", ".2f"))
