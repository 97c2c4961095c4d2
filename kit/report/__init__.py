"""Tables, figures and exports, in the words of the tools that people already read.

`table` and `table_names` are the way in; everything behind them is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.report.tables import Table

__all__ = ["table", "table_names"]


def table_names() -> dict[str, str]:
    """Return the names of the tables that `table` can make, each with one line of what it shows."""
    return {
        "nvprof": "nvprof's unified memory summary block",
        "gpu_trace": "nvprof --print-gpu-trace: every record by start time",
        "um_sum": "nsys stats um_sum: migrations and faults by virtual address; um_sum:rows=N for more than 10",
        "um_total_sum": "nsys stats um_total_sum: migration and fault totals",
        "um_cpu_page_faults_sum": "nsys stats um_cpu_page_faults_sum: CPU faults by instruction",
        "cuda_gpu_mem_size_sum": "nsys stats cuda_gpu_mem_size_sum: copies by size",
        "cuda_gpu_mem_time_sum": "nsys stats cuda_gpu_mem_time_sum: copies by time",
        "events": "the records that a profiler would show",
        "metrics": "the run's metrics",
        "measured": "what was published about the same program on this machine, beside the run",
    }


def _makers() -> dict[str, Callable[[Run], Table]]:
    from kit.report import measured, nsys, nvprof, tables

    return {
        "nvprof": nvprof.um_summary,
        "gpu_trace": nvprof.gpu_trace,
        "um_sum": nsys.um_sum,
        "um_total_sum": nsys.um_total_sum,
        "um_cpu_page_faults_sum": nsys.um_cpu_page_faults_sum,
        "cuda_gpu_mem_size_sum": nsys.cuda_gpu_mem_size_sum,
        "cuda_gpu_mem_time_sum": nsys.cuda_gpu_mem_time_sum,
        "events": tables.events_table,
        "metrics": tables.metrics_table,
        "measured": measured.measured,
    }


def table(run: Run, name: str) -> Table:
    """Return a table of `run` by its report name, such as ``um_total_sum`` or ``um_sum:rows=20``.

    Raises
    ------
    ParameterError
        No such table, with the closest name; or rows that are not a whole number above 0.
    """
    from kit.errors import ParameterError, did_you_mean

    report, _, option = name.partition(":")
    if report not in table_names():
        raise ParameterError("table", name, "one of " + ", ".join(table_names()), did_you_mean(report, table_names()))
    if not option:
        return _makers()[report](run)
    key, _, count = option.partition("=")
    if report != "um_sum" or key != "rows" or not count.isdecimal() or int(count) < 1:
        raise ParameterError("table", name, "um_sum:rows=N with N at least 1 is the only table with an option")
    from kit.report.nsys import um_sum

    return um_sum(run, rows=int(count))
