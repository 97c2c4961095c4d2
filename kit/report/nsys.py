"""Tables of `nsys stats`: unified memory and GPU copies, by the rules of its report scripts.

They are computed from the rows that `kit.report.nsys_sqlite` writes, so a script run on the
exported file prints the same numbers. MB is 10**6 bytes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report import cupti
from kit.report.cupti import UmRecords, um_records
from kit.report.nsys_sqlite import COPY_KIND, MEMCPY_LABELS
from kit.report.tables import ADDRESS, Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["cuda_gpu_mem_size_sum", "cuda_gpu_mem_time_sum", "um_cpu_page_faults_sum", "um_sum", "um_total_sum"]

Ints = NDArray[np.int64]
_MB = 1e6


def um_sum(run: Run, rows: int = 10) -> Table:
    """Return nsys' *Unified Memory Analysis Summary*: one row a virtual address.

    Records are grouped by the exact address that they carry (not by page or allocation). The
    throughput is the report script's: bytes times the whole number of times that the copies'
    nanoseconds fit into a second. Rows without copies have none and come last.

    Parameters
    ----------
    run : Run
        The run.
    rows : int
        At most so many rows, highest throughput first; equal ones by address.
    """
    records = um_records(run)
    parts = {kind: records.of(kind) for kind in (cupti.HTOD, cupti.DTOH, cupti.CPU_FAULT, cupti.GPU_FAULT)}
    addresses: Ints = np.unique(np.concatenate([part.address for part in parts.values()]))
    seen, nbytes, duration = {}, {}, np.zeros(len(addresses), dtype=np.int64)
    for kind, part in parts.items():
        at = np.searchsorted(addresses, part.address)
        seen[kind] = np.bincount(at, minlength=len(addresses))
        nbytes[kind] = _sums(at, part.value, len(addresses))
        if kind in (cupti.HTOD, cupti.DTOH):
            duration += _sums(at, part.end - part.start, len(addresses))
    moved = nbytes[cupti.HTOD] + nbytes[cupti.DTOH]
    throughput = np.where(duration > 0, moved * (1_000_000_000 // np.maximum(duration, 1)), -1)
    best = np.lexsort((addresses, -throughput))[:rows]
    table: list[tuple[Any, ...]] = []
    for i in best.tolist():
        has = {kind: seen[kind][i] > 0 for kind in parts}
        table.append((
            int(addresses[i]),
            float(nbytes[cupti.HTOD][i]) / _MB if has[cupti.HTOD] else None,
            float(nbytes[cupti.DTOH][i]) / _MB if has[cupti.DTOH] else None,
            int(seen[cupti.CPU_FAULT][i]) if has[cupti.CPU_FAULT] else None,
            int(nbytes[cupti.GPU_FAULT][i]) if has[cupti.GPU_FAULT] else None,
            float(throughput[i]) / _MB if throughput[i] >= 0 else None,
        ))  # fmt: skip
    columns = (
        "Virtual Address", "HtoD Migration size (MB)", "DtoH Migration size (MB)", "CPU Page Faults",
        " GPU Page Faults", "Migration Throughput (MB/s)",
    )  # fmt: skip
    caption = f"{len(table)} of {len(addresses):,} virtual addresses, highest migration throughput first."
    return Table("um_sum", columns, table, caption, (ADDRESS, ",.3f", ",.3f", ",", ",", ",.3f"))


def _sums(at: Ints, values: Ints, length: int) -> Ints:
    """Add up `values` by index in whole numbers (bincount's doubles would round program-sized sums)."""
    total = np.zeros(length, dtype=np.int64)
    np.add.at(total, at, values)
    return total


def um_total_sum(run: Run) -> Table:
    """Return nsys' *Unified Memory Totals Summary*: one row.

    As in the report script, a sum over no rows is empty rather than 0, and the address range is
    empty unless there are faults of both sorts and copies both ways.
    """
    records = um_records(run)
    htod, dtoh = records.of(cupti.HTOD), records.of(cupti.DTOH)
    cpu, gpu = records.of(cupti.CPU_FAULT), records.of(cupti.GPU_FAULT)
    everywhere = all(len(part) for part in (htod, dtoh, cpu, gpu))
    row = (
        float(htod.bytes.sum()) / _MB if len(htod) else None,
        float(dtoh.bytes.sum()) / _MB if len(dtoh) else None,
        len(cpu),
        int(gpu.value.sum()) if len(gpu) else None,
        min(int(part.address.min()) for part in (htod, dtoh, cpu, gpu)) if everywhere else None,
        max(int(part.address.max()) for part in (htod, dtoh, cpu, gpu)) if everywhere else None,
    )
    columns = (
        "Total HtoD Migration Size (MB)", "Total DtoH Migration Size (MB)", "Total CPU Page Faults",
        "Total GPU PageFaults", "Minimum Virtual Address", "Maximum Virtual Address",
    )  # fmt: skip
    caption = "Totals of the run; a cell is empty where nothing of the kind was recorded."
    return Table("um_total_sum", columns, [row], caption, (",.3f", ",.3f", ",", ",", ADDRESS, ADDRESS))


def um_cpu_page_faults_sum(run: Run) -> Table:
    """Return nsys' *Unified Memory CPU Page Faults Summary*: faults by the instruction that made them."""
    instructions, counts = np.unique(um_records(run).of(cupti.CPU_FAULT).value, return_counts=True)
    order = np.lexsort((instructions, -counts))
    rows: list[tuple[Any, ...]] = [(int(counts[i]), f"0x{int(instructions[i]):x}") for i in order]
    columns = ("CPU Page Faults", "CPU Instruction Address")
    return Table("um_cpu_page_faults_sum", columns, rows, "CPU page faults by instruction, most first.", (",", ""))


def _operations(run: Run) -> list[tuple[str, UmRecords]]:
    """Return copies by operation, as nsys names it, in the order of the names."""
    records = um_records(run)
    found = [(f"[CUDA memcpy {MEMCPY_LABELS[number]}]", records.of(kind)) for kind, number in COPY_KIND.items()]
    return sorted((pair for pair in found if len(pair[1])), key=lambda pair: pair[0])


def _spread(values: Ints) -> tuple[float, float, int, int, float]:
    """Return mean, median, least, greatest and sample standard deviation (0 of a single value)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(np.median(values)), int(values.min()), int(values.max()), deviation


def cuda_gpu_mem_size_sum(run: Run) -> Table:
    """Return nsys' *CUDA GPU MemOps Summary (by Size)*: most bytes first."""
    rows: list[tuple[Any, ...]] = []
    for name, copies in _operations(run):
        spread = (value / _MB for value in _spread(copies.bytes))
        rows.append((float(copies.bytes.sum()) / _MB, len(copies), *spread, name))
    rows.sort(key=lambda row: -row[0])
    sizes = ("Total (MB)", "Count", "Avg (MB)", "Med (MB)", "Min (MB)", "Max (MB)", "StdDev (MB)", "Operation")
    return Table("cuda_gpu_mem_size_sum", sizes, rows, "Copies by bytes moved.", (",.3f", ",", *[",.3f"] * 5, ""))


def cuda_gpu_mem_time_sum(run: Run) -> Table:
    """Return nsys' *CUDA GPU MemOps Summary (by Time)*: longest total first."""
    found = [(name, len(copies), copies.end - copies.start) for name, copies in _operations(run)]
    everything = sum(int(times.sum()) for _, _, times in found)
    rows: list[tuple[Any, ...]] = []
    for name, count, times in found:
        total = int(times.sum())
        mean, median, least, greatest, deviation = _spread(times)
        share = round(100 * total / everything, 1) if everything else None
        rows.append((share, total, count, round(mean, 1), round(median, 1), least, greatest, round(deviation, 1), name))
    rows.sort(key=lambda row: -row[1])
    columns = (
        "Time (%)", "Total Time (ns)", "Count", "Avg (ns)", "Med (ns)", "Min (ns)", "Max (ns)", "StdDev (ns)",
        "Operation",
    )  # fmt: skip
    formats = (",.1f", ",", ",", ",.1f", ",.1f", ",", ",", ",.1f", "")
    return Table("cuda_gpu_mem_time_sum", columns, rows, "Copies by time spent.", formats)
