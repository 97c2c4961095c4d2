"""Bytes between messages and pages.

A page carries `payload_bytes` of its content: all 4096, or only the first words (a stamp). What a page does not
carry reads as zeros and is dropped on writing.
"""

from __future__ import annotations

from sys import getrefcount

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE

__all__ = ["gather", "scatter"]

Bytes = NDArray[np.uint8]
_SPARE: dict[int, list[Bytes]] = {}  # by pages
_SIZES, _EACH = 16, 4
_UNUSED = 3  # references to a block that only `_SPARE` has: from the list, the loop and the call that counts them


def gather(payload: NDArray[np.uint64], pfns: NDArray[np.int64], offset: int, length: int) -> Bytes:
    """Return the bytes [offset, offset + length) of the memory that `pfns` make up, read at this moment.

    Parameters
    ----------
    payload : ndarray of uint64, shape (frames, words)
    pfns : ndarray of int64, shape (n,)
    offset, length : int
        Bytes, from the start of the first page.
    """
    rows = payload[pfns].view(np.uint8).reshape(len(pfns), -1)
    if rows.shape[1] == PAGE:
        return rows.reshape(-1)[offset : offset + length]
    if offset + length <= rows.shape[1]:
        return rows[0, offset : offset + length]
    whole = _blank(len(pfns))
    whole[:, : rows.shape[1]] = rows
    return whole.reshape(-1)[offset : offset + length]


def _blank(pages: int) -> Bytes:
    """Return pages of zeros, in which only what is kept of a page may be written, and all of it has to be.

    Messages are short-lived and read only, so one that nobody refers to any more lends its pages to the next:
    getting fresh ones from the system would cost more than everything else that is done to a large message.
    """
    spare = _SPARE.setdefault(pages, [])
    for block in spare:
        if getrefcount(block) == _UNUSED:
            return block
    block = np.zeros((pages, PAGE), dtype=np.uint8)
    if len(_SPARE) > _SIZES:
        _SPARE.clear()
    elif len(spare) < _EACH:
        spare.append(block)
    return block


def scatter(payload: NDArray[np.uint64], pfns: NDArray[np.int64], offset: int, data: Bytes) -> None:
    """Write `data` at `offset` of the memory that `pfns` make up."""
    if not len(data):
        return
    pages = payload.view(np.uint8)
    kept = pages.shape[1]
    head = min(-offset % PAGE, len(data))  # bytes before the first page that is written from its start
    if head:
        _write(pages, int(pfns[0]), offset, data[:head], kept)
    first = 1 if head else 0
    whole = (len(data) - head) // PAGE
    if whole:
        block = data[head : head + whole * PAGE].reshape(whole, PAGE)
        pages[pfns[first : first + whole]] = block if kept == PAGE else block[:, :kept]
    tail = head + whole * PAGE
    if tail < len(data):
        _write(pages, int(pfns[first + whole]), 0, data[tail:], kept)


def _write(pages: Bytes, pfn: int, offset: int, data: Bytes, kept: int) -> None:
    size = max(min(kept - offset, len(data)), 0)
    pages[pfn, offset : offset + size] = data[:size]
