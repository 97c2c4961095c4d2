"""nvprof's two unified memory reports: the summary block and the GPU trace, letter by letter.

The layouts are those of posted nvprof outputs. 1 KB is 1024 bytes here. Rows and lines without
records are left out, as nvprof does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kit.report import cupti
from kit.report.cupti import UmRecords, device_name, kernels, um_records
from kit.report.tables import Table, nvprof_size, nvprof_time

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["gpu_trace", "um_summary"]

_SUMMARY = ("Count", "Avg Size", "Min Size", "Max Size", "Total Size", "Total Time", "Name")
_SUMMARY_WIDTHS = (8, 8, 8, 8, 10, 10)
_GROUPS = (
    (cupti.HTOD, "Host To Device", True, True),
    (cupti.DTOH, "Device To Host", True, True),
    (cupti.DTOD, "Device To Device", True, True),
    (cupti.GPU_FAULT, "Gpu page fault groups", False, True),
    (cupti.THROTTLING, "Page throttles", False, True),
    (cupti.THRASHING, "Memory thrashes", True, False),
    (cupti.REMOTE_MAP, "Remote mapping from device", True, False),
)
_TOTALS = (
    (cupti.CPU_FAULT, "Total CPU Page faults"),
    (cupti.THRASHING, "Total CPU thrashes"),
    (cupti.REMOTE_MAP, "Total remote mappings to CPU"),
)

_TRACE = (
    "Start", "Duration", "Grid Size", "Block Size", "Regs*", "SSMem*", "DSMem*", "Device", "Context", "Stream",
    "Unified Memory", "Virtual Address", "Name",
)  # fmt: skip
_TRACE_WIDTHS = (8, 8, 19, 14, 8, 8, 8, 15, 8, 8, 20, 15)
_DEVICE_WIDTH, _VALUE_WIDTH = 15, 20
_TRACE_NAMES = {
    cupti.HTOD: "[Unified Memory Memcpy HtoD]",
    cupti.DTOH: "[Unified Memory Memcpy DtoH]",
    cupti.DTOD: "[Unified Memory Memcpy DtoD]",
    cupti.CPU_FAULT: "[Unified Memory CPU page faults]",
    cupti.GPU_FAULT: "[Unified Memory GPU page faults]",
    cupti.THRASHING: "[Unified Memory thrashing]",
    cupti.THROTTLING: "[Unified Memory page throttle]",
    cupti.REMOTE_MAP: "[Unified Memory remote map]",
}


def um_summary(run: Run) -> Table:
    """Return nvprof's block ``Unified Memory profiling result``.

    The rows are nvprof's, sizes and times as it prints them (``-`` where it prints none); the
    lines below the rows (``Total CPU Page faults: N``) are part of the text.
    """
    records = um_records(run)
    rows = [
        _summary_row(chosen, name, sizes, times)
        for kind, name, sizes, times in _GROUPS
        if len(chosen := records.of(kind))
    ]
    totals = [f"{text}: {count}" for kind, text in _TOTALS if (count := int(np.sum(records.kind == kind)))]
    device = f'Device "{device_name(run)} (0)"'
    caption = " ".join([device + ".", *(f"{line}." for line in totals)])

    def text(table: Table) -> str:
        lines = ["Unified Memory profiling result:"]
        if table.rows:
            lines += [device, _line(_SUMMARY, _SUMMARY_WIDTHS)]
            lines += [_line(row, _SUMMARY_WIDTHS) for row in table.rows]
        return "\n".join(lines + (totals or ([] if table.rows else ["No unified memory records."]))) + "\n"

    return Table("Unified Memory profiling result", _SUMMARY, rows, caption, printer=text)


def _summary_row(records: UmRecords, name: str, sizes: bool, times: bool) -> tuple[Any, ...]:
    count, total = len(records), int(records.bytes.sum())
    shown = [nvprof_size(size) for size in (total / count, int(records.bytes.min()), int(records.bytes.max()))]
    size = [*shown, nvprof_size(total, 10)] if sizes else ["-"] * 4
    time = nvprof_time(int((records.end - records.start).sum()), 10) if times else "-"
    return (count, *size, time, name)


def gpu_trace(run: Run) -> Table:
    """Return what ``nvprof --print-gpu-trace`` lists: kernels and unified memory records by start time.

    The column ``Unified Memory`` holds bytes for copies, faults for GPU fault groups and the
    program counter for CPU faults. Registers are not simulated: ``-``.
    """
    device = device_name(run)[:_DEVICE_WIDTH]
    launched, records = kernels(run), um_records(run)
    timed = [(kernel.start, 0, number) for number, kernel in enumerate(launched)]
    timed += [(start, 1, number) for number, start in enumerate(records.start.tolist())]
    launches = [
        (
            nvprof_time(k.start), nvprof_time(k.end - k.start), f"({k.grid} 1 1)", f"({k.block} 1 1)", "-", "0B", "0B",
            device, "1", "7", "-", "-", f"{k.name} [{number + 1}]",
        )
        for number, k in enumerate(launched)
    ]  # fmt: skip
    memory = _memory_rows(records, device)
    rows = [(memory if is_memory else launches)[number] for _, is_memory, number in sorted(timed)]

    def text(table: Table) -> str:
        return "\n".join(_line(row, _TRACE_WIDTHS) for row in [_TRACE, *table.rows]) + "\n"

    caption = "Every record by start time; KB is 1024 bytes."
    return Table("GPU trace", _TRACE, rows, caption, printer=text)


def _memory_rows(records: UmRecords, device: str) -> list[tuple[Any, ...]]:
    columns = (records.start, records.end, records.kind, records.address, records.value)
    rows: list[tuple[Any, ...]] = []
    for start, end, kind, address, value in zip(*(column.tolist() for column in columns), strict=True):
        on_cpu = kind == cupti.CPU_FAULT
        timed = not on_cpu and kind not in (cupti.THRASHING, cupti.REMOTE_MAP)
        rows.append((
            nvprof_time(start), nvprof_time(end - start) if timed else "-", "-", "-", "-", "-", "-",
            "-" if on_cpu else device, "-", "-", _value(kind, value), f"0x{address:x}", _TRACE_NAMES[kind],
        ))  # fmt: skip
    return rows


def _value(kind: int, value: int) -> str:
    if kind == cupti.CPU_FAULT:
        return f"PC 0x{value & 0xFFFFFFFF:x}"  # nvprof prints the low 32 bits
    if kind == cupti.GPU_FAULT:
        return str(value)
    return "-" if kind == cupti.THROTTLING else nvprof_size(value, _VALUE_WIDTH)


def _line(cells: tuple[Any, ...], widths: tuple[int, ...]) -> str:
    """Right-align all cells but the last, which is the name."""
    padded = [str(cell).rjust(width) for cell, width in zip(cells[:-1], widths, strict=True)]
    return "  ".join([*padded, str(cells[-1])])
