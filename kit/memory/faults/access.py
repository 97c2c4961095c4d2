"""A program's accesses to its pages, with every fault they take (arch/x86/mm/fault.c @ 7.0)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import DriverError
from kit.memory.faults.driver import driver_area_fault
from kit.memory.faults.fault import handle_mm_fault
from kit.memory.types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_TRIED,
    FAULT_FLAG_USER,
    FAULT_FLAG_VMA_LOCK,
    FAULT_FLAG_WRITE,
    PAGE,
    VM_ACCESS_FLAGS,
    VM_FAULT_ERROR,
    VM_FAULT_HWPOISON,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["AHEAD", "do_user_addr_fault", "touch"]

_CHUNK = 65536  # accesses looked up at once
_WINDOW = 64  # accesses looked at together after a fault; twice as many while none is missing
AHEAD = 8192  # ... at most, and pages that one run of faults serves at most


def touch(
    mm: Mm, thread: Thread, pages: NDArray[np.int64], writes: NDArray[np.bool_] | bool, touch_us: float = 0.0,
    wrote: Callable[[NDArray[np.int64]], None] | None = None,
) -> Wait:  # fmt: skip
    """Access pages in order from a CPU thread, taking every fault on the way.

    Parameters
    ----------
    pages : ndarray of int64, shape (n,)
        Virtual page numbers.
    writes : bool, or ndarray of bool, shape (n,)
    touch_us : float
        The program's own work on each access, microseconds.
    wrote : callable
        Told the pages of completed writes, at the latest before the next fault.

    Raises
    ------
    DriverError
        EFAULT with status SIGSEGV (no area there, or it does not allow the access) or SIGBUS; ENOMEM with status
        OOM-kill when memory and swap are out. What a driver raises in a fault of its area passes through.
    """
    pages = np.asarray(pages, dtype=np.int64)
    writes = np.broadcast_to(np.asarray(writes, dtype=bool), pages.shape)
    for start in range(0, len(pages), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield from _touch_chunk(mm, thread, pages[chunk], writes[chunk], touch_us, wrote)


def _touch_chunk(
    mm: Mm, thread: Thread, pages: NDArray[np.int64], writes: NDArray[np.bool_], touch_us: float,
    wrote: Callable[[NDArray[np.int64]], None] | None,
) -> Wait:  # fmt: skip
    table, count = mm.table, len(pages)
    need = np.where(writes, 2, 1).astype(np.uint8)
    slots, made, all_write = table.walk(pages), table.made, bool(writes.all())
    straight = _straight(slots)
    at, noted, window = 0, 0, _WINDOW  # accesses made, those that entries and program know of, how many to look at
    while at < count:
        stop = min(at + window, count)
        look = slots[at:stop] if straight < 0 else slice(straight + at, straight + stop)
        miss = table.rights[look] < need[at:stop]
        first = int(miss.argmax())
        missing = miss.item(first)
        ran = first if missing else stop - at
        if ran:
            if touch_us:
                thread.charge(ran * touch_us)
            at += ran
            window = min(2 * window, AHEAD)
        if noted < at and (missing or at == count):
            done = slice(noted, at)
            used = slots[done] if straight < 0 else slice(straight + noted, straight + at)
            which = slice(None) if all_write else np.flatnonzero(writes[done])
            table.young(used, used if all_write else slots[done][which])
            if wrote is not None:
                wrote(pages[done][which])
            noted = at
        if missing:
            window = _WINDOW
            page, write = pages.item(at), writes.item(at)
            vma = mm.find(page)
            if vma is not None and vma.ops is not None and not access_error(vma, write):
                result: int = yield from driver_area_fault(vma, thread, page, write, slots.item(at))
                if result & VM_FAULT_ERROR:
                    _fail(thread, page, result)
            else:
                ahead = slice(at, at + AHEAD)
                some = at + np.flatnonzero(table.rights[slots[ahead]] < need[ahead])
                yield from do_user_addr_fault(mm, thread, pages[some], write, writes[some])
            if table.made != made:
                slots, made = table.walk(pages), table.made
                straight = _straight(slots)


def _straight(slots: NDArray[np.int64]) -> int:
    """Return the first slot where the others follow it one by one, -1 where they do not: a slice is no gather."""
    first = slots.item(0)
    if first < 0 or slots.item(-1) - first != len(slots) - 1 or (slots[1:] - slots[:-1] != 1).any():
        return -1
    return first


@waiting_step
def do_user_addr_fault(
    mm: Mm, thread: Thread, pages: NDArray[np.int64], write: bool, writes: NDArray[np.bool_] | None = None
) -> Wait:
    """Take the fault of the first of `pages`, and those of the next ones that are alike: same area, same access.

    The area's own lock is not simulated: the first try has FAULT_FLAG_VMA_LOCK, but what it holds is a share of the
    mmap lock. A try that comes back with VM_FAULT_RETRY has given it up, and the next one is made without the flag.
    """
    before = mm.faults
    flags = FAULT_FLAG_USER | FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_VMA_LOCK | (FAULT_FLAG_WRITE if write else 0)
    while True:
        yield from mm.mmap_lock.read_acquire(thread)
        vma = mm.find(int(pages[0]))
        if vma is None or access_error(vma, write):
            yield from mm.mmap_lock.read_release(thread)
            _bad_area(thread, int(pages[0]), vma)
        assert vma is not None
        some = _alike(mm, vma, pages, write, writes)
        thread.note(va=int(pages[0]) * PAGE, pages=len(some), cause="write" if write else "read")
        result: int = yield from handle_mm_fault(vma, thread, some * PAGE, flags)
        if not result & VM_FAULT_RETRY:
            break
        flags = (flags & ~FAULT_FLAG_VMA_LOCK) | (0 if flags & FAULT_FLAG_VMA_LOCK else FAULT_FLAG_TRIED)
    yield from mm.mmap_lock.read_release(thread)
    thread.charge(mm.costs.fault_entry * max(mm.faults - before, 1))
    if result & VM_FAULT_ERROR:
        _fail(thread, int(pages[0]), result)


def _alike(
    mm: Mm, vma: Vma, pages: NDArray[np.int64], write: bool, writes: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Return the pages to fault in together: not more than half of free memory, so that the first one survives."""
    limit = max(1, min(AHEAD, max(mm.memory.free_pages // 2, min(512, mm.memory.system_frames // 16))))
    other = (pages < vma.first) | (pages >= vma.end)
    if writes is not None:
        other |= writes != write
    end = int(other.argmax()) if other.any() else len(pages)
    some = np.sort(pages[:end][:limit])
    return np.asarray(some[np.diff(some, prepend=-1) != 0])


def access_error(vma: Vma, write: bool) -> bool:
    """Whether an area does not allow an access."""
    return not vma.writable if write else not vma.flags & VM_ACCESS_FLAGS


def _bad_area(thread: Thread, page: int, vma: Vma | None) -> None:
    thread.note(va=page * PAGE, status="SIGSEGV")
    why = "no area there" if vma is None else f"{vma} does not allow it"
    raise DriverError(errno.EFAULT, "SIGSEGV", "do_user_addr_fault", f"address {page * PAGE:#x}: {why}")


def _fail(thread: Thread, page: int, result: int) -> None:
    if result & VM_FAULT_OOM:
        thread.note(va=page * PAGE, status="OOM-kill")
        raise DriverError(errno.ENOMEM, "OOM-kill", "do_user_addr_fault", f"address {page * PAGE:#x}: memory is out")
    word = "SIGBUS" if result & (VM_FAULT_SIGBUS | VM_FAULT_HWPOISON) else "SIGSEGV"
    thread.note(va=page * PAGE, status=word)
    raise DriverError(errno.EFAULT, word, "do_user_addr_fault", f"address {page * PAGE:#x}: fault code {result:#x}")
