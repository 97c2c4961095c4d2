"""The profiler's records: kinds, words, order, files."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest

from kit.report.events import EVENT_COLUMNS, event_columns, event_records, write_events_csv
from kit.report.files import whole_file
from kit.sim.trace import Trace

BASE = 0x7F26_0000_0000


def test_counts_are_those_of_every_posted_run_of_the_program(vector_add_run):
    # 48 / 24 / 12 / 36: nvprof on RTX 2060 Max-Q, T4, GTX 1060, TITAN Xp, V100, RTX 8000.
    kinds = Counter(record["kind"] for record in event_records(vector_add_run))
    assert kinds == {
        "BYTES_TRANSFER_HTOD": 48, "BYTES_TRANSFER_DTOH": 24, "GPU_PAGE_FAULT": 12, "CPU_PAGE_FAULT_COUNT": 36,
    }  # fmt: skip


def test_records_carry_what_cupti_says(make_run):
    trace = Trace()
    trace.span("service_fault_batch", "UVM GPU0 BH", 0, 9)
    trace.span("UvmEventTypeCpuFault", "cpu", 4.0, 4.0, va=BASE + 4096, cause="write", value=0x402D41)
    trace.span("UvmEventTypeGpuFault", "gpu", 3.0, 8.25, va=BASE, pages=7, cause="atomic", value=114)
    trace.span("UvmEventTypeMigration", "copy DtoH", 2.0, 2.5, va=BASE, bytes=8192, cause="eviction")
    trace.span("UvmEventTypeThrashingDetected", "cpu", 5.0, 5.0, va=BASE, bytes=4096)
    trace.span("UvmEventTypeMapRemote", "gpu", 6.0, 6.0, va=BASE, bytes=65536, cause="policy")
    rows = [tuple(record[name] for name in EVENT_COLUMNS) for record in event_records(make_run(trace))]
    assert rows == [
        (2.0, 0.5, "BYTES_TRANSFER_DTOH", 0, 8192, 8192, "EVICTION"),
        (3.0, 5.25, "GPU_PAGE_FAULT", 0, 0, 114, "ATOMIC"),
        (4.0, 0.0, "CPU_PAGE_FAULT_COUNT", 4096, 0, 0x402D41, "WRITE"),
        (5.0, 0.0, "THRASHING", 0, 4096, 4096, ""),
        (6.0, 0.0, "REMOTE_MAP", 0, 65536, 65536, "POLICY"),
    ]
    json.dumps(rows)


def test_throttling_lasts_until_its_own_end(make_run):
    trace = Trace()
    for time, page in ((10, 0), (11, 1), (50, 0)):
        trace.span("UvmEventTypeThrottlingStart", "gpu", time, time, va=BASE + page * 4096)
    for time, page in ((30, 1), (31, 0), (75, 0)):
        trace.span("UvmEventTypeThrottlingEnd", "gpu", time, time, va=BASE + page * 4096)
    trace.span("UvmEventTypeThrottlingStart", "gpu", 90, 90, va=BASE)
    throttled = [(r["time_us"], r["duration_us"], r["address"]) for r in event_records(make_run(trace))]
    assert throttled == [(10, 21, 0), (11, 19, 4096), (50, 25, 0), (90, 0, 0)]


def test_rows_sort_by_start_and_ties_keep_the_order_of_the_trace(make_run):
    trace = Trace()
    for value in range(5):
        trace.span("UvmEventTypeCpuFault", "cpu", 1.0, 1.0, va=BASE, value=value)
    trace.span("UvmEventTypeCpuFault", "cpu", 0.5, 0.5, va=BASE, value=9)
    assert event_columns(make_run(trace))["value"].tolist() == [9, 0, 1, 2, 3, 4]


def test_csv_holds_the_same_records_and_the_same_bytes_each_time(vector_add_run, tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    write_events_csv(vector_add_run, first)
    write_events_csv(vector_add_run, second)
    assert first.read_bytes() == second.read_bytes()
    with first.open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = event_records(vector_add_run)
    assert list(rows[0]) == list(EVENT_COLUMNS)
    assert [(float(r["time_us"]), r["kind"], int(r["address"]), int(r["value"]), r["cause"]) for r in rows] == [
        (r["time_us"], r["kind"], r["address"], r["value"], r["cause"]) for r in records
    ]


def test_a_run_without_events_has_only_the_heading(empty_run, tmp_path):
    write_events_csv(empty_run, tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text() == "time_us,duration_us,kind,address,bytes,value,cause\n"
    assert event_records(empty_run) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_trace_can_go_on_after_a_report(make_run):
    trace = Trace()
    trace.span("UvmEventTypeCpuFault", "cpu", 1.0, 1.0, va=BASE)
    run = make_run(trace)
    kept = event_columns(run)
    trace.span("UvmEventTypeCpuFault", "cpu", 2.0, 2.0, va=BASE)
    assert (len(kept["time_us"]), len(event_records(run))) == (1, 2)
