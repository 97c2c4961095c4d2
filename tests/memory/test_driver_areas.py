"""Areas of drivers, and what every access path owes to the program: order, time, and a word of what was written."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kit.errors import DriverError, Errno
from kit.memory.costs import COSTS, make_costs
from kit.memory.faults.access import touch
from kit.memory.faults.gup import pin_user_pages_fast, unpin_user_pages
from kit.memory.invariants import check_invariants
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.reclaim.alloc import alloc_pages_exact, free_pages_exact
from kit.memory.space.mm import Mm
from kit.memory.space.special import install_special_mapping
from kit.memory.space.vm_insert import insert_runs, zap_runs
from kit.memory.space.vma import Vma
from kit.memory.syscalls.exit import exit_mmap
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.types import (
    FAULT_FLAG_MKWRITE,
    FAULT_FLAG_WRITE,
    FOLL_WRITE,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    VM_DONTCOPY,
    VM_FAULT_NOPAGE,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Bit,
    Vmf,
)
from kit.sim.engine import Engine, Thread, Wait

SHARED = VM_READ | VM_WRITE | VM_SHARED | VM_MIXEDMAP | VM_DONTCOPY
FIRST = 0x7F00_0000_0000 // PAGE


class Process:
    """An address space with a thread in it, and whatever its drivers' areas have been asked."""

    def __init__(self, frames: int = 5000, costs: dict[str, float] | None = None) -> None:
        self.engine = Engine()
        self.memory = PhysicalMemory(self.engine, frames)
        self.mm = Mm(self.memory, self.engine, make_costs(costs))
        self.thread = self.engine.thread("cpu")
        self.written: list[int] = []

    def run(self, work: Wait) -> Any:
        return self.engine.run(self.engine.start(work))

    def heap(self, pages: int) -> Vma:
        """Anonymous memory."""
        start = self.run(mmap(self.mm, self.thread, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
        vma = self.mm.find(start // PAGE)
        assert vma is not None
        return vma

    def touch(self, pages: Sequence[int], write: bool | list[bool] = False) -> None:
        writes = np.full(len(pages), write) if isinstance(write, bool) else np.array(write)
        self.run(touch(self.mm, self.thread, np.array(pages), writes, 0.5, lambda some: self.written.extend(some)))

    def entries(self, vma: Vma) -> tuple[list[int], list[int]]:
        """Rights and bits."""
        slots = self.mm.table.slots_of(np.arange(vma.first, vma.end))
        return self.mm.table.rights[slots].tolist(), self.mm.table.bits[slots].tolist()

    def check(self, driver: Driver | None = None) -> None:
        check_invariants(self.memory, [self.mm], dict.fromkeys(driver.held, 1) if driver is not None else None)


class Driver:
    """A driver that keeps one page for each page of its area and maps `around` of them at a time, in place."""

    def __init__(self, process: Process, pages: int, around: int = 4, first: int = FIRST) -> None:
        self.process, self.around, self.asked = process, around, list[tuple[int, str]]()
        self.closed = False
        self.vma = install_special_mapping(process.mm, first, pages, SHARED, self, "managed", pgoff=first)
        self.slot = process.mm.table.reserve(first, pages)
        base = alloc_pages_exact(process.memory, pages)
        assert base is not None
        self.base, self.held = base, range(base, base + pages)

    def fault(self, vmf: Vmf, thread: Thread) -> Wait:
        at, write = vmf.address // PAGE - self.vma.first, bool(vmf.flags & FAULT_FLAG_WRITE)
        self.asked.append((at, "mkwrite" if vmf.flags & FAULT_FLAG_MKWRITE else "write" if write else "read"))
        thread.charge(10.0)
        yield from thread.sync()
        count = min(self.around, self.vma.pages - at)
        zap_runs(self.vma, self.slot, ((at, count),), self.base)
        insert_runs(self.vma, self.slot, ((at, count),), np.array(self.held, np.int32), write, self.base)
        return VM_FAULT_NOPAGE

    page_mkwrite = fault

    def may_split(self, vma: Vma, page: int) -> int:
        return Errno(errno.EINVAL, "may_split", "no")

    def close(self, vma: Vma, thread: Thread) -> None:
        slots = slice(self.slot, self.slot + vma.pages)
        assert vma is self.vma and not self.process.mm.table.kind[slots].any(), (
            "entries are gone before the driver knows"
        )
        self.closed = True


def test_a_drivers_area_asks_the_driver_and_looks_again() -> None:
    p = Process()
    d = Driver(p, 8)
    p.touch(range(d.vma.first, d.vma.end))
    p.touch(range(d.vma.first, d.vma.end), True)
    assert d.asked == [(0, "read"), (4, "read"), (0, "mkwrite"), (4, "mkwrite")]
    assert p.thread.now == pytest.approx(4 * 10 + 16 * 0.5)
    assert p.mm.faults == 4 and p.mm.rss["file"] == 8
    assert p.entries(d.vma) == ([2] * 8, [Bit.YOUNG | Bit.WRITABLE | Bit.DIRTY] * 8)
    assert p.written == list(range(d.vma.first, d.vma.end))
    assert not len(p.engine.trace.spans.array()), "the steps are the driver's to record"
    p.check(d)


def test_its_faults_cost_what_others_do() -> None:
    p = Process(costs=dict.fromkeys(COSTS, 0.0) | {"fault_entry": 1.0, "handle_mm_fault": 0.25})
    d = Driver(p, 8)
    p.touch(range(d.vma.first, d.vma.end))
    p.touch([d.vma.first], True)
    assert p.thread.now == pytest.approx(3 * 11.25 + 9 * 0.5)


def test_pins_take_the_same_way() -> None:
    p = Process()
    d = Driver(p, 8)
    p.touch([d.vma.first])
    pins = p.run(pin_user_pages_fast(p.mm, p.thread, d.vma.start, 8, FOLL_WRITE))
    assert list(pins) == list(d.held)
    assert d.asked == [(0, "read"), (4, "write"), (0, "mkwrite")]
    unpin_user_pages(p.memory, pins)
    p.check(d)


def test_unmapping_ends_with_the_driver() -> None:
    p = Process()
    one, two = Driver(p, 600), Driver(p, 600, first=FIRST + 700)
    p.touch([one.vma.first + at for at in range(0, 600, 7)], True)
    p.touch([two.vma.first], True)
    assert p.run(munmap(p.mm, p.thread, one.vma.start, 100 * PAGE)) == -errno.EINVAL, "it may not be cut"
    assert p.run(munmap(p.mm, p.thread, one.vma.start, 600 * PAGE)) == 0
    assert (one.closed, two.closed, p.mm.rss["file"]) == (True, False, 4)
    free_pages_exact(p.memory, one.base, 600)
    assert p.memory.used == 600
    with pytest.raises(DriverError, match="no area there"):
        p.touch([one.vma.first])
    p.check(two)
    p.run(exit_mmap(p.mm, p.thread))
    assert two.closed and not p.mm.vmas
    p.check(two)


def test_pages_that_the_driver_gave_up_go_with_their_last_entry() -> None:
    p = Process()
    d = Driver(p, 8)
    p.touch([d.vma.first], True)
    free_pages_exact(p.memory, d.base, 8)
    assert p.memory.used == 4
    zap_runs(d.vma, d.slot, ((0, 8),))
    assert (p.memory.used, p.mm.rss["file"]) == (0, 0)
    p.check()


class Answers:
    """A driver that answers what it is told to."""

    def __init__(self, process: Process, *answers: int) -> None:
        self.process, self.answers = process, list(answers)
        self.page = -1

    def fault(self, vmf: Vmf, thread: Thread) -> Wait:
        answer = self.answers.pop(0)
        if answer & VM_FAULT_RETRY:
            yield from self.process.mm.mmap_lock.read_release(thread)
        elif not answer:
            self.page = vmf.page = int(self.process.memory.alloc_pages(1)[0])
        return answer


def test_a_page_that_the_driver_names_is_mapped() -> None:
    p = Process()
    ops = Answers(p, 0)
    vma = install_special_mapping(p.mm, FIRST, 4, SHARED, ops, "named")
    p.touch([vma.first + 1], True)
    assert p.entries(vma)[0] == [0, 2, 0, 0]
    assert (int(p.memory.refcount[ops.page]), p.mm.rss["file"]) == (1, 1)
    p.check()


def test_a_fault_that_gave_up_the_lock_is_taken_again() -> None:
    p = Process()
    vma = install_special_mapping(p.mm, FIRST, 4, SHARED, Answers(p, VM_FAULT_RETRY, VM_FAULT_RETRY, 0), "slow")
    p.touch([vma.first])
    assert p.mm.mmap_lock.readers == 0 and p.entries(vma)[0] == [2, 0, 0, 0]


@pytest.mark.parametrize("ops", [None, VM_FAULT_SIGBUS], ids=["no fault operation", "an error"])
def test_what_a_driver_does_not_serve_is_a_bus_error(ops: int | None) -> None:
    p = Process()
    vma = install_special_mapping(p.mm, FIRST, 4, SHARED, object() if ops is None else Answers(p, ops), "deaf")
    with pytest.raises(DriverError) as error:
        p.touch([vma.first])
    assert (error.value.errno, error.value.status) == (errno.EFAULT, "SIGBUS")
    assert p.mm.mmap_lock.readers == 0


def test_what_a_driver_raises_passes_through_and_the_lock_is_free() -> None:
    p = Process()

    def fault(vmf: Vmf, thread: Thread) -> Wait:
        yield from thread.sync()
        raise DriverError(errno.ENOMEM, "NV_ERR_NO_MEMORY", "alloc_pages", "none left")

    vma = install_special_mapping(p.mm, FIRST, 4, SHARED, SimpleNamespace(fault=fault), "poor")
    with pytest.raises(DriverError, match="none left"):
        p.touch([vma.first])
    assert p.mm.mmap_lock.readers == 0


def test_areas_lie_where_their_driver_wants_them() -> None:
    p = Process()
    d = Driver(p, 8, first=FIRST + 3)
    assert (d.vma.start, d.vma.stop) == ((FIRST + 3) * PAGE, (FIRST + 11) * PAGE)
    for first, pages, number in ((FIRST + 10, 4, errno.EEXIST), (FIRST, 4, errno.EEXIST), (FIRST, 0, errno.EINVAL)):
        with pytest.raises(DriverError) as error:
            install_special_mapping(p.mm, first, pages, SHARED, d, "other")
        assert error.value.errno == number
    assert install_special_mapping(p.mm, FIRST, 3, SHARED, d, "below").end == d.vma.first


@pytest.mark.parametrize("write", [False, True])
def test_what_came_before_a_segmentation_fault_happened(write: bool) -> None:
    p = Process()
    heap = p.heap(1)
    with pytest.raises(DriverError, match=f"{heap.stop:#x}: no area there") as error:
        p.touch([heap.first, heap.first, heap.end], write)
    assert (error.value.errno, error.value.status) == (errno.EFAULT, "SIGSEGV")
    assert p.written == [heap.first, heap.first] * write
    assert p.thread.now == pytest.approx(2 * 0.5)
    p.check()


def test_a_page_that_is_read_after_it_was_written_stays_dirty() -> None:
    p = Process()
    heap = p.heap(3)
    p.touch(range(heap.first, heap.end))
    p.touch([heap.first, heap.first + 1], True)
    slots = p.mm.table.slots_of(np.arange(heap.first, heap.end))
    p.mm.table.set_bits(slots, p.mm.table.bits[slots] & ~np.uint8(Bit.YOUNG | Bit.DIRTY))
    p.touch([heap.first, heap.first + 1, heap.first + 2, heap.first], [True, False, False, False])
    assert [bits & (Bit.YOUNG | Bit.DIRTY) for bits in p.entries(heap)[1]] == [Bit.YOUNG | Bit.DIRTY, *[Bit.YOUNG] * 2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1199), st.booleans()), max_size=300), st.integers(1, 40))
def test_touches_of_two_kinds_of_areas_against_a_set(touches: list[tuple[int, bool]], around: int) -> None:
    """Pages below 600 are anonymous memory, the others a driver's: in one stream of accesses."""
    p = Process()
    heap, d = p.heap(600), Driver(p, 600, around)
    where = [heap.first + page if page < 600 else d.vma.first + page - 600 for page, _ in touches]
    p.touch(where, [write for _, write in touches])
    wrote = {page for page, (_, write) in zip(where, touches, strict=True) if write}
    assert p.written == [page for page, (_, write) in zip(where, touches, strict=True) if write]
    assert p.thread.now == pytest.approx(len(touches) * 0.5 + 10.0 * len(d.asked))
    rights = p.entries(heap)[0]
    assert [page for page, right in enumerate(rights) if right] == sorted({n for n, _ in touches if n < 600})
    own = {page for page in wrote if heap.first <= page < heap.end}
    assert {heap.first + page for page, right in enumerate(rights) if right == 2} == own
    assert p.mm.rss["anon"] == len(own)
    mine = p.entries(d.vma)[1]
    assert {d.vma.first + at for at, each in enumerate(mine) if each & Bit.DIRTY} <= wrote
    served = {at + n for at, _ in d.asked for n in range(min(around, 600 - at))}
    assert [at for at, each in enumerate(mine) if each] == sorted(served)
    p.check(d)
