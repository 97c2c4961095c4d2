"""Traces that keep to the documented steps conform; each way of departing from them is named."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.flows.documented import Calls, Documented
from kit.sim.trace import Trace


def flow(**calls: Calls) -> Documented:
    """Return a flow whose first step is the only root; steps that are only called are leaves."""
    names = dict.fromkeys([*calls, *(leaf for group in calls.values() for leaf in re.findall(r"\w+", str(group)))])
    return Documented({
        "flow": "made_up",
        "roots": [next(iter(calls))],
        "events": ["UvmEventTypeGpuFault"],
        "hardware": ["kernel"],
        "steps": [
            {"name": n, "source": "a.c @ 1", "line": 1, "calls": calls.get(n, []), "when": f"When {n}."} for n in names
        ],
    })  # fmt: skip


def trace(*rows: tuple[str, int]) -> Trace:
    """Return a trace of (step, parent row) spans."""
    made = Trace()
    for name, parent in rows:
        made.span(name, "cpu", 0, 0, parent=parent)
    return made


def called(parent: str, callees: Sequence[str]) -> Trace:
    return trace((parent, -1), *((name, 0) for name in callees))


SERVICE = flow(top=["fetch", ["look", ["hint", "select"], "service"], "replay", "wait", "replay"])


@pytest.mark.parametrize(
    "callees",
    [
        [],
        ["fetch", "look", "hint", "select", "service", "replay"],
        ["look", "service", "look", "service"],
        ["hint", "select", "hint", "hint", "look", "look"],
        ["service", "hint"],
        ["replay", "wait", "replay"],
        ["replay", "replay"],
        ["fetch", "wait"],
    ],
    ids=" ".join,
)
def test_documented_orders_conform(callees: list[str]) -> None:
    assert SERVICE.check(called("top", callees)).violations == []


@pytest.mark.parametrize(
    ("callees", "violation"),
    [
        (["fetch", "fetch"], "top calls fetch after fetch, out of order"),
        (["look", "fetch"], "top calls fetch after look, out of order"),
        (["replay", "look"], "top calls look after replay, out of order"),
        (["wait", "replay", "wait"], "top calls wait after replay, out of order"),
        (["replay"] * 3, "top calls replay after replay, out of order"),
        (["replay", "wait", "replay", "replay"], "top calls replay after replay, out of order"),
    ],
)
def test_other_orders_are_named(callees: list[str], violation: str) -> None:
    assert SERVICE.check(called("top", callees)).violations == [violation]


def test_children_are_ordered_by_row_under_their_own_parent() -> None:
    documented = flow(top=["a", "b"], a=["x", "y"], b=["x", "y"])
    rows = [("top", -1), ("a", 0), ("b", 0), ("x", 2), ("x", 1), ("y", 1), ("y", 2)]
    assert documented.check(trace(*rows)).violations == []
    assert documented.check(trace(*rows[:3], ("y", 2), ("x", 1), ("y", 1), ("x", 2))).violations == [
        "b calls x after y, out of order"
    ]


def test_wrong_and_missing_callers_are_named_with_the_documented_ones() -> None:
    documented = flow(top=["middle"], middle=["leaf"])
    assert documented.check(trace(("top", -1), ("leaf", 0), ("middle", -1), ("leaf", 2), ("top", 2))).violations == [
        "middle does not call top; documented callers: none, it is a root",
        "middle ran without a caller; documented callers: top",
        "top does not call leaf; documented callers: middle",
    ]


def test_events_and_hardware_may_stand_anywhere_and_a_root_may_start_under_them() -> None:
    documented = flow(top=["a", "b"])
    rows = [("kernel", -1), ("top", 0), ("a", 1), ("UvmEventTypeGpuFault", 1), ("b", 1), ("kernel", 4), ("a", 0)]
    assert documented.check(trace(*rows[:6])).violations == []
    assert documented.check(trace(*rows)).violations == ["a ran without a caller; documented callers: top"]


def test_unknown_steps_are_named_and_counted_once_a_name() -> None:
    found = flow(top=["a"]).check(trace(("top", -1), ("b", 0), ("b", -1), ("a", 1), ("a", 0)))
    assert found.violations == ["b is not a documented step (2 times)"]


def test_a_parent_must_be_an_earlier_row() -> None:
    assert flow(top=["a"]).check(trace(("a", 1), ("top", -1))).violations == ["a span's parent is not an earlier span"]


def test_same_violations_share_a_line_with_a_count() -> None:
    rows: list[tuple[str, int]] = []
    for _ in range(50):
        rows += [("top", -1), ("b", len(rows)), ("a", len(rows))]
    violations = flow(top=["a", "b"]).check(trace(*rows)).violations
    assert violations == ["top calls a after b, out of order (50 times)"]


def test_reached_and_not_reached_steps_share_out_the_file_in_its_order() -> None:
    found = flow(top=["a", "b", "c"]).check(called("top", ["b", "kernel"]))
    assert found.steps_reached == ["top", "b"]
    assert found.steps_documented == 4
    assert found.not_reached == {"a": "When a.", "c": "When c."}


def test_an_empty_trace_conforms_and_reaches_nothing() -> None:
    found = flow(top=["a"]).check(Trace())
    assert (found.steps_reached, found.violations) == ([], [])


CALLS = st.recursive(st.sampled_from("abcd"), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=8)


def ends(call: str | Calls, text: str, starts: set[int]) -> set[int]:
    """Return where a reading of `text` can be after `call`, which may be left out, begun at `starts`."""
    if isinstance(call, str):
        return starts | {start + 1 for start in starts if text[start : start + 1] == call}
    before: set[int] = set()
    while before != starts:
        before = starts
        for inner in call:
            starts = ends(inner, text, starts)
    return starts


@settings(max_examples=300, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=5), st.lists(st.text("abcd", max_size=9), max_size=6))
def test_an_order_is_right_when_the_calls_can_be_read_that_way(calls: Calls, texts: list[str]) -> None:
    documented = flow(top=calls)
    used = set(re.findall(r"\w", str(calls)))
    rows: list[tuple[str, int]] = []
    readable = True
    for text in texts:
        kept = "".join(name for name in text if name in used)
        at = {0}
        for call in calls:
            at = ends(call, kept, at)
        readable &= len(kept) in at
        parent = len(rows)
        rows += [("top", -1), *((name, parent) for name in kept)]
    violations = documented.check(trace(*rows)).violations
    assert bool(violations) != readable
    assert all("out of order" in violation for violation in violations)


def test_a_long_trace_is_checked_within_its_budget() -> None:
    documented = Documented.load("cuda_demand_paging")
    made = Trace()
    batches, faults = 2_000, 60

    def add(name: str, parent: int, at: float = 0.0) -> int:
        return made.span(name, "UVM GPU0 BH", at, at, parent=parent)

    add("uvm_parent_gpu_service_replayable_faults", -1, 0)
    outer = add("replayable_faults_isr_bottom_half", -1, 0)
    service = add("uvm_parent_gpu_service_replayable_faults", outer, 0)
    for batch in range(batches):
        add("fetch_fault_buffer_entries", service, batch)
        add("preprocess_fault_batch", service, batch)
        served = add("service_fault_batch", service, batch)
        dispatched = add("service_fault_batch_dispatch", served, batch)
        block = add("service_fault_batch_block", dispatched, batch)
        locked = add("service_fault_batch_block_locked", block, batch)
        for fault in range(faults):
            add("update_batch_and_notify_fault", locked, batch)
            add("check_fault_access_permissions", locked, batch)
            add("uvm_perf_thrashing_get_hint", locked, batch)
            word = "mark_fault_throttled" if batch >> (fault % 11) & 1 else "uvm_va_block_select_residency"
            add(word, locked, batch)
        add("uvm_va_block_service_locked", locked, batch)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = documented.check(made)
        seconds.append(time.perf_counter() - start)
    assert found.violations == [
        "uvm_parent_gpu_service_replayable_faults ran without a caller; documented callers: "
        "replayable_faults_isr_bottom_half"
    ]
    assert min(seconds) < len(made.spans) / 1e6, f"{len(made.spans)} spans took {min(seconds):.2f} s"
