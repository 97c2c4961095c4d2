"""uvm_perf_thrashing.c: pages that processors fight over are throttled, then pinned."""

from __future__ import annotations

from typing import Final, NamedTuple

from kit.drivers.uvm.perf_thrashing_state import (
    NOBODY,
    BlockThrashing,
    PageThrashing,
    thrashing_reset_page,
    thrashing_throttle_end_processor,
    thrashing_throttling_reset_page,
    tools_event,
)
from kit.drivers.uvm.types import CPU, GPU, VaBlock
from kit.memory.table.pagemask import EMPTY, bit, holds, pages_of
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step

__all__ = ["NONE", "PIN", "THROTTLE", "Hint", "uvm_perf_thrashing_get_hint"]

NONE: Final = "none"
THROTTLE: Final = "throttle"
PIN: Final = "pin"
TIMER_GRANULARITY: Final = 20.0  # microseconds by which a pin may end early


class Hint(NamedTuple):
    """What to do with a fault on a thrashing page (uvm_perf_thrashing_hint_t)."""

    type: str = NONE
    residency: int = NOBODY
    end: float = 0.0


@step
def uvm_perf_thrashing_get_hint(block: VaBlock, thread: Thread, index: int, requester: int) -> Hint:
    """Return what to do with a fault of `requester` on page `index` (uvm_perf_thrashing.c)."""
    module, info = block.range.va_space.module, block.thrashing
    if not module.thrashing_enable or info is None or info.page is None:
        return Hint()
    now, page = thread.now, info.page
    lapse = module.thrashing_lapse_usec
    expired = info.last_thrashing_time and now - info.last_thrashing_time > module.thrashing_epoch * lapse
    if expired and not info.ever_pinned and info.reset_count < module.thrashing_max_resets:
        _epoch_reset(block, thread, info)
        return Hint()
    if page.events[index] < module.thrashing_threshold:
        return Hint()
    bit = 1 << requester
    if page.throttled[index] & bit:
        if now < page.throttle_end[index] and page.do_not_throttle[index] != requester:
            return Hint(THROTTLE, end=float(page.throttle_end[index]))
        thrashing_throttle_end_processor(block, thread, page, index, requester)
    pinned = holds(info.pinned, index)
    if now - page.last_time[index] > lapse and not pinned:
        return Hint()
    page.processors[index] |= bit
    _throttle_update(page, index, requester, now, module.thrashing_nap * lapse)
    if pinned and page.revocations[index] and page.do_not_throttle[index] != requester:
        hint = Hint(THROTTLE)
    else:
        hint = get_hint_for_migration_thrashing(block, thread, index, requester)
    if hint.type == PIN:
        thrashing_pin_page(block, thread, index, hint.residency)
    elif hint.type == THROTTLE:
        thrashing_throttle_processor(block, thread, index, requester)
        hint = Hint(THROTTLE, end=float(page.throttle_end[index]))
    return hint


@step
def get_hint_for_migration_thrashing(block: VaBlock, thread: Thread, index: int, requester: int) -> Hint:
    """The decision between none, throttle and pin (uvm_perf_thrashing.c)."""
    va_space, info = block.range.va_space, block.thrashing
    assert info is not None and info.page is not None
    page, preferred = info.page, block.range.policy.preferred_location
    involved = [p for p in (CPU, GPU) if page.processors[index] >> p & 1]
    privileged = int(page.do_not_throttle[index])
    current = CPU if holds(block.resident[CPU], index) else GPU
    pinned, pin = holds(info.pinned, index), int(page.pin_residency[index])
    count, limit = int(page.throttle_count[index]), va_space.module.thrashing_pin_threshold

    def all_reach(location: int) -> bool:
        return all(va_space.accessible(p, location) for p in involved)

    if preferred is not None and all_reach(preferred):
        return Hint(PIN, preferred)
    if (preferred is None or preferred not in involved) and all(va_space.native_atomics(p, current) for p in involved):
        if current == CPU and all_reach(requester):
            return Hint(PIN, requester) if requester == GPU else Hint()
        return Hint(PIN, current)
    if requester == preferred:
        if pinned:
            return Hint(PIN, preferred) if preferred in (pin, privileged) else Hint(THROTTLE)
        if preferred != privileged:
            return Hint(THROTTLE)
        return Hint(PIN, preferred) if count >= limit else Hint()
    if pinned:
        if requester == privileged:
            common = [location for location in (requester, CPU, GPU) if all_reach(location)]
            return Hint(PIN, common[0] if common else requester)
        return Hint(PIN, pin) if va_space.accessible(requester, pin) else Hint(THROTTLE)
    if requester != privileged:
        return Hint(THROTTLE)
    return Hint(PIN, requester) if count >= limit else Hint()


def _throttle_update(page: PageThrashing, index: int, requester: int, now: float, nap: float) -> None:
    """Open a period when the old one is over; nobody is privileged twice in a row."""
    if now > page.throttle_end[index]:
        page.throttle_end[index] = now + nap
        page.do_not_throttle[index] = NOBODY if page.do_not_throttle[index] == requester else requester
    elif page.do_not_throttle[index] == NOBODY:
        page.do_not_throttle[index] = requester


@step
def thrashing_throttle_processor(block: VaBlock, thread: Thread, index: int, processor: int) -> None:
    """Throttle a processor; counted once per stay in the throttled set (uvm_perf_thrashing.c)."""
    info = block.thrashing
    assert info is not None and info.page is not None
    page = info.page
    if not page.throttled[index] >> processor & 1:
        page.throttled[index] |= 1 << processor
        if processor == GPU:
            tools_event(block, thread, "UvmEventTypeThrottlingStart", index)
        if not holds(info.pinned, index):
            page.throttle_count[index] = min(page.throttle_count[index] + 1, 255)


@step
def thrashing_pin_page(block: VaBlock, thread: Thread, index: int, residency: int) -> None:
    """Pin a page at `residency`; the first pin starts the clock of the unpin worker (uvm_perf_thrashing.c)."""
    info, module = block.thrashing, block.range.va_space.module
    assert info is not None and info.page is not None
    page, pinned = info.page, holds(info.pinned, index)
    if not pinned or not holds(block.resident[residency], index):
        thrashing_throttling_reset_page(block, thread, page, index)
    if not pinned:
        page.throttle_count[index] = 0
        info.pinned |= bit(index)
        info.ever_pinned = True
        if module.thrashing_pin:
            duration = module.thrashing_pin * module.thrashing_lapse_usec
            page.pin_deadline[index] = thread.now + duration
            thread.engine.start(_thrashing_unpin_pages(block, index, thread.now + duration))
    page.pin_residency[index] = residency


def _thrashing_unpin_pages(block: VaBlock, index: int, deadline: float) -> Wait:
    """Delayed work: unmap everybody who has no copy and forget the page."""
    engine = block.range.va_space.engine
    yield engine.env.timeout(max(0.0, deadline - engine.now))
    worker = engine.thread("uvm worker")
    yield from block.lock.acquire(worker)
    info, soon = block.thrashing, worker.now + TIMER_GRANULARITY
    if (
        info is not None
        and info.page is not None
        and holds(info.pinned, index)
        and info.page.pin_deadline.item(index) <= soon
    ):
        thrashing_unpin_pages(block, worker, index)
    yield from block.lock.release(worker)


@step
def thrashing_unpin_pages(block: VaBlock, thread: Thread, index: int) -> None:
    """Remove remote mappings of a pinned page, except accessed-by, and its history (uvm_perf_thrashing.c)."""
    uvm_perf_thrashing_unmap_remote_pinned_pages_all(block, thread, index)
    thrashing_reset_page(block, thread, index)


@step
def uvm_perf_thrashing_unmap_remote_pinned_pages_all(block: VaBlock, thread: Thread, index: int) -> None:
    """Every processor without a copy, except accessed-by ones (uvm_perf_thrashing.c)."""
    unmap_remote_pinned_pages(block, thread, index)


@step
def unmap_remote_pinned_pages(block: VaBlock, thread: Thread, index: int) -> None:
    """Remove the remote mappings of one page (uvm_perf_thrashing.c)."""
    from kit.drivers.uvm.va_block_map import uvm_va_block_unmap

    for processor in (CPU, GPU):
        kept = processor in block.range.policy.accessed_by
        if not kept and not holds(block.resident[processor], index):
            uvm_va_block_unmap(block, thread, processor, bit(index))


def _epoch_reset(block: VaBlock, thread: Thread, info: BlockThrashing) -> None:
    assert info.page is not None
    for index in pages_of(info.pages):
        thrashing_throttling_reset_page(block, thread, info.page, int(index))
    info.reset_count += 1
    info.page = None
    info.pages = EMPTY
    info.last_time = info.last_thrashing_time = 0.0
    info.last_processor = NOBODY
