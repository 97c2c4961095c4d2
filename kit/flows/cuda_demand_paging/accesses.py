"""Lists of page accesses, and the kernels that make them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.serial import SerialKernel
from kit.drivers.uvm.stream import StreamKernel
from kit.drivers.uvm.types import PREFETCH, READ, REQUIRED_PROT, WRITE
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.run import Allocation

__all__ = ["NOTHING", "PAGE", "Accesses", "interleave", "pages_of", "stream_kernel", "whole", "with_stray"]

PAGE = 4096


@dataclass(frozen=True)
class Accesses:
    """An ordered list of page accesses: pages counted from the first allocation's, and which of them write."""

    page: NDArray[np.int64]
    write: NDArray[np.bool_]

    @staticmethod
    def of(page: NDArray[np.integer], write: bool | NDArray[np.bool_]) -> Accesses:
        """Build from pages and one flag, or a flag each."""
        pages = np.asarray(page, dtype=np.int64)
        return Accesses(pages, np.full(len(pages), write) if isinstance(write, bool) else write)


NOTHING = Accesses.of(np.zeros(0, dtype=np.int64), False)


def pages_of(array: Allocation, base: int) -> NDArray[np.int64]:
    """Return the pages of an allocation, counted from page `base`."""
    first, last = array.va // PAGE, (array.va + array.bytes - 1) // PAGE
    return np.arange(first - base, last - base + 1)


def whole(array: Allocation, write: bool) -> Accesses:
    """Return an access to every page of the first allocation, in order."""
    return Accesses.of(pages_of(array, array.va // PAGE), write)


def interleave(columns: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return a[0], b[0], a[1], b[1], ...: one loop over several arrays."""
    longest = max(len(c) for c in columns)
    rows = np.full((longest, len(columns)), -1, dtype=np.int64)
    for at, column in enumerate(columns):
        rows[: len(column), at] = column
    flat = rows.reshape(-1)
    return flat[flat >= 0]


def stream_kernel(
    name: str, accesses: Accesses, base: int, gpu: Gpu, lanes: int, pause_us: float = 0.0, ahead: int = 0
) -> StreamKernel | SerialKernel:
    """Make a kernel of a list of accesses, each after a prefetch instruction `ahead` pages on (0: none)."""
    pages = accesses.page + base
    kind = np.where(accesses.write, np.int8(WRITE), np.int8(READ))
    if ahead:
        pages, kind = np.stack([pages + ahead, pages], 1), np.stack([np.full_like(kind, PREFETCH), kind], 1)
        pages, kind = pages.reshape(-1), kind.reshape(-1)
    capacity = int(gpu.machine["misses_per_sm"] * gpu.machine["sms"])
    slots = gpu.table.walk(pages)
    need, touch_us, utlbs = REQUIRED_PROT[kind], gpu.costs.thread_miss, int(gpu.machine["tpcs"])
    if lanes == 1 and not ahead:
        return SerialKernel(name, slots, pages, kind, need, touch_us + pause_us)
    return StreamKernel(name, slots, pages, kind, need, lanes or capacity, utlbs, touch_us, pause_us)


def with_stray(accesses: Accesses, p: CudaParameters) -> Accesses:
    """Append the illegal access that `stray_bytes` asks for."""
    if not p.stray_bytes:
        return accesses
    page = (p.buffer_bytes + p.stray_bytes - 1) // PAGE
    return Accesses(np.append(accesses.page, page), np.append(accesses.write, True))
