"""DMA of scatter/gather lists: from keys and addresses to bytes of pages, up to the first page that is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import NOTHING, Run, Translation, Verdict
from kit.drivers.mlx5.adapter.payload import gather, scatter
from kit.drivers.mlx5.descriptors import Sge

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca

__all__ = ["access", "read_list", "write_list"]

Bytes = NDArray[np.uint8]
EMPTY: Bytes = np.zeros(0, dtype=np.uint8)
_FINE = Translation(Verdict.OK, NOTHING, 0, 0)


def access(
    hca: Hca, pdn: int, key: int, va: int, length: int, need: Need, data: Bytes | None = None
) -> tuple[Translation, Bytes]:
    """Read, or with `data` write, one registered range as far as its pages are there.

    Returns
    -------
    Translation
    ndarray of uint8
        The bytes that were read; none when writing.
    """
    found = hca.mkeys.translate(key, va, length, need, pdn)
    if not found.good:
        return found, EMPTY
    if found.runs is None:
        return found, _move(hca, va, (found.addresses, found.offset, found.good), data)
    parts, at = [], 0
    for run in found.runs:
        if run[2]:
            parts.append(_move(hca, va + at, run, None if data is None else data[at : at + run[2]]))
            at += run[2]
    return found, _join(parts)


def _move(hca: Hca, va: int, run: Run, data: Bytes | None) -> Bytes:
    """Read bytes that follow each other, or write `data` to them; whatever is stale is recorded."""
    addresses, offset, size = run
    pfns, stale = hca.dma.access(addresses, data is not None, hca.engine.now)
    if stale:
        now = hca.engine.now
        hca.engine.trace.span("dma_stale", hca.name, now, now, va=va, pages=stale, status="error")
    if data is None:
        return gather(hca.memory.payload, pfns, offset, size)
    scatter(hca.memory.payload, pfns, offset, data[:size])
    return EMPTY


def read_list(hca: Hca, pdn: int, sg_list: Sequence[Sge], skip: int) -> tuple[Verdict, Bytes, Translation]:
    """Read a list from byte `skip` on.

    Returns
    -------
    Verdict, ndarray of uint8, Translation
        What was read before the end or the first missing page, and the translation that stopped it.
    """
    parts: list[Bytes] = []
    for addr, length, lkey in sg_list:
        if skip >= length:
            skip -= length
            continue
        found, data = access(hca, pdn, lkey, addr + skip, length - skip, Need.LOCAL_READ)
        skip = 0
        parts.append(data)
        if found.verdict != Verdict.OK:
            return found.verdict, _join(parts), found
    return Verdict.OK, _join(parts), _FINE


def write_list(hca: Hca, pdn: int, sg_list: Sequence[Sge], skip: int, data: Bytes) -> tuple[Verdict, int, Translation]:
    """Write `data` to a list from byte `skip` of it on; returns how many bytes got there."""
    written = 0
    for addr, length, lkey in sg_list:
        if skip >= length:
            skip -= length
            continue
        size = min(length - skip, len(data) - written)
        if not size:
            break
        found, _ = access(hca, pdn, lkey, addr + skip, size, Need.LOCAL_WRITE, data[written : written + size])
        skip = 0
        written += found.good
        if found.verdict != Verdict.OK:
            return found.verdict, written, found
    return Verdict.OK, written, _FINE


def _join(parts: list[Bytes]) -> Bytes:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else EMPTY
