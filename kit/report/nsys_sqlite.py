"""The run as a Nsight Systems SQLite export, for the scripts that people run on such files.

Tables, columns, types and enums are those of export schema 3.16.1. Tables of unified memory
faults exist even when they are empty: a script then reads "none" and not "not captured".
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from kit.report import cupti
from kit.report.cuda_calls import RuntimeCall, runtime_calls
from kit.report.cupti import UmRecords, device_name, um_records
from kit.report.files import whole_file

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["ACCESS_TYPE", "COPY_KIND", "MEMCPY_LABELS", "MIGRATION", "write_nsys_sqlite"]

COPY_KIND = {cupti.HTOD: 11, cupti.DTOH: 12, cupti.DTOD: 13}
"""Unified memory copies in ``ENUM_CUDA_MEMCPY_OPER``, by CUPTI counter kind."""
ACCESS_TYPE = {"READ": 1, "WRITE": 2, "ATOMIC": 3, "PREFETCH": 4}
MIGRATION = {"USER": 1, "COHERENCE": 2, "PREFETCH": 3, "EVICTION": 4, "ACCESS_COUNTERS": 5}
_MIGRATION_LABELS = ("Unknown", "User prefetch", "Page fault", "Speculative prefetch", "Eviction", "Access counters")
_OPERATIONS = (
    "UNKNOWN", "HTOD", "DTOH", "HTOA", "ATOH", "ATOA", "ATOD", "DTOA", "DTOD", "HTOH", "PTOP",
    "UVM_HTOD", "UVM_DTOH", "UVM_DTOD",
)  # fmt: skip
_PLACES = {"H": "Host", "D": "Device", "A": "Array", "P": "Peer"}


def _operation_label(name: str) -> str:
    if name == "UNKNOWN":
        return "Unknown"
    way = name.removeprefix("UVM_")
    return ("Unified " if name.startswith("UVM_") else "") + f"{_PLACES[way[0]]}-to-{_PLACES[way[-1]]}"


MEMCPY_LABELS = tuple(_operation_label(name) for name in _OPERATIONS)
"""Labels of ``ENUM_CUDA_MEMCPY_OPER`` by id."""
_MEM_KINDS = ("Pageable", "Pinned", "Device", "Array", "Managed", "Device Static", "Managed Static", "Unknown")
_MANAGED = _MEM_KINDS.index("Managed")
_CUPTI = "CUPTI_ACTIVITY_UNIFIED_MEMORY"

_ENUMS: dict[str, list[tuple[int, str, str]]] = {
    "ENUM_CUDA_MEMCPY_OPER": [
        (i, f"CUDA_MEMCPY_KIND_{name}", MEMCPY_LABELS[i]) for i, name in enumerate(_OPERATIONS)
    ],
    "ENUM_CUDA_MEM_KIND": [
        (i, "CUDA_MEMOPR_MEMORY_KIND_" + label.upper().replace(" ", "_"), label) for i, label in enumerate(_MEM_KINDS)
    ],
    "ENUM_CUDA_UNIF_MEM_ACCESS_TYPE": [
        (i, f"{_CUPTI}_ACCESS_TYPE_{word}", word.title()) for word, i in {"UNKNOWN": 0, **ACCESS_TYPE}.items()
    ],
    "ENUM_CUDA_UNIF_MEM_MIGRATION": [
        (i, f"{_CUPTI}_MIGRATION_CAUSE_{word}", _MIGRATION_LABELS[i])
        for word, i in {"UNKNOWN": 0, **MIGRATION}.items()
    ],
    "ENUM_CUDA_KERNEL_LAUNCH_TYPE": [
        (0, "CUDA_KERNEL_LAUNCH_TYPE_UNKNOWN", "Unknown"), (1, "CUDA_KERNEL_LAUNCH_TYPE_REGULAR", "Regular"),
    ],
    "ENUM_NSYS_EVENT_CLASS": [
        (0, "TRACE_PROCESS_EVENT_CUDA_RUNTIME", "CUDA runtime"), (1, "TRACE_PROCESS_EVENT_CUDA_DRIVER", "CUDA driver"),
    ],
}  # fmt: skip

# Columns are INTEGER unless ":TEXT" says otherwise; "!" is NOT NULL.
_TABLES = {
    "ThreadNames": "nameId! priority globalTid",
    "PROCESSES": "globalPid pid name:TEXT",
    "ANALYSIS_DETAILS": "globalVid! duration! startTime! stopTime!",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs utcTime:TEXT localTime:TEXT",
    "TARGET_INFO_GPU": "vmId! id! name:TEXT busLocation:TEXT isDiscrete l2CacheSize totalMemory memoryBandwidth "
    "clockRate smCount pwGpuId uuid:TEXT luid chipName:TEXT cuDevice ctxswDevPath:TEXT ctrlDevPath:TEXT revision "
    "nodeMask constantMemory maxIPC maxRegistersPerBlock maxShmemPerBlock maxShmemPerBlockOptin maxShmemPerSm "
    "maxRegistersPerSm threadsPerWarp asyncEngines maxWarpsPerSm maxBlocksPerSm maxThreadsPerBlock maxBlockDimX "
    "maxBlockDimY maxBlockDimZ maxGridDimX maxGridDimY maxGridDimZ computeMajor computeMinor smMajor smMinor",
    "TARGET_INFO_CUDA_DEVICE": "gpuId cudaId! pid! uuid:TEXT numMultiprocessors",
    "TARGET_INFO_CUDA_CONTEXT_INFO": "nullStreamId! hwId! vmId! processId! deviceId! contextId! parentContextId "
    "isGreenContext",
    "META_DATA_CAPTURE": "name:TEXT! value:TEXT",
    "META_DATA_EXPORT": "name:TEXT! value:TEXT",
    "CUDA_UM_CPU_PAGE_FAULT_EVENTS": "start! globalPid! address! originalFaultPc CpuInstruction! module! "
    "unresolvedFaultPc sourceFile sourceLine",
    "CUDA_UM_GPU_PAGE_FAULT_EVENTS": "start! end! globalPid! deviceId! address! numberOfPageFaults! faultAccessType!",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start! end! deviceId! contextId! greenContextId streamId! correlationId globalPid "
    "bytes! copyKind! deprecatedSrcId srcKind dstKind srcDeviceId srcContextId dstDeviceId dstContextId migrationCause "
    "graphNodeId virtualAddress",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start! end! eventClass! globalTid correlationId nameId! returnValue! callchainId",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start! end! deviceId! contextId! greenContextId streamId! correlationId globalPid "
    "demangledName! shortName! mangledName launchType cacheConfig registersPerThread! gridX! gridY! gridZ! blockX! "
    "blockY! blockZ! staticSharedMemory! dynamicSharedMemory! localMemoryPerThread! localMemoryTotal! gridId! "
    "sharedMemoryExecuted graphNodeId sharedMemoryLimitConfig",
}

# One process on one machine: hardware id, virtual machine, process and thread packed into 64 bits.
_PID = 1000
_GLOBAL_PID = (1 << 56) | (_PID << 24)
_CONTEXT, _STREAM, _UM_STREAM = 1, 7, 0
_META_EXPORT = (
    ("EXPORT_PRODUCT_NAME", "NVIDIA Nsight Systems"),
    ("EXPORT_PRODUCT_VERSION", "2024.6.2"),
    ("EXPORT_SCHEMA_VERSION", "3.16.1"),
    ("EXPORT_SCHEMA_VERSION_MAJOR", "3"),
    ("EXPORT_SCHEMA_VERSION_MINOR", "16"),
    ("EXPORT_SCHEMA_VERSION_MICRO", "1"),
)


class _Strings:
    """``StringIds``: words that other tables name by number."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self.ids.setdefault(word, len(self.ids) + 1)


def write_nsys_sqlite(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the run as an SQLite file in the layout of a Nsight Systems export.

    Times are nanoseconds from the start of the run, addresses absolute. A run without unified
    memory events gives empty tables. An existing file is replaced once the new one is whole.
    """
    records = um_records(run)
    with whole_file(path) as temporary, closing(sqlite3.connect(temporary, isolation_level=None)) as db:
        # The file is new and renamed when whole: a journal would protect nothing.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        _create(db)
        strings = _Strings()
        _insert(db, "CUDA_UM_CPU_PAGE_FAULT_EVENTS", _cpu_faults(records.of(cupti.CPU_FAULT), strings))
        _insert(db, "CUDA_UM_GPU_PAGE_FAULT_EVENTS", _gpu_faults(records.of(cupti.GPU_FAULT)))
        _insert(db, "CUPTI_ACTIVITY_KIND_MEMCPY", _copies(records.of(*COPY_KIND)))
        # A call's place in the program is its correlation id, which the kernel that it launched has too.
        calls = list(enumerate(runtime_calls(run), start=1))
        _insert(db, "CUPTI_ACTIVITY_KIND_RUNTIME", _calls(calls, strings))
        _insert(db, "CUPTI_ACTIVITY_KIND_KERNEL", _launches(calls, strings))
        _insert_facts(db, run, strings)
        _insert(db, "StringIds", ((i, word) for word, i in strings.ids.items()))
        db.execute("COMMIT")


def _create(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL)")
    for table, columns in _TABLES.items():
        db.execute(f"CREATE TABLE {table} ({', '.join(map(_column, columns.split()))})")
    for table, rows in _ENUMS.items():
        db.execute(f"CREATE TABLE {table} (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT)")
        _insert(db, table, rows)


def _column(declared: str) -> str:
    name, _, kind = declared.rstrip("!").partition(":")
    return f"{name} {kind or 'INTEGER'}{' NOT NULL' if declared.endswith('!') else ''}"


def _insert(db: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]) -> None:
    width = 3 if table in _ENUMS else len(_TABLES[table].split()) if table in _TABLES else 2
    db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", rows)


def _cpu_faults(faults: UmRecords, strings: _Strings) -> Iterable[tuple[Any, ...]]:
    module = strings("[Unknown]")
    for start, address, pc in zip(faults.start.tolist(), faults.address.tolist(), faults.value.tolist(), strict=True):
        yield start, _GLOBAL_PID, address, pc, strings(f"0x{pc:x}"), module, 1, None, None


def _gpu_faults(faults: UmRecords) -> Iterable[tuple[Any, ...]]:
    access = faults.cause_ids(ACCESS_TYPE)
    columns = (faults.start, faults.end, faults.address, faults.value, access)
    for start, end, address, count, kind in zip(*(c.tolist() for c in columns), strict=True):
        yield start, end, _GLOBAL_PID, 0, address, count, kind


def _copies(copies: UmRecords) -> Iterable[tuple[Any, ...]]:
    causes = copies.cause_ids(MIGRATION)
    columns = (copies.start, copies.end, copies.kind, copies.bytes, copies.address, causes)
    for start, end, kind, nbytes, address, cause in zip(*(c.tolist() for c in columns), strict=True):
        source = (None, None) if kind == cupti.HTOD else (0, _CONTEXT)
        target = (None, None) if kind == cupti.DTOH else (0, _CONTEXT)
        yield (
            start, end, 0, _CONTEXT, None, _UM_STREAM, 0, _GLOBAL_PID, nbytes, COPY_KIND[kind], None,
            _MANAGED, _MANAGED, *source, *target, cause, None, address,
        )  # fmt: skip


def _calls(calls: list[tuple[int, RuntimeCall]], strings: _Strings) -> Iterable[tuple[Any, ...]]:
    for correlation, call in calls:
        yield call.start, call.end, 0, _GLOBAL_PID | _PID, correlation, strings(call.name), call.result, None


def _launches(calls: list[tuple[int, RuntimeCall]], strings: _Strings) -> Iterable[tuple[Any, ...]]:
    launched = ((correlation, call.kernel) for correlation, call in calls if call.kernel is not None)
    for number, (correlation, k) in enumerate(launched, start=1):
        name, short = strings(k.name), strings(k.name.partition("(")[0])
        yield (
            k.start, k.end, 0, _CONTEXT, None, _STREAM, correlation, _GLOBAL_PID, name, short, name, 1, None,
            0, k.grid, 1, 1, k.block, 1, 1, 0, 0, 0, 0, number, None, None, None,
        )  # fmt: skip


def _insert_facts(db: sqlite3.Connection, run: Run, strings: _Strings) -> None:
    """Fill the tables that say which machine, process and export this is."""
    constants = run.machine.constants
    sms = int(constants["sms"].value) if "sms" in constants else None
    ends = [("end", f"CUPTI_ACTIVITY_KIND_{kind}") for kind in ("MEMCPY", "KERNEL", "RUNTIME")]
    ends += [("end", "CUDA_UM_GPU_PAGE_FAULT_EVENTS"), ("start", "CUDA_UM_CPU_PAGE_FAULT_EVENTS")]
    end = max(db.execute(f"SELECT ifnull(max({column}), 0) FROM {table}").fetchone()[0] for column, table in ends)
    program = str(run.parameters.get("program", run.flow))
    gpu = {"vmId": 0, "id": 0, "name": device_name(run), "isDiscrete": 1, "smCount": sms, "cuDevice": 0,
           "chipName": run.machine.architecture}  # fmt: skip
    columns = [declared.rstrip("!").partition(":")[0] for declared in _TABLES["TARGET_INFO_GPU"].split()]
    _insert(db, "TARGET_INFO_GPU", [[gpu.get(column) for column in columns]])
    _insert(db, "TARGET_INFO_CUDA_DEVICE", [(0, 0, _PID, None, sms)])
    _insert(db, "TARGET_INFO_CUDA_CONTEXT_INFO", [(_STREAM, 0, 0, _PID, 0, _CONTEXT, None, 0)])
    _insert(db, "TARGET_INFO_SESSION_START_TIME", [(0, "1970-01-01T00:00:00", "1970-01-01T00:00:00")])
    _insert(db, "ANALYSIS_DETAILS", [(1 << 56, end, 0, end)])
    _insert(db, "PROCESSES", [(_GLOBAL_PID, _PID, program)])
    _insert(db, "ThreadNames", [(strings(program), None, _GLOBAL_PID | _PID)])
    _insert(db, "META_DATA_EXPORT", _META_EXPORT)
    _insert(db, "META_DATA_CAPTURE", [("FLOW", run.flow), ("SCENARIO", run.scenario), ("MACHINE", run.machine.name)])
