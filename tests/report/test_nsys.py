"""nsys tables, and the SQLite export, against each other and against posted nsys outputs."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from kit.report import table
from kit.report.nsys_sqlite import write_nsys_sqlite
from kit.sim.trace import Trace

KIB = 1 << 10


@pytest.fixture(params=["vector_add_run", "random_run", "empty_run"])
def exported(request, tmp_path):
    """A run and a connection to its export."""
    run = request.getfixturevalue(request.param)
    path = tmp_path / "report.sqlite"
    write_nsys_sqlite(run, path)
    with closing(sqlite3.connect(path)) as db:
        yield run, db


def same(rows, wanted):
    """Tell whether tables agree: empty cells empty, numbers but for the last bit."""
    flat = [[value for row in table for value in row] for table in (list(rows), list(wanted))]
    assert [value is None for value in flat[0]] == [value is None for value in flat[1]]
    return [v for v in flat[0] if v is not None] == pytest.approx([v for v in flat[1] if v is not None], rel=1e-12)


def test_um_sum_is_what_a_query_of_the_export_says(exported):
    run, db = exported
    query = """
        WITH parts(va, h2d, d2h, ns, cpu, gpu) AS (
            SELECT virtualAddress, iif(copyKind = 11, bytes, NULL), iif(copyKind = 12, bytes, NULL), end - start,
                   NULL, NULL FROM CUPTI_ACTIVITY_KIND_MEMCPY WHERE copyKind IN (11, 12)
            UNION ALL SELECT address, NULL, NULL, NULL, 1, NULL FROM CUDA_UM_CPU_PAGE_FAULT_EVENTS
            UNION ALL SELECT address, NULL, NULL, NULL, NULL, numberOfPageFaults FROM CUDA_UM_GPU_PAGE_FAULT_EVENTS
        )
        SELECT va, sum(h2d) / 1e6, sum(d2h) / 1e6, sum(cpu), sum(gpu),
               (ifnull(sum(h2d), 0) + ifnull(sum(d2h), 0)) * (1000000000 / sum(ns)) / 1e6 AS rate
        FROM parts GROUP BY va ORDER BY rate DESC NULLS LAST, va LIMIT 10
    """
    assert same(table(run, "um_sum").rows, db.execute(query))


def test_um_total_sum_is_what_a_query_of_the_export_says(exported):
    run, db = exported
    h2d, d2h = (
        db.execute(
            "SELECT sum(bytes) / 1e6, min(virtualAddress), max(virtualAddress)"
            " FROM CUPTI_ACTIVITY_KIND_MEMCPY WHERE copyKind = ?",
            (kind,),
        ).fetchone()
        for kind in (11, 12)
    )
    cpu = db.execute("SELECT count(*), min(address), max(address) FROM CUDA_UM_CPU_PAGE_FAULT_EVENTS").fetchone()
    gpu = db.execute(
        "SELECT sum(numberOfPageFaults), min(address), max(address) FROM CUDA_UM_GPU_PAGE_FAULT_EVENTS"
    ).fetchone()
    # SQLite's min and max of several values are empty as soon as one of them is.
    low, high = db.execute(
        "SELECT min(?, ?, ?, ?), max(?, ?, ?, ?)",
        [part[1] for part in (h2d, d2h, cpu, gpu)] + [part[2] for part in (h2d, d2h, cpu, gpu)],
    ).fetchone()
    assert same(table(run, "um_total_sum").rows, [(h2d[0], d2h[0], cpu[0], gpu[0], low, high)])


def test_cpu_faults_by_instruction_are_what_a_query_of_the_export_says(exported):
    run, db = exported
    query = """
        SELECT count(*) AS faults, value
        FROM CUDA_UM_CPU_PAGE_FAULT_EVENTS AS f JOIN StringIds AS s ON s.id = f.CpuInstruction
        GROUP BY f.CpuInstruction, f.sourceFile, f.sourceLine ORDER BY faults DESC, originalFaultPc
    """
    assert table(run, "um_cpu_page_faults_sum").rows == list(db.execute(query))


@pytest.mark.parametrize(("name", "value", "scale"), [
    ("cuda_gpu_mem_size_sum", "bytes", 1e6), ("cuda_gpu_mem_time_sum", "end - start", 1),
])  # fmt: skip
def test_copy_tables_are_what_queries_of_the_export_say(exported, name, value, scale):
    run, db = exported
    query = f"""
        SELECT sum(v), count(*), avg(v), min(v), max(v), '[CUDA memcpy ' || label || ']'
        FROM (SELECT {value} AS v, copyKind FROM CUPTI_ACTIVITY_KIND_MEMCPY) JOIN ENUM_CUDA_MEMCPY_OPER ON id = copyKind
        GROUP BY label ORDER BY 1 DESC, label
    """
    wanted = [(t / scale, n, a / scale, lo / scale, hi / scale, op) for t, n, a, lo, hi, op in db.execute(query)]
    unit = "MB" if scale > 1 else "ns"
    total = "Total (MB)" if scale > 1 else "Total Time (ns)"
    keys = (total, "Count", f"Avg ({unit})", f"Min ({unit})", f"Max ({unit})", "Operation")
    found = [tuple(record[key] for key in keys) for record in table(run, name).records()]
    assert [row[-1] for row in found] == [row[-1] for row in wanted]
    assert [row[:-1] for row in found] == [pytest.approx(row[:-1], rel=1e-9, abs=0.051) for row in wanted]


def test_copy_sizes_print_as_nsys_printed_them_for_the_same_program(vector_add_run):
    # cuda_gpu_mem_size_sum of add<<<1,1>>>, nsys 2023 and 2025, several posted logs with the same lines.
    assert table(vector_add_run, "cuda_gpu_mem_size_sum").to_text().splitlines() == [
        " Total (MB)  Count  Avg (MB)  Med (MB)  Min (MB)  Max (MB)  StdDev (MB)               Operation              ",
        " ----------  -----  --------  --------  --------  --------  -----------  ------------------------------------",
        "      8.389     48     0.175     0.033     0.004     1.044        0.304  [CUDA memcpy Unified Host-to-Device]",
        "      4.194     24     0.175     0.033     0.004     1.044        0.307  [CUDA memcpy Unified Device-to-Host]",
    ]


def test_deviation_is_that_of_a_sample(make_run):
    # 28 + 4 + 96 KiB: nsys printed StdDev 47.721 KiB (github.com/FindHao/unified_memory_example, 2021).
    trace = Trace()
    for size in (28, 4, 96):
        trace.span("UvmEventTypeMigration", "copy DtoH", size, size + 1, va=4096, bytes=size * KIB)
    (record,) = table(make_run(trace), "cuda_gpu_mem_size_sum").records()
    assert record["StdDev (MB)"] * 1e6 / KIB == pytest.approx(47.721, abs=5e-4)
    assert record["Avg (MB)"] * 1e6 / KIB == pytest.approx(42.667, abs=5e-4)


def test_headings_are_the_report_scripts_own(vector_add_run):
    assert table(vector_add_run, "um_sum").columns == (
        "Virtual Address", "HtoD Migration size (MB)", "DtoH Migration size (MB)", "CPU Page Faults",
        " GPU Page Faults", "Migration Throughput (MB/s)",
    )  # fmt: skip
    assert table(vector_add_run, "um_total_sum").columns == (
        "Total HtoD Migration Size (MB)", "Total DtoH Migration Size (MB)", "Total CPU Page Faults",
        "Total GPU PageFaults", "Minimum Virtual Address", "Maximum Virtual Address",
    )  # fmt: skip
    assert table(vector_add_run, "um_cpu_page_faults_sum").columns == ("CPU Page Faults", "CPU Instruction Address")
    assert table(vector_add_run, "cuda_gpu_mem_time_sum").columns == (
        "Time (%)", "Total Time (ns)", "Count", "Avg (ns)", "Med (ns)", "Min (ns)", "Max (ns)", "StdDev (ns)",
        "Operation",
    )  # fmt: skip


def test_totals_of_the_vector_add(vector_add_run):
    (row,) = table(vector_add_run, "um_total_sum").rows
    assert row == pytest.approx((8.388608, 4.194304, 36, 12, 0x7F26_0000_0000, 0x7F26_0070_1000), rel=1e-12)
    assert "0x7F2600000000" in table(vector_add_run, "um_total_sum").to_text()


def test_um_sum_has_ten_rows_unless_told(vector_add_run):
    assert len(table(vector_add_run, "um_sum").rows) == 10
    assert len(table(vector_add_run, "um_sum:rows=3").rows) == 3
    # 12 addresses a block: each of the six faults' two copies starts at one of its own.
    assert len(table(vector_add_run, "um_sum:rows=99").rows) == 48


def test_export_declares_types_and_not_null_as_documented(exported):
    _, db = exported

    def declared(name):
        return {row[1]: (row[2], bool(row[3])) for row in db.execute(f"PRAGMA table_info({name})")}

    cpu, gpu = declared("CUDA_UM_CPU_PAGE_FAULT_EVENTS"), declared("CUDA_UM_GPU_PAGE_FAULT_EVENTS")
    required = {name for name, (_, not_null) in cpu.items() if not_null}
    assert required == {"start", "globalPid", "address", "CpuInstruction", "module"}
    assert {"originalFaultPc", "unresolvedFaultPc", "sourceFile", "sourceLine"} < set(cpu)
    names = ["start", "end", "globalPid", "deviceId", "address", "numberOfPageFaults", "faultAccessType"]
    assert gpu == dict.fromkeys(names, ("INTEGER", True))
    assert list(declared("CUPTI_ACTIVITY_KIND_MEMCPY")) == [
        "start", "end", "deviceId", "contextId", "greenContextId", "streamId", "correlationId", "globalPid", "bytes",
        "copyKind", "deprecatedSrcId", "srcKind", "dstKind", "srcDeviceId", "srcContextId", "dstDeviceId",
        "dstContextId", "migrationCause", "graphNodeId", "virtualAddress",
    ]  # fmt: skip
    assert dict(db.execute("SELECT name, value FROM META_DATA_EXPORT"))["EXPORT_SCHEMA_VERSION"] == "3.16.1"


def test_export_enums_are_the_documented_ones(exported):
    _, db = exported
    operations = {i: (name, label) for i, name, label in db.execute("SELECT * FROM ENUM_CUDA_MEMCPY_OPER")}
    assert len(operations) == 14
    assert operations[1] == ("CUDA_MEMCPY_KIND_HTOD", "Host-to-Device")
    assert operations[10] == ("CUDA_MEMCPY_KIND_PTOP", "Peer-to-Peer")
    assert operations[11] == ("CUDA_MEMCPY_KIND_UVM_HTOD", "Unified Host-to-Device")
    assert operations[12] == ("CUDA_MEMCPY_KIND_UVM_DTOH", "Unified Device-to-Host")
    assert operations[13] == ("CUDA_MEMCPY_KIND_UVM_DTOD", "Unified Device-to-Device")
    kinds = {i: label for i, _, label in db.execute("SELECT * FROM ENUM_CUDA_MEM_KIND")}
    assert (kinds[0], kinds[4], kinds[7]) == ("Pageable", "Managed", "Unknown")
    causes = {i: label for i, _, label in db.execute("SELECT * FROM ENUM_CUDA_UNIF_MEM_MIGRATION")}
    assert (causes[1], causes[2], causes[4]) == ("User prefetch", "Page fault", "Eviction")
    access = {i: label for i, _, label in db.execute("SELECT * FROM ENUM_CUDA_UNIF_MEM_ACCESS_TYPE")}
    assert [access[i] for i in range(1, 5)] == ["Read", "Write", "Atomic", "Prefetch"]


def test_references_between_tables_resolve(exported):
    run, db = exported
    references = {"migrationCause": "ENUM_CUDA_UNIF_MEM_MIGRATION", "copyKind": "ENUM_CUDA_MEMCPY_OPER",
                  "srcKind": "ENUM_CUDA_MEM_KIND", "deviceId": "TARGET_INFO_GPU"}  # fmt: skip
    for column, target in references.items():
        query = f"SELECT count(*) FROM CUPTI_ACTIVITY_KIND_MEMCPY WHERE {column} NOT IN (SELECT id FROM {target})"
        assert db.execute(query).fetchone() == (0,), column
    # The process id is packed into a global id, as every script that groups by process unpacks it.
    query = """
        SELECT pid = globalPid / 0x1000000 % 0x1000000, name FROM PROCESSES JOIN TARGET_INFO_CUDA_DEVICE USING (pid)
    """
    assert db.execute(query).fetchall() == [(1, "vector_add")]
    query = "SELECT value FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON id = shortName"
    assert [row[0] for row in db.execute(query)] == ["add"] * ("kernel" in run.trace.steps.ids)


def test_export_replaces_an_old_file_whole(vector_add_run, tmp_path):
    path = tmp_path / "report.sqlite"
    path.write_text("not a database")
    write_nsys_sqlite(vector_add_run, path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert list(tmp_path.iterdir()) == [path]


def test_export_repeats_byte_for_byte(vector_add_run, tmp_path):
    first, second = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    write_nsys_sqlite(vector_add_run, first)
    write_nsys_sqlite(vector_add_run, second)
    assert first.read_bytes() == second.read_bytes()
