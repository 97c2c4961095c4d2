"""Faults that cannot be served: which die, which live, and what is left afterwards."""

from __future__ import annotations

import random

import numpy as np
import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.types import PREFETCH, READ, WRITE, VaRange
from kit.memory.types import VM_WRITE

FAMILIES = pytest.mark.parametrize("architecture", ["pascal", "volta"])


def ready(architecture: str, count: int = 512, **module: object) -> tuple[Harness, VaRange]:
    h = Harness(architecture=architecture, **module)
    r = h.allocate(count)
    h.touch(pages(r, range(count)))
    return h, r


def fatal(h: Harness) -> list[tuple[int, str]]:
    return [(int(s["va"]) // 4096, s["cause"]) for s in h.spans("UvmEventTypeFatalFault")]


@FAMILIES
@pytest.mark.parametrize("stray", [1, 600, 1 << 20])
def test_an_address_in_no_range_kills_the_kernel_and_nothing_else(architecture: str, stray: int) -> None:
    h, r = ready(architecture)
    end = r.first + 512
    assert h.kernel([*pages(r, range(64)), end + stray], lanes=16) == "InvalidAddress"
    assert fatal(h) == [(end + stray, "InvalidAddress")]
    assert h.where(r)[:64] == "G" * 64
    h.check()
    assert h.kernel(pages(r, range(512))) is None, "the next kernel runs"
    h.touch(pages(r, range(512)), False)
    h.check()


@FAMILIES
def test_good_faults_of_the_batch_are_served(architecture: str) -> None:
    h, r = ready(architecture, 1536)
    assert h.kernel([*pages(r, [0, 700, 1400]), r.first + 5000], lanes=4) == "InvalidAddress"
    assert [h.where(r)[page] for page in (0, 700, 1400)] == ["G", "G", "G"]
    h.check()


@FAMILIES
def test_each_fatal_page_is_reported_once_and_on_pascal_each_utlb(architecture: str) -> None:
    h, r = ready(architecture)
    bad = [r.first + 1000, r.first + 1001, r.first + 3000]
    assert h.kernel(bad * 3, lanes=9) == "InvalidAddress"
    assert {page for page, _ in fatal(h)} == set(bad)
    assert len(fatal(h)) == (3 if architecture == "volta" else 9)
    h.check()


@FAMILIES
def test_a_stray_access_past_tables_that_are_exactly_full(architecture: str) -> None:
    """Leaf tables come in pools: the slot of an address without a table must never look mapped."""
    h = Harness(architecture=architecture, roots=64)
    r = h.allocate(16 * 512)
    h.prefetch(r.first, 16 * 512, 1)
    assert h.kernel([r.first + 16 * 512 + (1 << 18)], READ) == "InvalidAddress"
    h.check()


@FAMILIES
@pytest.mark.parametrize("policy", [0, 1, 2, 3])
def test_under_every_replay_policy(architecture: str, policy: int) -> None:
    h, r = ready(architecture, fault_replay_policy=policy)
    assert h.kernel([*pages(r, range(0, 512, 7)), r.first + 4096], lanes=128) == "InvalidAddress"
    h.check()
    assert h.kernel(pages(r, range(512)), lanes=128) is None


@FAMILIES
def test_a_write_to_read_only_memory_is_a_permission_fault(architecture: str) -> None:
    h, r = ready(architecture)
    r.vma.flags &= ~VM_WRITE
    assert h.kernel(pages(r, [3]), READ) is None
    assert h.kernel(pages(r, [40]), WRITE) == "InvalidPermissions"
    assert fatal(h) == [(r.first + 40, "InvalidPermissions")]
    r.vma.flags |= VM_WRITE
    h.check()


@FAMILIES
def test_entries_of_a_fatal_type_die_at_once(architecture: str) -> None:
    h, r = ready(architecture)
    kernel = h.stream(pages(r, [5]), WRITE)
    buffer = h.gpu.fault_buffer
    now = np.full(1, h.engine.now)
    buffer.write(now, np.array(pages(r, [5])), np.full(1, WRITE), np.zeros(1, dtype=int), np.full(1, 7))
    h.run(h.launching(kernel))
    assert {cause for _, cause in fatal(h)} <= {"InvalidFaultType"}
    h.check()


def test_volta_cancels_by_address_and_pascal_by_utlb() -> None:
    for architecture, step in (("volta", "cancel_fault_precise_va"), ("pascal", "push_cancel_on_gpu_targeted")):
        h, r = ready(architecture)
        h.kernel([*pages(r, [0]), r.first + 700], lanes=2)
        other = {"cancel_fault_precise_va", "push_cancel_on_gpu_targeted"} - {step}
        assert h.count(step) == 1 and not any(h.count(name) for name in other)


def test_pascal_cancels_a_utlb_when_its_fatal_fault_has_shown_up_again() -> None:
    h, r = ready("pascal")
    h.kernel([r.first + 700, r.first], lanes=2)
    cancels, fetches = (h.spans(name) for name in ("push_cancel_on_gpu_targeted", "fetch_fault_buffer_entries"))
    seen = [s for s in fetches if s["value"] and s["start"] < cancels[0]["start"]]
    assert len(seen) == 3, "the batch, the first round that only looks, the round that cancels"


def test_a_utlb_with_a_good_fault_is_not_cancelled_before_that_is_served() -> None:
    h, r = ready("pascal")
    tpcs = int(h.machine["tpcs"])
    lanes = tpcs + 1  # lane 0 and lane `tpcs` share a uTLB
    order = pages(r, range(0, 512, 16))[: tpcs - 1]
    assert h.kernel([r.first + 700, *order, r.first + 500], lanes=lanes) == "InvalidAddress"
    assert h.where(r)[500] == "G"
    assert fatal(h) == [(r.first + 700, "InvalidAddress")]


def test_pascals_cancel_does_not_coalesce() -> None:
    h, r = ready("pascal")
    h.kernel([r.first + 700] * 6, lanes=6)
    refetched = [s for s in h.spans("fetch_fault_buffer_entries") if s["value"]][1]
    assert refetched["pages"] == refetched["value"]


@FAMILIES
def test_out_of_memory_takes_the_batch(architecture: str) -> None:
    h = Harness(architecture=architecture, roots=1)
    r, other = h.allocate(512), h.allocate(512)
    h.kernel(pages(r, [0]))
    (root,) = h.gpu.pmm.used
    h.gpu.pmm.used.clear()
    root.pins += 1
    groups = h.count("UvmEventTypeGpuFault")
    assert h.kernel(pages(other, [0, 100, 200]), lanes=3) == "OutOfMemory"
    assert sorted(fatal(h)) == [(other.first + page, "OutOfMemory") for page in (0, 100, 200)]
    assert h.count("UvmEventTypeGpuFault") == groups + 1, "the faults happened and are reported"
    name = "cancel_faults_all" if architecture == "volta" else "cancel_fault_batch_tlb"
    assert h.count(name) == 1
    root.pins -= 1
    h.gpu.pmm.mark_used(root)
    assert h.kernel(pages(other, [0, 100, 200]), lanes=3) is None
    h.check()


# Prefetch instructions: never fatal.


def test_prefetch_faults_do_not_stall_and_bring_pages() -> None:
    h, r = ready("volta")
    kernel = h.stream(pages(r, [0, 100]), PREFETCH)
    h.run(h.launching(kernel))
    assert h.where(r)[0] == h.where(r)[100] == "G"
    assert not h.spans("gpu_stall")
    assert h.spans("UvmEventTypeGpuFault")[0]["cause"] == "prefetch"


def test_pascal_does_not_fault_on_prefetch_instructions_unless_forced() -> None:
    h, r = ready("pascal")
    assert h.kernel(pages(r, [0, 100]), PREFETCH) is None
    assert set(h.where(r)) == {"C"}
    h, r = ready("pascal", force_prefetch_fault_support=True)
    h.kernel(pages(r, [0, 100]), PREFETCH)
    assert h.where(r)[100] == "G"


def invalid(h: Harness, count: int, salt: int = 0) -> None:
    far = 1 << 30
    h.faults([far + 1000 * salt + page for page in range(count)], PREFETCH)


@pytest.mark.parametrize(("count", "enabled"), [(170, True), (171, False)])
def test_too_many_invalid_prefetches_switch_prefetch_faults_off(count: int, enabled: bool) -> None:
    h, _ = ready("volta")
    invalid(h, count)
    assert h.gpu.prefetch_faults_enabled == enabled
    assert fatal(h) == []


@pytest.mark.parametrize("lapse", [1, 1000])
def test_they_come_back_after_the_lapse(lapse: int) -> None:
    h, r = ready("volta", reenable_prefetch_faults_lapse_msec=lapse)
    invalid(h, 256)
    assert h.kernel(pages(r, [0]), PREFETCH) is None and h.where(r)[0] == "C"
    h.wait(lapse * 1000 - 800)
    h.kernel(pages(r, [200]))  # a batch before the lapse is over
    assert not h.gpu.prefetch_faults_enabled
    h.wait(1500)
    h.kernel(pages(r, [400]))
    assert h.gpu.prefetch_faults_enabled
    h.kernel(pages(r, [0]), PREFETCH)
    assert h.where(r)[0] == "G"


def test_a_lapse_of_zero_never_switches_them_off() -> None:
    h, _ = ready("volta", reenable_prefetch_faults_lapse_msec=0)
    invalid(h, 256)
    assert h.gpu.prefetch_faults_enabled


@pytest.mark.parametrize("seed", range(12))
def test_random_kernels_with_stray_accesses_keep_everything_intact(seed: int) -> None:
    rng = random.Random(seed)
    h = Harness(architecture=rng.choice(["pascal", "volta"]), roots=2, fault_replay_policy=rng.randrange(4))
    ranges = [h.allocate(rng.choice([100, 512, 700])) for _ in range(3)]
    for _ in range(4):
        r = rng.choice(ranges)
        h.touch(pages(r, range(0, r.pages, 3)))
        touched = [rng.choice(ranges).first + rng.randrange(100) for _ in range(60)]
        stray = rng.random() < 0.6
        if stray:
            touched.insert(rng.randrange(60), ranges[-1].end + rng.choice([0, 1, 1000, 100_000]))
        reason = h.kernel(touched, rng.choice([READ, WRITE]), lanes=rng.choice([1, 8, 64]))
        assert (reason == "InvalidAddress") == stray or reason == "OutOfMemory"
        h.check()
