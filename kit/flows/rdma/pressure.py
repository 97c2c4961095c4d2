"""How pages leave memory under a region: what the program, the kernel's reclaim or munmap does to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import raise_for
from kit.flows.rdma.content import Area, cpu_write
from kit.memory.notifier.notify import runs
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import munmap
from kit.memory.types import MADV_DONTNEED, MADV_PAGEOUT, PAGE

if TYPE_CHECKING:
    from kit.flows.rdma.hosts import Host
    from kit.sim.engine import Thread, Wait

__all__ = ["chosen_pages", "page_out"]

REWRITTEN = 1 << 34  # stamps of the CPU's second writing: far from all others


def chosen_pages(pattern: str, first: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return which of the pages [first, first + count) leave: all, every other, the first or a random half."""
    pages = np.arange(first, first + count, dtype=np.int64)
    if pattern == "alternate":
        return pages[::2]
    if pattern == "first_half":
        return pages[: max(count // 2, 1)]
    if pattern == "random":
        return np.sort(rng.permutation(pages)[: max(count // 2, 1)])
    return pages


def page_out(
    host: Host, thread: Thread, how: str, area: Area, pages: NDArray[np.int64], while_in_use: bool = False
) -> Wait:  # fmt: skip
    """Let pages (numbers from 0 within the area) leave memory.

    Parameters
    ----------
    how : str
        ``madvise``: MADV_DONTNEED, the content is given up; ``rewrite``: the same, and then the CPU writes the pages
        anew, so that only the adapter lacks them; ``reclaim``: MADV_PAGEOUT, it goes to swap; ``munmap``: the
        addresses go too.
    while_in_use : bool
        Messages may be on their way to them.
    """
    for first, count in runs(pages):
        start, length = area.va + first * PAGE, count * PAGE
        if how == "munmap":
            raise_for((yield from munmap(host.mm, thread, start, length)))
        elif how in ("madvise", "rewrite"):
            raise_for((yield from madvise(host.mm, thread, start, length, MADV_DONTNEED)))
        elif how == "reclaim":
            raise_for((yield from madvise(host.mm, thread, start, length, MADV_PAGEOUT)))
        if how in ("munmap", "madvise", "rewrite"):
            area.drop(np.arange(first, first + count), while_in_use)
    if how == "rewrite":
        yield from cpu_write(host.mm, thread, area, pages, REWRITTEN + int(host.engine.now), host.engine.rng)
    yield from thread.sync()
