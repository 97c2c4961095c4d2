"""The kernel's own tests: every case of tools/testing/selftests/mm/hmm-tests.c @ 7.0, in both variants."""

from __future__ import annotations

import pytest
from hmm import selftest_huge, selftest_memory, selftest_migrate
from hmm.harness import CASES

# TEST_F and TEST_F_TIMEOUT of hmm-tests.c @ 7.0, in the order of the file.
DOCUMENTED = [
    "hmm.open_close", "hmm.anon_read", "hmm.anon_read_prot", "hmm.anon_write", "hmm.anon_write_prot",
    "hmm.anon_write_child", "hmm.anon_write_child_shared", "hmm.anon_write_huge", "hmm.anon_write_hugetlbfs",
    "hmm.file_read", "hmm.file_write", "hmm.migrate", "hmm.migrate_fault", "hmm.migrate_release",
    "hmm.migrate_shared", "hmm2.migrate_mixed", "hmm.migrate_multiple", "hmm.anon_read_multiple", "hmm.anon_teardown",
    "hmm.mixedmap", "hmm2.snapshot", "hmm.compound", "hmm2.double_map", "hmm.exclusive", "hmm.exclusive_mprotect",
    "hmm.exclusive_cow", "hmm.hmm_gup_test", "hmm.hmm_cow_in_device", "hmm.migrate_anon_huge_empty",
    "hmm.migrate_anon_huge_zero", "hmm.migrate_anon_huge_free", "hmm.migrate_anon_huge_fault",
    "hmm.migrate_partial_unmap_fault", "hmm.migrate_remap_fault", "hmm.migrate_anon_huge_err",
    "hmm.migrate_anon_huge_zero_err", "hmm.benchmark_thp_migration",
]  # fmt: skip
LATER = ["hmm.migrate_file_private"]  # added after 7.0
INSTANCES = [
    (name.partition(".")[2], memory, f"{name.partition('.')[0]}_device_{memory}.{name.partition('.')[2]}")
    for name in DOCUMENTED + LATER
    for memory in ("private", "coherent")
]


def test_every_documented_case_is_here() -> None:
    rooms = (selftest_memory, selftest_migrate, selftest_huge)
    assert all(case.program.__module__ in {room.__name__ for room in rooms} for case in CASES.values())
    assert {f"{case.fixture}.{name}" for name, case in CASES.items()} == {*DOCUMENTED, *LATER}
    assert len(DOCUMENTED) == 37
    assert len(INSTANCES) - 2 * len(LATER) == 74


@pytest.mark.parametrize(("name", "memory"), [each[:2] for each in INSTANCES], ids=[each[2] for each in INSTANCES])
def test_selftest(name: str, memory: str) -> None:
    CASES[name].run(coherent=memory == "coherent")
