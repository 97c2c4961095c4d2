"""uvm_perf_thrashing.c, state: what is remembered of a block's and its pages' migrations, and how it is forgotten."""

from __future__ import annotations

from typing import Final

import numpy as np

from kit.drivers.uvm.types import CPU, GPU, PAGE, PAGE_SHIFT, VaBlock
from kit.memory.table.pagemask import EMPTY, PageMask, bit, pages_of
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = [
    "NOBODY", "BlockThrashing", "PageThrashing", "thrashing_reset_page", "thrashing_reset_pages_in_region",
    "thrashing_throttle_end_processor", "thrashing_throttling_reset_page", "tools_event",
]  # fmt: skip

NOBODY: Final = -1


class BlockThrashing:
    """block_thrashing_info_t: one block's history, per page from the moment it looks suspicious."""

    def __init__(self) -> None:
        self.last_time = 0.0
        self.last_processor = NOBODY
        self.last_thrashing_time = 0.0
        self.reset_count = 0
        self.pages = EMPTY  # mask of thrashing pages
        self.pinned = EMPTY  # mask of pinned pages
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


@step
def thrashing_throttle_end_processor(
    block: VaBlock, thread: Thread, page: PageThrashing, index: int, processor: int
) -> None:
    """A processor may fault on the page again; the last one ends the period (uvm_perf_thrashing.c)."""
    page.throttled[index] &= ~(1 << processor)
    if not page.throttled[index]:
        page.throttle_end[index] = 0
    if processor == GPU:
        tools_event(block, thread, "UvmEventTypeThrottlingEnd", index)


@step
def thrashing_throttling_reset_page(block: VaBlock, thread: Thread, page: PageThrashing, index: int) -> None:
    """Nobody is throttled on the page any more (uvm_perf_thrashing.c)."""
    for processor in (CPU, GPU):
        if page.throttled[index] >> processor & 1:
            thrashing_throttle_end_processor(block, thread, page, index, processor)


@step
def thrashing_reset_page(block: VaBlock, thread: Thread, index: int) -> None:
    """Forget everything about one page."""
    info = block.thrashing
    assert info is not None and info.page is not None
    page, kept = info.page, ~bit(index)
    if page.throttled[index]:
        thrashing_throttling_reset_page(block, thread, page, index)
    info.pinned &= kept
    info.pages &= kept
    page.pin_residency[index] = NOBODY
    page.last_time[index] = page.events[index] = page.processors[index] = 0
    page.migrations[index] = page.revocations[index] = False


@step
def thrashing_reset_pages_in_region(block: VaBlock, thread: Thread, mask: PageMask) -> None:
    """Forget the thrashing pages of `mask`: a user's move takes precedence over the heuristics."""
    if block.thrashing is not None and block.thrashing.page is not None:
        for index in pages_of(mask & block.thrashing.pages):
            thrashing_reset_page(block, thread, int(index))


def tools_event(block: VaBlock, thread: Thread, name: str, index: int) -> None:
    """Tell tools something about one page."""
    thread.engine.trace.span(
        name, "gpu", thread.now, thread.now, parent=thread.row, va=block.va + (index << PAGE_SHIFT), pages=1, bytes=PAGE
    )
