"""The files that list documented steps are well formed and say where each step comes from."""

from __future__ import annotations

import re

import pytest

from kit.flows.documented import Documented, FlowFileError
from kit.paths import root

FLOWS = sorted(file.parent.name for file in (root() / "scenarios").glob("*/flow.yaml"))
SOURCE = re.compile(r"kernel-open/[\w./-]+\.[ch] @ 580\.105\.08")


@pytest.fixture(scope="module")
def cuda() -> Documented:
    return Documented.load("cuda_demand_paging")


def test_there_is_a_flow() -> None:
    assert "cuda_demand_paging" in FLOWS


@pytest.mark.parametrize("flow", FLOWS)
def test_every_step_says_where_it_is_and_when_it_is_reached(flow: str) -> None:
    documented = Documented.load(flow)
    assert documented.flow == flow
    for step in documented.steps.values():
        assert step.source and step.line > 0, step.name
        assert step.when.endswith(".") and len(step.when) > 10, step.name


@pytest.mark.parametrize("flow", FLOWS)
def test_every_step_can_be_reached_from_a_root(flow: str) -> None:
    import networkx as nx

    documented = Documented.load(flow)
    graph = documented.graph()
    reachable = set(documented.roots).union(*(nx.descendants(graph, r) for r in documented.roots))
    assert reachable == set(documented.steps)
    assert graph.number_of_edges() == sum(len(step.callees()) for step in documented.steps.values())
    assert graph.nodes[documented.roots[0]]["root"]


def test_sources_are_files_of_the_tagged_driver(cuda: Documented) -> None:
    assert not [s.name for s in cuda.steps.values() if not SOURCE.fullmatch(s.source)]


def test_a_retried_block_operation_ends_by_unpinning_its_chunks(cuda: Documented) -> None:
    for name in ("service_fault_batch_block", "uvm_va_block_cpu_fault"):
        *_, loop, last = cuda.steps[name].calls
        assert isinstance(loop, list) and last == "uvm_va_block_retry_deinit"


def test_pages_are_unmapped_before_they_are_copied_and_mapped_after(cuda: Documented) -> None:
    copy = cuda.steps["uvm_va_block_make_resident_copy"].callees()
    unmap, populate, move = (
        copy.index(name) for name in ("uvm_va_block_unmap_mask", "block_populate_pages", "block_copy_resident_pages")
    )
    assert unmap < populate < move
    finish = cuda.steps["uvm_va_block_service_finish"].callees()
    revoke, mapped = finish.index("block_service_finish_revoke_prot"), finish.index("block_service_finish_map")
    assert finish.index("uvm_va_block_make_resident_finish") < revoke < mapped


def test_eviction_reaches_the_cpu_copy_of_the_victims_pages(cuda: Documented) -> None:
    import networkx as nx

    path = nx.shortest_path(cuda.graph(), "uvm_pmm_gpu_alloc_user", "block_copy_resident_pages")
    assert (
        path.index("evict_root_chunk")
        < path.index("uvm_va_block_evict_chunks")
        < path.index("uvm_va_block_make_resident")
    )


def test_events_and_hardware_are_no_steps(cuda: Documented) -> None:
    assert not {*cuda.events, *cuda.hardware} & cuda.steps.keys()
    assert {"gpu_stall", "kernel", "host_program"} <= set(cuda.hardware)
    assert all(re.fullmatch(r"UvmEventType[A-Z]\w+", event) for event in cuda.events)


def _file(**changes: object) -> dict[str, object]:
    rows = [
        {"name": "top", "source": "a.c @ 1", "line": 1, "calls": ["leaf"], "when": "Always."},
        {"name": "leaf", "source": "a.c @ 1", "line": 9, "calls": [], "when": "Always."},
    ]
    return {"flow": "f", "roots": ["top"], "events": [], "hardware": [], "steps": rows, **changes}


def test_a_step_defined_twice_is_refused() -> None:
    rows = [{"name": "top", "source": "a.c", "line": 1, "calls": [], "when": ""}] * 2
    with pytest.raises(FlowFileError, match="top is defined twice"):
        Documented(_file(steps=rows))


def test_an_undefined_callee_is_refused_with_the_closest_name() -> None:
    rows = [
        {"name": "top", "source": "a.c", "line": 1, "calls": [["service_batch"]], "when": ""},
        {"name": "service_fault_batch", "source": "a.c", "line": 1, "calls": [], "when": ""},
    ]
    with pytest.raises(
        FlowFileError, match=r"service_batch, which is not defined\. Did you mean 'service_fault_batch'"
    ):
        Documented(_file(steps=rows))


def test_an_undefined_root_is_refused() -> None:
    with pytest.raises(FlowFileError, match="root bottom is not defined"):
        Documented(_file(roots=["bottom"]))


def test_an_event_that_is_also_a_step_is_refused() -> None:
    with pytest.raises(FlowFileError, match="both a step and an event: leaf"):
        Documented(_file(events=["leaf"]))
