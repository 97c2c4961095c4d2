"""What the list of HMM's documented steps must say: the order of the phases, and where they come from."""

from __future__ import annotations

import re

import networkx as nx
import pytest

from kit.flows.documented import Documented
from kit.report.flow_report import report_for

SOURCE = re.compile(r"(?:mm|lib|kernel|include/linux|arch/x86/mm)/[\w./-]+\.[ch] @ 7\.0-rc6")


@pytest.fixture(scope="module")
def hmm() -> Documented:
    return Documented.load("hmm_mirror")


def places(hmm: Documented, caller: str, *callees: str) -> list[int]:
    order = hmm.steps[caller].callees()
    return [order.index(callee) for callee in callees]


def test_sources_are_files_of_the_kernel(hmm: Documented) -> None:
    assert not [s.name for s in hmm.steps.values() if not SOURCE.fullmatch(s.source)]


@pytest.mark.parametrize(
    ("caller", "callees"),
    [
        (
            "dmirror_migrate_to_device",
            ["migrate_vma_setup", "dmirror_migrate_alloc_and_copy", "migrate_vma_pages",
             "dmirror_migrate_finalize_and_map", "migrate_vma_finalize", "dmirror_do_read"],
        ),
        (
            "dmirror_devmem_fault",
            ["migrate_vma_setup", "dmirror_devmem_fault_alloc_and_copy", "migrate_vma_pages", "migrate_vma_finalize"],
        ),
        ("dmirror_range_fault", ["mmu_interval_read_begin", "hmm_range_fault", "dmirror_do_fault"]),
        (
            "migrate_vma_collect",
            ["mmu_notifier_invalidate_range_start", "migrate_vma_collect_pmd", "mmu_notifier_invalidate_range_end"],
        ),
        ("migrate_vma_setup", ["migrate_vma_collect", "migrate_vma_unmap"]),
        ("exit_mmap", ["mmu_notifier_release", "unmap_vmas", "free_pgtables"]),
        ("do_wp_page", ["wp_page_reuse", "wp_page_copy"]),
    ],
)  # fmt: skip
def test_phases_come_in_the_order_of_the_source(hmm: Documented, caller: str, callees: list[str]) -> None:
    found = places(hmm, caller, *callees)
    assert found == sorted(found)


def test_a_cpu_fault_leads_to_the_driver_and_a_change_of_rights_to_the_mirror(hmm: Documented) -> None:
    graph = hmm.graph()
    assert nx.has_path(graph, "do_user_addr_fault", "dmirror_devmem_fault")
    for call in ("mprotect", "munmap", "fork", "madvise", "mremap"):
        assert nx.has_path(graph, call, "dmirror_interval_invalidate"), call


def test_the_report_and_the_list_agree_on_what_is_hardware(hmm: Documented) -> None:
    report = report_for("hmm_mirror")
    assert set(report.hardware) == set(hmm.hardware)
    assert all(report.is_step(name) for name in hmm.steps)
