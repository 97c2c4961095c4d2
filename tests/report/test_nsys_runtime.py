"""The runtime calls in the SQLite export: what scripts join kernels and phases with."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.report.nsys_sqlite import write_nsys_sqlite

Export = Callable[..., sqlite3.Connection]
SMALL = {"program": "vector_add", "n": 4096}


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    opened: list[sqlite3.Connection] = []

    def make(**given: Any) -> sqlite3.Connection:
        path = tmp_path / f"{len(opened)}.sqlite"
        write_nsys_sqlite(kit.run("cuda_demand_paging", **given), path)
        opened.append(sqlite3.connect(path))
        return opened[-1]

    yield make
    for db in opened:
        with closing(db):
            pass


def calls(db: sqlite3.Connection) -> list[str]:
    query = "SELECT value FROM CUPTI_ACTIVITY_KIND_RUNTIME JOIN StringIds ON id = nameId ORDER BY start, correlationId"
    return [name.partition("_v")[0] for (name,) in db.execute(query)]


def test_the_table_is_declared_as_documented(export: Export) -> None:
    declared = [(row[1], row[2], bool(row[3])) for row in export(**SMALL).execute(
        "PRAGMA table_info(CUPTI_ACTIVITY_KIND_RUNTIME)")]  # fmt: skip
    required = {"start", "end", "eventClass", "nameId", "returnValue"}
    names = ["start", "end", "eventClass", "globalTid", "correlationId", "nameId", "returnValue", "callchainId"]
    assert declared == [(name, "INTEGER", name in required) for name in names]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "MallocManaged MallocManaged LaunchKernel DeviceSynchronize"),
        ({"repeats": 2}, "MallocManaged MallocManaged" + " LaunchKernel DeviceSynchronize" * 2),
        (
            {"prefetch": "both", "advice": "read_mostly"},
            "MallocManaged MallocManaged MemAdvise MemAdvise MemPrefetchAsync MemPrefetchAsync LaunchKernel "
            "DeviceSynchronize MemPrefetchAsync",
        ),
        ({"machine": "k80", "repeats": 2}, "MallocManaged MallocManaged" + " LaunchKernel DeviceSynchronize" * 2),
    ],
)
def test_the_programs_calls_in_order(export: Export, given: dict[str, Any], wanted: str) -> None:
    db = export(**SMALL, **given)
    assert calls(db) == ["cuda" + name for name in wanted.split()]
    rows = db.execute("SELECT start, end FROM CUPTI_ACTIVITY_KIND_RUNTIME ORDER BY start, correlationId").fetchall()
    assert all(start <= end for start, end in rows)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(rows)), "one thread"


@pytest.mark.parametrize("machine", ["p100_pcie3", "k80"])
def test_kernels_join_with_their_launches(export: Export, machine: str) -> None:
    db = export(**SMALL, repeats=3, machine=machine)
    joined = db.execute("""
        SELECT k.gridId, s.value, r.end <= k.start, r.globalTid = t.globalTid, e.label
        FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN CUPTI_ACTIVITY_KIND_RUNTIME r USING (correlationId)
        JOIN StringIds s ON s.id = r.nameId JOIN ENUM_NSYS_EVENT_CLASS e ON e.id = r.eventClass, ThreadNames t
        ORDER BY k.start
    """)
    assert joined.fetchall() == [(n, "cudaLaunchKernel_v7000", 1, 1, "CUDA runtime") for n in (1, 2, 3)]
    ids = [row[0] for row in db.execute("SELECT correlationId FROM CUPTI_ACTIVITY_KIND_RUNTIME")]
    assert len(set(ids)) == len(ids)


def test_the_wait_starts_after_what_the_cpu_touches_beside_the_kernel(export: Export) -> None:
    db = export(program="stream", buffer_bytes=4 << 20, first_touch="gpu", cpu_touches=200, lanes=1)
    (waits,) = db.execute(
        "SELECT start FROM CUPTI_ACTIVITY_KIND_RUNTIME JOIN StringIds ON id = nameId WHERE value LIKE '%Synchronize%'"
    ).fetchone()
    (start,) = db.execute("SELECT start FROM CUPTI_ACTIVITY_KIND_KERNEL").fetchone()
    (last,) = db.execute("SELECT max(start) FROM CUDA_UM_CPU_PAGE_FAULT_EVENTS").fetchone()
    assert start < last <= waits


def test_the_wait_for_a_killed_kernel_returns_the_error(export: Export) -> None:
    query = "SELECT returnValue FROM CUPTI_ACTIVITY_KIND_RUNTIME ORDER BY start, correlationId"
    killed = export(program="three_lines", buffer_bytes=1 << 16, stray_bytes=1 << 22)
    assert [row[0] for row in killed.execute(query)] == [0, 0, 700]  # cudaErrorIllegalAddress
    whole = export(program="three_lines", buffer_bytes=1 << 16)
    assert [row[0] for row in whole.execute(query)] == [0, 0, 0]


def test_phases_of_a_run_by_its_calls(export: Export) -> None:
    """The host fills memory between the last allocation and the first launch."""
    db = export(**SMALL)
    api = db.execute("SELECT start, end FROM CUPTI_ACTIVITY_KIND_RUNTIME ORDER BY start").fetchall()
    (first_launch,) = db.execute("SELECT min(start) FROM CUPTI_ACTIVITY_KIND_KERNEL").fetchone()
    faults = [row[0] for row in db.execute("SELECT start FROM CUDA_UM_CPU_PAGE_FAULT_EVENTS ORDER BY start")]
    filled = max(end for _, end in api if end <= faults[0])
    assert filled == api[1][1]
    assert min(start for start, _ in api if start > faults[0]) == first_launch
