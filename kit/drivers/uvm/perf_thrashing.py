"""uvm_perf_thrashing.c: pages that processors fight over are throttled, then pinned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kit.drivers.uvm.types import CPU, GPU, PAGE, VaBlock
from kit.memory.pagemask import bools, from_pages, pages_of
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step

__all__ = [
    "NONE", "PIN", "THROTTLE", "BlockThrashing", "Hint", "thrashing_notify_migration", "thrashing_notify_revocation",
    "thrashing_reset_pages_in_region", "uvm_perf_thrashing_get_hint",
]  # fmt: skip

NONE, THROTTLE, PIN = "none", "throttle", "pin"
NOBODY = -1
TIMER_GRANULARITY = 20.0  # microseconds by which a pin may end early


class Hint(NamedTuple):
    """What to do with a fault on a thrashing page (uvm_perf_thrashing_hint_t)."""

    type: str = NONE
    residency: int = NOBODY
    end: float = 0.0


class BlockThrashing:
    """block_thrashing_info_t: one block's history, per page from the moment it looks suspicious."""

    def __init__(self) -> None:
        self.last_time = 0.0
        self.last_processor = NOBODY
        self.last_thrashing_time = 0.0
        self.reset_count = 0
        self.pages = 0  # mask of thrashing pages
        self.pinned = 0  # mask of pinned pages
        self.ever_pinned = False
        self.page: PageThrashing | None = None


class PageThrashing:
    """page_thrashing_info_t of every page of a block, as columns; processor masks have bit CPU and bit GPU."""

    def __init__(self, pages: int) -> None:
        self.last_time = np.zeros(pages)
        self.events = np.zeros(pages, dtype=np.int8)
        self.processors = np.zeros(pages, dtype=np.int8)
        self.migrations = np.zeros(pages, dtype=bool)
        self.revocations = np.zeros(pages, dtype=bool)
        self.throttled = np.zeros(pages, dtype=np.int8)
        self.throttle_end = np.zeros(pages)
        self.throttle_count = np.zeros(pages, dtype=np.int16)
        self.do_not_throttle = np.full(pages, NOBODY, dtype=np.int8)
        self.pin_residency = np.full(pages, NOBODY, dtype=np.int8)
        self.pin_deadline = np.zeros(pages)


def thrashing_notify_migration(block: VaBlock, thread: Thread, mask: int, dest: int, cause: str) -> None:
    """Pages went to `dest`. Blocks without per-page history only take a stamp, which is not worth spans."""
    module, info = block.range.va_space.module, block.thrashing
    if cause == "eviction" or not module.thrashing_enable:
        return
    if info is not None and info.page is not None:
        uvm_perf_event_notify_migration(block, thread, mask, dest, cause)
    elif cause == "fault" and not block.range.policy.read_duplication:
        info = _block_event(block, thread, dest)
        if info.page is not None:  # which it has from this event on
            _count_events(block, thread, info, info.page, mask, dest, True)


def thrashing_notify_revocation(block: VaBlock, thread: Thread, mask: int, loser: int) -> None:
    """A processor lost rights without a move."""
    if block.range.va_space.module.thrashing_enable:
        uvm_perf_event_notify_revocation(block, thread, mask, loser)


@step
def uvm_perf_event_notify_migration(block: VaBlock, thread: Thread, mask: int, dest: int, cause: str) -> None:
    """Tell listeners about a migration (uvm_perf_events.c)."""
    uvm_perf_event_notify(block, thread, mask, dest, cause)


@step
def uvm_perf_event_notify_revocation(block: VaBlock, thread: Thread, mask: int, loser: int) -> None:
    """Tell listeners about a revocation (uvm_perf_events.c)."""
    uvm_perf_event_notify(block, thread, mask, loser, "revocation")


@step
def uvm_perf_event_notify(block: VaBlock, thread: Thread, mask: int, processor: int, cause: str) -> None:
    """Call the modules that listen (uvm_perf_events.c)."""
    thrashing_event_cb(block, thread, mask, processor, cause)


@step
def thrashing_event_cb(block: VaBlock, thread: Thread, mask: int, processor: int, cause: str) -> None:
    """Stamp and count an event on every page of `mask`; a user's move wipes their history (uvm_perf_thrashing.c)."""
    if cause != "revocation":
        if cause != "fault" or block.range.policy.read_duplication:
            thrashing_reset_pages_in_region(block, thread, mask)
            return
        mask &= ~_moving_to_pin(block, mask, processor)
    info = _block_event(block, thread, processor) if mask else None
    if info is not None and info.page is not None:
        _count_events(block, thread, info, info.page, mask, processor, cause != "revocation")


def _block_event(block: VaBlock, thread: Thread, processor: int) -> BlockThrashing:
    """Stamp the block; two events of different processors within a lapse start its per-page history."""
    info = block.thrashing = block.thrashing or BlockThrashing()
    lapse = block.range.va_space.module.thrashing_lapse_usec
    suspicious = info.last_time and info.last_processor != processor and thread.now - info.last_time <= lapse
    if info.page is None and suspicious:
        info.page = PageThrashing(block.pages)
    info.last_time, info.last_processor = thread.now, processor
    return info


def _moving_to_pin(block: VaBlock, mask: int, dest: int) -> int:
    """Return the pages of `mask` that only go where they are pinned."""
    info = block.thrashing
    if info is None or info.page is None or not mask & info.pinned:
        return 0
    pinned = pages_of(mask & info.pinned)
    return from_pages(pinned[info.page.pin_residency[pinned] == dest])


def _count_events(
    block: VaBlock,
    thread: Thread,
    info: BlockThrashing,
    page: PageThrashing,
    mask: int,
    processor: int,
    migration: bool,
) -> None:
    module, now = block.range.va_space.module, thread.now
    threshold = module.thrashing_threshold
    pages = pages_of(mask)
    last = page.last_time[pages]
    page.processors[pages] |= 1 << processor
    page.last_time[pages] = now
    seen = last > 0
    soon = pages[seen & (now - last <= module.thrashing_lapse_usec)]
    late = pages[seen & (now - last > module.thrashing_lapse_usec)]
    page.events[soon] = np.minimum(page.events[soon] + 1, 7)
    (page.migrations if migration else page.revocations)[soon] = True
    for index in soon[page.events[soon] == threshold]:
        thrashing_detected(block, thread, info, int(index))
    if (page.events[soon] >= threshold).any():
        info.last_thrashing_time = now
    over = late[page.events[late] >= threshold]
    for index in over[~bools(info.pinned, block.pages)[over]]:
        thrashing_reset_page(block, thread, int(index))


@step
def thrashing_detected(block: VaBlock, thread: Thread, info: BlockThrashing, index: int) -> None:
    """The page thrashes from now on (uvm_perf_thrashing.c)."""
    info.pages |= 1 << index
    _event(block, thread, "UvmEventTypeThrashingDetected", index)


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
    pinned = bool(info.pinned >> index & 1)
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
    current = CPU if block.resident[CPU] >> index & 1 else GPU
    pinned, pin = bool(info.pinned >> index & 1), int(page.pin_residency[index])
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
            _event(block, thread, "UvmEventTypeThrottlingStart", index)
        if not info.pinned >> index & 1:
            page.throttle_count[index] = min(page.throttle_count[index] + 1, 255)


@step
def thrashing_throttle_end_processor(
    block: VaBlock, thread: Thread, page: PageThrashing, index: int, processor: int
) -> None:
    page.throttled[index] &= ~(1 << processor)
    if not page.throttled[index]:
        page.throttle_end[index] = 0
    if processor == GPU:
        _event(block, thread, "UvmEventTypeThrottlingEnd", index)


@step
def thrashing_throttling_reset_page(block: VaBlock, thread: Thread, page: PageThrashing, index: int) -> None:
    """Nobody is throttled on the page any more (uvm_perf_thrashing.c)."""
    for processor in (CPU, GPU):
        if page.throttled[index] >> processor & 1:
            thrashing_throttle_end_processor(block, thread, page, index, processor)


@step
def thrashing_pin_page(block: VaBlock, thread: Thread, index: int, residency: int) -> None:
    """Pin a page at `residency`; the first pin starts the clock of the unpin worker (uvm_perf_thrashing.c)."""
    info, module = block.thrashing, block.range.va_space.module
    assert info is not None and info.page is not None
    page, bit = info.page, 1 << index
    if not info.pinned & bit or not block.resident[residency] & bit:
        thrashing_throttling_reset_page(block, thread, page, index)
    if not info.pinned & bit:
        page.throttle_count[index] = 0
        info.pinned |= bit
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
        and info.pinned >> index & 1
        and info.page.pin_deadline[index] <= soon
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
        if not kept and not block.resident[processor] >> index & 1:
            uvm_va_block_unmap(block, thread, processor, 1 << index)


@step
def thrashing_reset_page(block: VaBlock, thread: Thread, index: int) -> None:
    """Forget everything about one page."""
    info = block.thrashing
    assert info is not None and info.page is not None
    page, bit = info.page, 1 << index
    if page.throttled[index]:
        thrashing_throttling_reset_page(block, thread, page, index)
    info.pinned &= ~bit
    info.pages &= ~bit
    page.pin_residency[index] = NOBODY
    page.last_time[index] = page.events[index] = page.processors[index] = 0
    page.migrations[index] = page.revocations[index] = False


@step
def thrashing_reset_pages_in_region(block: VaBlock, thread: Thread, mask: int) -> None:
    """Forget the thrashing pages of `mask`: a user's move takes precedence over the heuristics."""
    if block.thrashing is not None and block.thrashing.page is not None:
        for index in pages_of(mask & block.thrashing.pages):
            thrashing_reset_page(block, thread, int(index))


def _epoch_reset(block: VaBlock, thread: Thread, info: BlockThrashing) -> None:
    assert info.page is not None
    for index in pages_of(info.pages):
        thrashing_throttling_reset_page(block, thread, info.page, int(index))
    info.reset_count += 1
    info.page = None
    info.pages = 0
    info.last_time = info.last_thrashing_time = 0.0
    info.last_processor = NOBODY


def _event(block: VaBlock, thread: Thread, name: str, index: int) -> None:
    thread.engine.trace.span(
        name, "gpu", thread.now, thread.now, parent=thread.row, va=block.va + index * PAGE, pages=1, bytes=PAGE
    )
