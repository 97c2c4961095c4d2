"""Bytes between messages and pages.

A page carries `payload_bytes` of its content: all 4096, or only the first words (a stamp). What a page does not
carry reads as zeros and is dropped on writing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE

__all__ = ["gather", "scatter"]

Bytes = NDArray[np.uint8]


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
    whole = np.zeros((len(pfns), PAGE), dtype=np.uint8)
    whole[:, : rows.shape[1]] = rows
    return whole.reshape(-1)[offset : offset + length]


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
