"""What a program loads and stores: bytes of its memory and stamps of its pages, with every fault that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.faults.access import AHEAD, touch
from kit.memory.types import PAGE

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["load", "read_bytes", "store", "write_bytes"]


def _pages_with_right(mm: Mm, thread: Thread, pages: NDArray[np.int64], write: bool) -> Wait:
    """Touch pages; return the frames of the longest beginning of them that is all there at this moment."""
    pages = pages[: max(1, mm.memory.system_frames // 8)]
    while True:
        yield from touch(mm, thread, pages, write)
        slots = mm.table.slots_of(pages)
        there = mm.table.rights[slots] >= (2 if write else 1)
        count = len(pages) if there.all() else int(there.argmin())
        if count:
            return mm.table.frame[slots[:count]].copy()
        pages = pages[: max(1, len(pages) // 2)]  # memory is short: the last ones pushed the first ones out


def read_bytes(mm: Mm, thread: Thread, start: int, length: int) -> Wait:
    """Load `length` bytes from address `start`; returns ndarray of uint8. Frames must carry whole pages."""
    _whole_pages(mm)
    first, last = start // PAGE, (start + length - 1) // PAGE
    parts, at = [], first
    while at <= last:
        frames = yield from _pages_with_right(mm, thread, np.arange(at, min(last + 1, at + AHEAD)), False)
        parts.append(mm.memory.payload[frames].reshape(-1).view(np.uint8))
        at += len(frames)
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return whole[start - first * PAGE :][:length].copy()


def write_bytes(mm: Mm, thread: Thread, start: int, data: NDArray[np.uint8]) -> Wait:
    """Store bytes at address `start`. Frames must carry whole pages."""
    _whole_pages(mm)
    data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    done = 0
    while done < len(data):
        page, inside = divmod(start + done, PAGE)
        pages = np.arange(page, min(-(-(start + len(data)) // PAGE), page + AHEAD))
        frames = yield from _pages_with_right(mm, thread, pages, True)
        size = min(len(frames) * PAGE - inside, len(data) - done)
        content = mm.memory.payload[frames].view(np.uint8).reshape(-1)
        content[inside : inside + size] = data[done : done + size]
        mm.memory.payload[frames] = content.view(np.uint64).reshape(len(frames), -1)
        done += size


def load(mm: Mm, thread: Thread, pages: NDArray[np.int64]) -> Wait:
    """Load each page's stamp (its first word); returns ndarray of uint64, shape (n,)."""
    pages = np.asarray(pages, dtype=np.int64)
    found = np.empty(len(pages), dtype=np.uint64)
    at = 0
    while at < len(pages):
        frames = yield from _pages_with_right(mm, thread, pages[at : at + AHEAD], False)
        found[at : at + len(frames)] = mm.memory.payload[frames, 0]
        at += len(frames)
    return found


def store(mm: Mm, thread: Thread, pages: NDArray[np.int64], stamps: NDArray[np.uint64] | int) -> Wait:
    """Store a stamp into the first word of each page."""
    pages = np.asarray(pages, dtype=np.int64)
    stamps = np.broadcast_to(np.asarray(stamps, dtype=np.uint64), pages.shape)
    at = 0
    while at < len(pages):
        frames = yield from _pages_with_right(mm, thread, pages[at : at + AHEAD], True)
        mm.memory.payload[frames, 0] = stamps[at : at + len(frames)]
        at += len(frames)


def _whole_pages(mm: Mm) -> None:
    if mm.memory.payload_bytes != PAGE:
        raise ValueError(f"payload_bytes = {mm.memory.payload_bytes}: bytes are there only with 4096")
