"""The Chrome JSON export: valid, complete, and laid out so that nothing overlaps."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from kit.report.perfetto import resident_bytes, write_perfetto
from kit.sim.trace import Trace

MIB, PAGE = 1 << 20, 4096
BASE = 0x7F26_0000_0000


@pytest.fixture
def load(tmp_path):
    def loaded(run):
        write_perfetto(run, tmp_path / "trace.json")
        assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
        return json.loads((tmp_path / "trace.json").read_text())

    return loaded


def test_every_span_is_an_event_and_every_lane_has_a_name(vector_add_run, load):
    data = load(vector_add_run)
    events = data["traceEvents"]
    phases = Counter(event["ph"] for event in events)
    # 48 + 24 copies, 12 groups and a kernel take time; 36 CPU faults do not.
    assert (phases["X"], phases["i"]) == (85, 36)
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in events if event["ph"] in "Xi"} == set(named)
    assert "copy HtoD: Migration" in named.values()
    order = [event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"]
    assert order == sorted(order)


def test_arguments_say_where_how_much_and_why(vector_add_run, load):
    copies = [e for e in load(vector_add_run)["traceEvents"] if e["name"] == "UvmEventTypeMigration"]
    first = min(copies, key=lambda event: event["ts"])
    assert first["args"] == {"va": f"0x{BASE:x}", "pages": 1, "bytes": PAGE, "value": 0, "cause": "coherence"}
    assert sum(event["args"]["bytes"] for event in copies) == 12 * MIB


def test_spans_of_a_lane_nest_or_follow(random_run, load):
    lanes = defaultdict(list)
    for event in load(random_run)["traceEvents"]:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            lanes[event["tid"]].append((start, start + round(event["dur"] * 1000)))
    assert len(lanes) > 4
    for spans in lanes.values():
        ends = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)


def test_driver_steps_that_nest_share_a_lane(make_run, load):
    trace = Trace()
    outer = trace.span("service_fault_batch", "UVM GPU0 BH", 0, 10)
    trace.span("service_fault_batch_block", "UVM GPU0 BH", 2, 9, parent=outer, status="NV_ERR_NO_MEMORY")
    trace.span("UvmEventTypeGpuFault", "gpu", 0, 10)
    events = [event for event in load(make_run(trace))["traceEvents"] if event["ph"] == "X"]
    assert len({event["tid"] for event in events}) == 2
    assert [e["args"]["status"] for e in events if "status" in e["args"]] == ["NV_ERR_NO_MEMORY"]


def test_residency_ends_where_the_program_left_the_pages(vector_add_run):
    time, held = resident_bytes(vector_add_run)
    assert list(held) == ["host memory", "device memory", "in flight"]
    assert (time[1:] > time[:-1]).all()
    assert held["host memory"][0] == 8 * MIB  # first touch populates both arrays before the kernel
    assert held["device memory"].max() == 8 * MIB
    assert [int(values[-1]) for values in held.values()] == [4 * MIB, 4 * MIB, 0]  # y has come back
    assert (held["host memory"] + held["device memory"] + held["in flight"] == 8 * MIB).all()


def test_a_read_duplicated_page_counts_in_both_places(make_run):
    trace = Trace()
    trace.move(1, 1, 10, 4, 0, 1)
    trace.move(2, 3, 10, 4, 1, 3)
    _, held = resident_bytes(make_run(trace))
    assert [values.tolist() for values in held.values()] == [[16384] * 3, [0, 0, 16384], [0, 16384, 0]]


def test_counters_follow_the_moves(vector_add_run, load):
    counters = [event for event in load(vector_add_run)["traceEvents"] if event["ph"] == "C"]
    assert counters[-1]["args"] == {"host memory": 4 * MIB, "device memory": 4 * MIB, "in flight": 0}


def test_an_empty_run_is_valid_json(empty_run, load):
    assert [event["ph"] for event in load(empty_run)["traceEvents"]] == ["M"]


def test_words_are_quoted(make_run, load):
    trace = Trace()
    trace.span("kernel", "gpu", 0, 1, cause='k("a\\b")')
    (event,) = (e for e in load(make_run(trace))["traceEvents"] if e["ph"] == "X")
    assert event["args"]["cause"] == 'k("a\\b")'
