"""Measured against simulated: what was published about real systems, beside what a run gives.

The facts are in ``measured.yaml`` beside this module. Some of them were used to find constants of the
machine profiles (a constant's source says so); all others test those constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.report.cupti import CPU_FAULT, DTOH, GPU_FAULT, HTOD, UmRecords, kernels, um_records
from kit.report.tables import Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["OVERVIEW", "Published", "measured", "measured_overview", "published_rows", "simulated", "words"]

OVERVIEW = ("gtx1080ti_pcie3", "p100_pcie3", "t4")
"""Machines whose published rows `measured_overview` runs."""
_FLOW = "cuda_demand_paging"
_COLUMNS = ("Measurement", "Quantity", "Published", "Simulated", "Simulated / published", "Origin")
_FORMATS = ("", "", ",.2f", ",.2f", ".2f", "")
_IGNORED = ("machine", "seed", "payload_bytes", "cpu_chunk_allocation_sizes")
_TOTALS = {
    "htod_us": "host to device copies, all (us)",
    "dtoh_us": "device to host copies, all (us)",
    "gpu_fault_us": "GPU fault groups, all (us)",
    "kernel_us": "kernel (us)",
    "init_kernel_us": "initialising kernel (us)",
    "kernel_first_us": "first of many launches (us)",
    "kernel_min_us": "shortest of many launches (us)",
    "group_first_us": "first fault group of the process (us)",
    "group_second_us": "second fault group of the process (us)",
    "group_new_block_us": "first fault group in a further 2 MiB block (us)",
    "cpu_fault_spacing_us": "from one CPU fault that brings 64 KiB back to the next (us)",
    "htod_count": "host to device copies",
    "gpu_fault_groups": "GPU fault groups",
}
_SIZED = re.compile(r"(htod|dtoh|group)_(\d+)_kib_us")
_SIZED_WORDS = {
    "htod": "one host to device copy of {} KiB (us)",
    "dtoh": "one device to host copy of {} KiB (us)",
    "group": "warm fault group that moves {} KiB (us)",
}


@dataclass(frozen=True)
class Published:
    """One published measurement.

    Attributes
    ----------
    name : str
        The same as in the golden records.
    machine : str
        Profile of the machine.
    origin, hardware : str
        Publication or repository and commit; product and driver, as far as stated.
    parameters : dict
        Of the flow, without the machine.
    published : dict of str to float
        Quantities; `words` says what they are. Those in ``_us`` are microseconds.
    note : str
        What the reader should know about a number.
    """

    name: str
    machine: str
    origin: str
    hardware: str
    parameters: dict[str, Any]
    published: dict[str, float]
    note: str = ""


@cache
def published_rows() -> tuple[Published, ...]:
    """Return every published measurement that a profile and the flow's parameters can express."""
    import yaml

    text = (resources.files("kit.report") / "measured.yaml").read_text("utf-8")
    return tuple(Published(**facts) for facts in yaml.safe_load(text))


def words(quantity: str) -> str:
    """Return a quantity in words, with its unit."""
    sized = _SIZED.fullmatch(quantity)
    return _SIZED_WORDS[sized[1]].format(sized[2]) if sized else _TOTALS[quantity]


def simulated(run: Run, quantities: Iterable[str]) -> dict[str, float | None]:
    """Return what a run gives for quantities of `Published`; None where it has no such records."""
    records = um_records(run)
    launches = [(kernel.end - kernel.start) / 1000 for kernel in kernels(run)]
    found: dict[str, float | None] = {}
    for quantity in quantities:
        sized = _SIZED.fullmatch(quantity)
        if sized:
            found[quantity] = _of_size(records, sized[1], int(sized[2]) << 10)
        elif quantity in _FROM_RECORDS:
            found[quantity] = _FROM_RECORDS[quantity](records)
        else:
            found[quantity] = _FROM_KERNELS[quantity](launches) if launches else None
    return found


def measured(run: Run) -> Table:
    """Return the published measurements of the run's machine, program and parameters beside the run.

    Seed, payload and CPU chunk sizes may differ; the caption says when the chunk sizes do.
    """
    found = [row for row in published_rows() if _matches(row, run)]
    if not found:
        known = sorted({row.name for row in published_rows() if row.machine == run.machine.name})
        other = f"measured on this machine: {', '.join(known)}" if known else "nor anything about this machine"
        caption = f"Nothing is published about this program with these parameters; {other}."
        return Table("measured", _COLUMNS, [], caption, _FORMATS, lambda table: f" {table.caption}\n", nothing="")
    return Table("measured", _COLUMNS, _rows(found, lambda row: run), _caption(found, run), _FORMATS)


def measured_overview(machines: Iterable[str] = OVERVIEW, progress: Callable[[str], None] | None = None) -> Table:
    """Run every published measurement of some machines; return one table of published against simulated.

    `progress` is told the name of each measurement before it runs (each takes well below a second,
    but those of hundreds of MiB).
    """
    from kit.flows import registry

    def run(row: Published) -> Run:
        if progress is not None:
            progress(row.name)
        return registry.run(_FLOW, given={**row.parameters, "machine": row.machine})

    wanted = tuple(machines)
    chosen = [row for row in published_rows() if row.machine in wanted]
    caption = f"{len(chosen)} published measurements of {', '.join(wanted)}, each simulated with its own parameters."
    notes = "".join(f" {row.name}: {row.note}." for row in chosen if row.note)
    return Table("measured", _COLUMNS, _rows(chosen, run), caption + notes, _FORMATS)


def _rows(chosen: Iterable[Published], run_of: Callable[[Published], Run]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for row in chosen:
        for quantity, found in simulated(run_of(row), row.published).items():
            value = row.published[quantity]
            rows.append((row.name, words(quantity), value, found, found and found / value, row.origin))
    return rows


def _caption(found: list[Published], run: Run) -> str:
    text = "What was published, beside this run: " + "; ".join(sorted({row.hardware for row in found})) + "."
    text += "".join(f" {row.name}: {row.note}." for row in found if row.note)
    sizes = {str(row.parameters.get("cpu_chunk_allocation_sizes")) for row in found}
    if run.parameters.get("cpu_chunk_allocation_sizes") not in sizes:
        text += f" They had CPU chunks of {', '.join(sorted(sizes))} only (drivers before 535), this run has others."
    return text


def _matches(row: Published, run: Run) -> bool:
    """Whether a row and a run have the same machine and parameters, as far as their program reads them."""
    program = row.parameters["program"]
    if (run.flow, run.machine.name, run.parameters.get("program")) != (_FLOW, row.machine, program):
        return False
    from kit.flows.parameters import extra
    from kit.flows.registry import entry

    model = entry(_FLOW).load().Parameters
    for name, value in model.check({**row.parameters, "machine": row.machine}).model_dump().items():
        programs = extra(model.model_fields[name])["programs"]
        relevant = name not in _IGNORED and (not programs or program in programs)
        if relevant and run.parameters.get(name) != value:
            return False
    return True


def _durations(records: UmRecords) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (records.end - records.start) / 1000


def _median(values: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _of_size(records: UmRecords, what: str, nbytes: int) -> float | None:
    """Return the median time of the copies, or of the warm groups, of one size."""
    if what == "group":
        return _median(_durations(records.of(GPU_FAULT))[_warm_groups(records, nbytes)])
    copies = records.of(HTOD if what == "htod" else DTOH)
    return _median(_durations(copies)[copies.bytes == nbytes])


def _first_in_block(groups: UmRecords) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the groups that are the first to touch their 2 MiB block."""
    _, first = np.unique(groups.address // (2 << 20), return_index=True)
    return np.asarray(np.isin(np.arange(len(groups)), first))


def _warm_groups(records: UmRecords, nbytes: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the groups in a block already used whose copies bring `nbytes`."""
    groups, copies = records.of(GPU_FAULT), records.of(HTOD)
    moved = [
        int(copies.bytes[(copies.start >= start) & (copies.end <= end)].sum())
        for start, end in zip(groups.start.tolist(), groups.end.tolist(), strict=True)
    ]
    return np.asarray(~_first_in_block(groups) & (np.array(moved, dtype=np.int64) == nbytes))


def _total(kind: int) -> Callable[[UmRecords], float | None]:
    return lambda records: float(_durations(records.of(kind)).sum())


def _group(number: int) -> Callable[[UmRecords], float | None]:
    return lambda records: _median(_durations(records.of(GPU_FAULT))[number : number + 1])


def _new_block(records: UmRecords) -> float | None:
    groups = records.of(GPU_FAULT)
    return _median(_durations(groups)[1:][_first_in_block(groups)[1:]])


def _spacing(records: UmRecords) -> float | None:
    faults, groups = records.of(CPU_FAULT), records.of(GPU_FAULT)
    after = faults.start[faults.start > groups.end.max()] if len(groups) else faults.start
    return _median(np.diff(after) / 1000)


_FROM_RECORDS: dict[str, Callable[[UmRecords], float | None]] = {
    "htod_us": _total(HTOD),
    "dtoh_us": _total(DTOH),
    "gpu_fault_us": _total(GPU_FAULT),
    "htod_count": lambda records: len(records.of(HTOD)),
    "gpu_fault_groups": lambda records: len(records.of(GPU_FAULT)),
    "group_first_us": _group(0),
    "group_second_us": _group(1),
    "group_new_block_us": _new_block,
    "cpu_fault_spacing_us": _spacing,
}
_FROM_KERNELS: dict[str, Callable[[list[float]], float]] = {
    "kernel_us": itemgetter(-1), "init_kernel_us": itemgetter(0), "kernel_first_us": itemgetter(0),
    "kernel_min_us": min,
}  # fmt: skip
