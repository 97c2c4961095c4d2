"""Pages that both processors fight over: suspicion, throttling, pinning, forgetting."""

from __future__ import annotations

from typing import Any

import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.perf_thrashing import NONE, PIN, THROTTLE, Hint, uvm_perf_thrashing_get_hint
from kit.drivers.uvm.types import ATOMIC_STRONG, CPU, GPU, READ, READ_WRITE_ATOMIC, WRITE, VaRange
from kit.memory.table.pagemask import bit, holds

PAGE = 7


class Fight:
    """One page, written by the CPU and by the GPU in turn."""

    def __init__(self, **module: Any) -> None:
        self.h = Harness(**{"prefetch_enable": False, **module})
        self.r: VaRange = self.h.allocate(512)
        self.page = pages(self.r, [PAGE])
        self.h.touch(self.page)

    @property
    def info(self) -> Any:
        return self.r.blocks[self.r.first // 512].thrashing

    def rounds(self, count: int, access: int = WRITE) -> None:
        for _ in range(count):
            self.h.kernel(self.page, access)
            self.h.touch(self.page)
            self.h.check()

    def until_pinned(self, **limit: int) -> int:
        for count in range(limit.get("limit", 60)):
            if self.info is not None and self.info.pinned:
                return count
            self.rounds(1)
        raise AssertionError("never pinned")

    def hints(self) -> int:
        return self.h.count("uvm_perf_thrashing_get_hint")

    def events(self, name: str) -> int:
        return self.h.count(f"UvmEventType{name}")


@pytest.mark.parametrize("threshold", [1, 2, 3, 5, 7])
def test_detected_after_as_many_close_events_as_the_threshold_says(threshold: int) -> None:
    f = Fight(thrashing_threshold=threshold)
    # The first event only stamps the block, the second creates the page's history and stamps the page.
    moves = 0
    while not f.events("ThrashingDetected"):
        f.h.kernel(f.page) if moves % 2 == 0 else f.h.touch(f.page)
        moves += 1
    assert moves == 2 + threshold
    assert f.info.pages == bit(PAGE)


def test_events_further_apart_than_a_lapse_do_not_count() -> None:
    f = Fight()
    for _ in range(8):
        f.h.kernel(f.page)
        f.h.wait(600.0)
        f.h.touch(f.page)
        f.h.wait(600.0)
    assert f.events("ThrashingDetected") == 0 and f.info.page is None


def test_one_processor_alone_does_not_thrash() -> None:
    h = Harness(roots=1, thrashing_threshold=1)
    one, two = h.allocate(512), h.allocate(512)
    h.touch(pages(one, range(512)))
    h.touch(pages(two, range(512)))
    for _ in range(10):  # evictions do not count as thrashing
        h.kernel(pages(one, [0]))
        h.kernel(pages(two, [0]))
    assert h.gpu.pmm.evictions > 10 and h.count("UvmEventTypeThrashingDetected") == 0


def test_a_users_move_wipes_the_history() -> None:
    f = Fight()
    f.rounds(3)
    assert f.info.pages == bit(PAGE)
    f.h.prefetch(f.r.first, 512, GPU)
    assert not f.info.pages and f.info.page.events[PAGE] == 0


def test_read_duplication_wipes_the_history() -> None:
    f = Fight()
    f.rounds(3)
    f.h.advise("read_mostly", f.r.first, 512)
    f.h.kernel(f.page, READ)
    assert not f.info.pages


def test_throttle_then_pin_in_system_memory_then_forget_after_150_ms() -> None:
    f = Fight()
    f.until_pinned()
    block = f.r.blocks[f.r.first // 512]
    assert f.events("ThrottlingStart") == f.events("ThrottlingEnd") >= 10
    assert f.h.where(f.r)[PAGE] == "C" and holds(block.mapped(GPU), PAGE)
    remote = f.h.spans("UvmEventTypeMapRemote")
    assert [(row["cause"], int(row["pages"])) for row in remote] == [("thrashing", 1)]
    faults = f.events("GpuFault"), f.events("CpuFault")
    f.rounds(20)
    assert (f.events("GpuFault"), f.events("CpuFault")) == faults, "both reach it where it is pinned"
    pinned_at = remote[0]["start"]
    f.h.wait(pinned_at + 149_000 - f.h.engine.now)
    f.h.settle()
    assert f.info.pinned == bit(PAGE)
    f.h.wait(2_000)
    f.h.settle()
    f.h.check()
    assert not f.info.pinned and not f.info.pages and f.info.page.events[PAGE] == 0
    assert not holds(block.mapped(GPU), PAGE) and holds(block.mapped(CPU), PAGE)
    f.h.kernel(f.page)
    assert f.h.where(f.r)[PAGE] == "G", "back to migrating"


@pytest.mark.parametrize(("pin", "after"), [(0, True), (2, False), (2000, True)])
def test_how_long_a_pin_lasts(pin: int, after: bool) -> None:
    f = Fight(thrashing_pin=pin)
    f.until_pinned()
    f.h.wait(500_000)
    f.h.settle()
    assert bool(f.info.pinned) == after


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_throttles_before_a_pin(limit: int) -> None:
    f = Fight(thrashing_pin_threshold=limit)
    f.until_pinned()
    assert limit <= f.events("ThrottlingStart") <= limit + 2


def test_a_throttled_gpu_fault_stays_unserved_and_comes_back() -> None:
    f = Fight()
    throttled = 0
    while not throttled:
        start, before = f.h.engine.now, f.events("GpuFault")
        f.h.kernel(f.page)
        throttled = sum(row["actor"] == "gpu" for row in f.h.spans("UvmEventTypeThrottlingStart"))
        services = [s for s in f.h.spans("uvm_parent_gpu_service_replayable_faults") if s["start"] > start]
        f.h.touch(f.page)
    assert services[-1]["end"] - start > 300
    assert f.events("GpuFault") - before > 5  # batch after batch, each with a replay, until the period is over
    assert len(services) > 1, "a service call ends after five batches with throttled faults"


def test_other_pages_of_the_batch_are_served_meanwhile() -> None:
    f = Fight()
    f.rounds(4)
    f.h.kernel(pages(f.r, [PAGE, 300, 301]), lanes=3)
    done = {int(c[1]): s["start"] for c, s in zip(f.h.copies(), f.h.spans("UvmEventTypeMigration"), strict=True)}
    last = max(s["start"] for s in f.h.spans("UvmEventTypeMigration") if int(s["va"]) // 4096 == f.page[0])
    assert 300 not in done or done[300] < last
    assert f.h.where(f.r)[300] == "G"


@pytest.mark.parametrize(("asked", "hints"), [([511], 0), ([511, 301], 1), ([301], 1)])
def test_a_fault_that_is_spurious_asks_for_no_hint(asked: list[int], hints: int) -> None:
    f = Fight()
    while f.info is None or f.info.page is None:
        f.rounds(1)
    f.h.wait(1000)
    f.h.kernel(pages(f.r, [PAGE, 300, 511]))
    before = f.hints()
    f.h.faults(pages(f.r, asked))
    assert f.hints() - before == hints
    f.h.check()


def test_thrashing_pages_are_not_prefetched() -> None:
    f = Fight(prefetch_enable=True)
    f.rounds(3)
    thrashing = f.info.pages
    assert holds(thrashing, PAGE)
    copies = len(f.h.copies(f.r.first))
    f.h.touch(pages(f.r, range(512)))
    f.h.kernel(pages(f.r, [100]))
    new = [c for c in f.h.copies(f.r.first)[copies:] if c[3] == "prefetch" and c[0] == "HtoD"]
    assert new and not [c for c in new if c[1] <= PAGE < c[1] + c[2]]


def test_atomics_on_a_pinned_page_are_throttled_by_revocations() -> None:
    f = Fight()
    f.until_pinned()
    block = f.r.blocks[f.r.first // 512]
    for _ in range(6):
        f.h.kernel(f.page, ATOMIC_STRONG)
        assert holds(block.pte[GPU][READ_WRITE_ATOMIC], PAGE)
        f.h.touch(f.page)
        f.h.check()
    assert f.info.page.revocations[PAGE] and f.h.where(f.r)[PAGE] == "C"


def hint(f: Fight, when: float, requester: int) -> Hint:
    """Ask at time `when`, under no lock: nothing else runs."""
    f.h.cpu.now = when
    return uvm_perf_thrashing_get_hint(f.r.blocks[f.r.first // 512], f.h.cpu, PAGE, requester)


def thrashing(**module: Any) -> tuple[Fight, float]:
    f = Fight(**module)
    f.rounds(2)
    f.h.kernel(f.page)
    assert f.info.page.events[PAGE] == 3 and not f.events("ThrottlingStart")
    return f, float(f.info.page.last_time[PAGE])


def test_hints_within_and_after_the_lapse() -> None:
    f, last = thrashing()
    assert hint(f, last + 501, CPU).type == NONE
    first = hint(f, last + 100, CPU)
    assert first.type == NONE, "who opens the period is privileged"
    second = hint(f, last + 150, GPU)
    assert (second.type, second.end) == (THROTTLE, last + 100 + 500)
    assert hint(f, last + 160, GPU).type == THROTTLE
    assert hint(f, last + 300, CPU).type == NONE


def test_nobody_is_privileged_twice_in_a_row() -> None:
    f, last = thrashing()
    assert hint(f, last + 10, CPU).type == NONE
    f.info.page.last_time[PAGE] = last + 600
    assert hint(f, last + 600, CPU).type == THROTTLE, "held it last time: nobody is privileged now"
    assert hint(f, last + 610, GPU).type == NONE, "until the next requester takes it"


def test_the_nap_is_counted_in_lapses() -> None:
    for nap in (1, 4):
        f, last = thrashing(thrashing_nap=nap)
        hint(f, last + 10, CPU)
        assert hint(f, last + 20, GPU).end == last + 10 + 500 * nap


def test_pin_goes_to_the_location_that_all_can_reach() -> None:
    f, last = thrashing(thrashing_pin_threshold=1)
    hint(f, last + 10, CPU)
    assert hint(f, last + 20, GPU).type == THROTTLE
    assert hint(f, last + 30, CPU) == Hint(PIN, CPU)
    f.info.page.do_not_throttle[PAGE] = GPU
    assert hint(f, last + 40, GPU) == Hint(PIN, CPU), "the CPU cannot reach GPU memory"


def test_only_the_cpu_in_the_fight_leaves_it_where_it_is() -> None:
    f, _ = thrashing()
    f.h.touch(f.page)
    f.info.page.processors[PAGE] = 1 << CPU
    assert hint(f, float(f.info.page.last_time[PAGE]) + 10, CPU).type == NONE
    assert not f.info.pinned


def test_the_preferred_location_is_pinned_when_all_reach_it() -> None:
    f, last = thrashing()
    f.r.policy.preferred_location = CPU
    assert hint(f, last + 10, GPU) == Hint(PIN, CPU)


@pytest.mark.parametrize("resets", [0, 1, 4])
def test_an_epoch_without_thrashing_resets_the_block_so_many_times(resets: int) -> None:
    f = Fight(thrashing_max_resets=resets)
    happened = 0
    for other in range(200, 202 + resets):
        f.rounds(3)
        assert f.info.last_thrashing_time
        f.h.wait(1_100_000)
        f.h.kernel(pages(f.r, [other]))  # the hint about any page tests the epoch
        if f.info.page is None:
            happened += 1
        f.h.touch(f.page)
    assert happened == resets
    f.h.check()


def test_a_block_that_was_ever_pinned_is_not_reset() -> None:
    f = Fight(thrashing_pin=2)
    f.until_pinned()
    f.h.wait(1_100_000)
    f.h.settle()
    f.h.kernel(pages(f.r, [200]))
    assert f.info.page is not None


def test_switched_off_nothing_is_detected() -> None:
    f = Fight(thrashing_enable=False)
    f.rounds(30)
    assert f.info is None and f.events("ThrashingDetected") == 0


def test_a_stream_and_the_cpu_on_the_same_pages_end_up_sharing_them_remotely() -> None:
    h = Harness(costs={"cpu_touch_page": 20.0})
    r = h.allocate(2)
    h.touch(pages(r, range(2)))
    kernel = h.stream(pages(r, [0, 1] * 60_000), WRITE, lanes=1)
    assert h.beside(kernel, *[h.touching(pages(r, range(2)), True) for _ in range(300)]) is None
    assert h.count("UvmEventTypeThrashingDetected") > 0
    assert any(row["cause"] == "thrashing" for row in h.spans("UvmEventTypeMapRemote"))
    h.check()
