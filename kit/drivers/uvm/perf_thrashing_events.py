"""uvm_perf_thrashing.c, events: migrations and revocations, counted until a page is found to thrash."""

from __future__ import annotations

import numpy as np

from kit.drivers.uvm.perf_thrashing_state import (
    BlockThrashing,
    PageThrashing,
    thrashing_reset_page,
    thrashing_reset_pages_in_region,
    tools_event,
)
from kit.drivers.uvm.types import VaBlock
from kit.memory.table.pagemask import EMPTY, PageMask, bit, bools, from_pages, pages_of
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["thrashing_notify_migration", "thrashing_notify_revocation"]


def thrashing_notify_migration(block: VaBlock, thread: Thread, mask: PageMask, dest: int, cause: str) -> None:
    """Pages went to `dest`. Blocks without per-page history only take a stamp, which is not worth spans."""
    module, info = block.range.va_space.module, block.thrashing
    if cause == "eviction" or not module.thrashing_enable:
        return
    if info is not None and info.page is not None:
        uvm_perf_event_notify_migration(block, thread, mask, dest, cause)
    elif cause == "fault" and not block.range.read_duplicate:
        info = _block_event(block, thread, dest)
        if info.page is not None:  # which it has from this event on
            _count_events(block, thread, info, info.page, mask, dest, True)


def thrashing_notify_revocation(block: VaBlock, thread: Thread, mask: PageMask, loser: int) -> None:
    """A processor lost rights without a move."""
    if block.range.va_space.module.thrashing_enable:
        uvm_perf_event_notify_revocation(block, thread, mask, loser)


@step
def uvm_perf_event_notify_migration(block: VaBlock, thread: Thread, mask: PageMask, dest: int, cause: str) -> None:
    """Tell listeners about a migration (uvm_perf_events.c)."""
    uvm_perf_event_notify(block, thread, mask, dest, cause)


@step
def uvm_perf_event_notify_revocation(block: VaBlock, thread: Thread, mask: PageMask, loser: int) -> None:
    """Tell listeners about a revocation (uvm_perf_events.c)."""
    uvm_perf_event_notify(block, thread, mask, loser, "revocation")


@step
def uvm_perf_event_notify(block: VaBlock, thread: Thread, mask: PageMask, processor: int, cause: str) -> None:
    """Call the modules that listen (uvm_perf_events.c)."""
    thrashing_event_cb(block, thread, mask, processor, cause)


@step
def thrashing_event_cb(block: VaBlock, thread: Thread, mask: PageMask, processor: int, cause: str) -> None:
    """Stamp and count an event on every page of `mask`; a user's move wipes their history (uvm_perf_thrashing.c)."""
    if cause != "revocation":
        if cause != "fault" or block.range.read_duplicate:
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


def _moving_to_pin(block: VaBlock, mask: PageMask, dest: int) -> PageMask:
    """Return the pages of `mask` that only go where they are pinned."""
    info = block.thrashing
    if info is None or info.page is None or not mask & info.pinned:
        return EMPTY
    pinned = pages_of(mask & info.pinned)
    return from_pages(pinned[info.page.pin_residency[pinned] == dest])


def _count_events(
    block: VaBlock,
    thread: Thread,
    info: BlockThrashing,
    page: PageThrashing,
    mask: PageMask,
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
    info.pages |= bit(index)
    tools_event(block, thread, "UvmEventTypeThrashingDetected", index)
