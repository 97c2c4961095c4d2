"""Tables of the HMM flow: system calls as strace counts them, notifier events, migrations, three ways to offload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.report.events import step_event_columns
from kit.report.figures.window import COLUMN, spans_of
from kit.report.tables import ADDRESS, Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["KINDS", "commands", "event_columns", "migrations", "notifier_events", "strace", "three_ways"]

KINDS = {
    "do_user_addr_fault": "page_fault_user",
    "device_stall": "device_page_fault",
    "hmm_range_fault": "hmm_range_fault",
    "mmu_notifier_invalidate_range_start": "mmu_notifier_invalidate_range_start",
    "dmirror_interval_invalidate": "mirror_invalidate",
    "dmirror_devmem_fault": "migrate_to_ram",
    "migrate_vma_pages": "migrate_vma_pages",
    "device_copy": "copy",
}
"""Steps that are records of the events file, by what a tracer would call them."""
_CALLS = {
    "dmirror_read": "ioctl(HMM_DMIRROR_READ)", "dmirror_write": "ioctl(HMM_DMIRROR_WRITE)",
    "dmirror_migrate_to_device": "ioctl(HMM_DMIRROR_MIGRATE_TO_DEV)",
    "dmirror_migrate_to_system": "ioctl(HMM_DMIRROR_MIGRATE_TO_SYS)",
    "dmirror_fops_open": "openat", "dmirror_fops_release": "close", "mmap": "mmap", "munmap": "munmap",
    "mprotect": "mprotect", "madvise": "madvise", "fork": "fork", "exit_mmap": "exit_group",
}  # fmt: skip


def event_columns(run: Run) -> dict[str, NDArray[Any]]:
    """Return the columns of the records that a tracer of this kernel and device would show."""
    return step_event_columns(run, KINDS)


def strace(run: Run) -> Table:
    """Return system calls by time, as ``strace -c`` does: ioctl by command."""
    table, status = run.trace.spans.array(), run.trace.statuses.words
    found = []
    for step, name in _CALLS.items():
        rows = spans_of(run.trace, table, (step,))
        if len(rows):
            spent = float((rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]]).sum())
            wrong = sum(status[int(code)] != "ok" for code in rows[:, COLUMN["status"]])
            found.append((spent, len(rows), _errors(run, step) or wrong, name))
    whole = sum(row[0] for row in found) or 1.0
    rows_out: list[tuple[Any, ...]] = [
        (spent / whole * 100, spent / 1e6, spent / calls, calls, wrong or None, name)
        for spent, calls, wrong, name in sorted(found, reverse=True)
    ]
    columns = ("% time", "seconds", "usecs/call", "calls", "errors", "syscall")
    caption = "System calls by time spent in them, as strace -c counts them; ioctl by its command."
    return Table("strace", columns, rows_out, caption, (",.2f", ".6f", ",.0f", ",", ",", ""))


def _errors(run: Run, step: str) -> int:
    name = _CALLS[step].removeprefix("ioctl(").removesuffix(")")
    return sum(c.name == name and c.result != "0" for c in run.views.get("commands", ()))


def commands(run: Run, rows: int = 20) -> Table:
    """Return the commands to the device in order: arguments and results."""
    done = run.views.get("commands", [])
    made: list[tuple[Any, ...]] = [
        (c.name, c.address, c.npages, *((c.cpages, c.faults) if c.result == "0" else (None, None)), c.result)
        for c in done[:rows]
    ]  # fmt: skip
    more = f" The first {rows} of {len(done):,}." if len(done) > rows else ""
    caption = "Commands to the device: what it was asked and what came back. A command that fails copies nothing back."
    columns = ("command", "addr", "npages", "cpages", "faults", "result")
    return Table("commands", columns, made, caption + more, ("", ADDRESS, ",", ",", ",", ""))


def notifier_events(run: Run) -> Table:
    """Return invalidations by event: how many, of how many pages, and what the mirror dropped for them."""
    table, trace = run.trace.spans.array(), run.trace
    starts = spans_of(trace, table, ("mmu_notifier_invalidate_range_start",))
    drops = spans_of(trace, table, ("dmirror_interval_invalidate",))
    rows: list[tuple[Any, ...]] = []
    for event in EVENTS:
        code = trace.causes.ids.get(event.name, -1)
        some, dropped = starts[starts[:, COLUMN["cause"]] == code], drops[drops[:, COLUMN["cause"]] == code]
        if event is EVENTS.RELEASE:
            some = spans_of(trace, table, ("mmu_notifier_release",))
        if len(some) or len(dropped):
            spent = float((some[:, COLUMN["end"]] - some[:, COLUMN["start"]]).sum())
            pages = None if event is EVENTS.RELEASE else int(some[:, COLUMN["pages"]].sum())
            rows.append(
                (
                    f"MMU_NOTIFY_{event.name}",
                    len(some),
                    pages,
                    len(dropped),
                    int(dropped[:, COLUMN["pages"]].sum()),
                    spent,
                )
            )
    columns = ("event", "times", "pages", "told to the mirror", "entries dropped", "us")
    caption = "Every change of the CPU's page table is announced first; the mirror ignores its own driver's migrations."
    return Table("notifier_events", columns, rows, caption, ("", ",", ",", ",", ",", ",.1f"))


def migrations(run: Run) -> Table:
    """Return migrations by why they were made: time by phase, and pages that were asked for and that moved."""
    trace, table = run.trace, run.trace.spans.array()
    steps = ("migrate_vma_setup", "migrate_vma_pages", "migrate_vma_finalize")
    parents = table[:, COLUMN["parent"]].astype(np.int64)
    words = {
        "dmirror_migrate_to_device": "to device memory", "dmirror_migrate_to_system": "to system memory",
        "dmirror_devmem_fault": "home, by a CPU fault",
    }  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for caller, why in words.items():
        of = np.flatnonzero(table[:, COLUMN["step"]] == trace.steps.ids.get(caller, -1))
        if not len(of):
            continue
        inside = np.isin(parents, of)
        spent = {}
        for step in steps:
            mine = inside & (table[:, COLUMN["step"]] == trace.steps.ids.get(step, -1))
            spent[step] = float((table[mine, COLUMN["end"]] - table[mine, COLUMN["start"]]).sum())
            if step == steps[0]:
                count, pages = int(mine.sum()), int(table[mine, COLUMN["pages"]].sum())
        copied = inside & np.isin(
            table[:, COLUMN["step"]],
            [
                trace.steps.ids.get(s, -1)
                for s in ("dmirror_migrate_alloc_and_copy", "dmirror_devmem_fault_alloc_and_copy")
            ],
        )
        took = float((table[copied, COLUMN["end"]] - table[copied, COLUMN["start"]]).sum())
        rows.append((why, count, pages, spent[steps[0]], took, spent[steps[1]], spent[steps[2]]))
    columns = ("migration", "times", "pages", "setup us", "allocate and copy us", "pages us", "finalize us")
    caption = (
        "Where the time of migrations goes: collecting and unmapping, the driver's copy, exchanging, mapping again."
    )
    return Table("migrations", columns, rows, caption, ("", ",", ",", ",.1f", ",.1f", ",.1f", ",.1f"))


def three_ways(run: Run) -> Table:
    """Return the same walk done three ways: by copies, through a mirror, and with pages that move."""
    table, trace, m = run.trace.spans.array(), run.trace, run.metrics
    rows: list[tuple[Any, ...]] = []
    titles = {"without_hmm": "copies, without HMM", "mirror": "mirrored", "migrate": "migrated on fault"}
    for name, start, end in run.stages:
        if name not in titles or (name == "without_hmm" and not m["explicit_bytes"]):
            continue
        inside = (table[:, 0] >= start) & (table[:, 0] < end)
        some = table[inside]
        copies, walks = spans_of(trace, some, ("device_copy",)), spans_of(trace, some, ("device_walk",))
        stalls = spans_of(trace, some, ("device_stall",))
        rewritten = m["pointers_rewritten"] if name == "without_hmm" else 0
        visited = int(walks[:, COLUMN["pages"]].sum())
        near = int(walks[:, COLUMN["value"]].sum())
        working = float((walks[:, 1] - walks[:, 0]).sum())
        stalled = float((stalls[:, 1] - stalls[:, 0]).sum())
        rows.append(
            (titles[name], end - start, working, stalled, len(stalls), int(copies[:, COLUMN["bytes"]].sum()),
             int(rewritten), visited, near)
        )  # fmt: skip
    columns = (
        "the walk", "in all us", "device working us", "device stalled us", "device faults", "bytes copied",
        "pointers rewritten", "visits", "of them in device memory",
    )  # fmt: skip
    caption = "One walk of the structure, done three ways, each with what it needs before and after."
    return Table("three_ways", columns, rows, caption, ("", ",.0f", ",.0f", ",.0f", ",", ",", ",", ",", ","))
