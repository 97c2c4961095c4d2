"""CPU touches of anonymous memory: first touch populates, rights are kept."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kit.errors import DriverError
from kit.memory.address_space import READ, WRITE, AddressSpace
from kit.memory.frames import Frames
from kit.sim.engine import Engine


@pytest.fixture
def engine() -> Engine:
    return Engine()


def touch(engine: Engine, mm: AddressSpace, pages: list[int], write: bool) -> float:
    thread = engine.thread("cpu")

    def work():
        yield from mm.touch(thread, np.array(pages, dtype=np.int64), np.full(len(pages), write), touch_us=1.0)
        yield from thread.sync()

    engine.run(engine.start(work()))
    return engine.now


def test_allocation_populates_nothing_and_first_touch_one_frame_a_page(engine: Engine) -> None:
    mm = AddressSpace(Frames("host", 1000))
    vma = mm.mmap(40 * 4096 - 5, "a")
    assert (vma.pages, mm.frames.used) == (40, 0)
    touch(engine, mm, [vma.first, vma.first + 3, vma.first], True)
    assert mm.frames.used == 2
    mm.munmap(vma)
    assert mm.frames.used == 0 and mm.find(vma.first) is None


def test_every_touch_takes_its_time(engine: Engine) -> None:
    mm = AddressSpace(Frames("host", 100))
    vma = mm.mmap(20 * 4096, "a")
    assert touch(engine, mm, [vma.first + i % 20 for i in range(500)], False) == pytest.approx(500.0)


def test_a_touch_of_nothing_is_a_fault_with_errno(engine: Engine) -> None:
    mm = AddressSpace(Frames("host", 100))
    vma = mm.mmap(4096, "a")
    with pytest.raises(DriverError, match="in no area") as caught:
        touch(engine, mm, [vma.first + 77], False)
    assert caught.value.errno == errno.EFAULT


def test_mprotect_takes_the_write_right_from_present_pages(engine: Engine) -> None:
    mm = AddressSpace(Frames("host", 100))
    vma = mm.mmap(2 * 4096, "a", READ | WRITE)
    touch(engine, mm, [vma.first], True)
    mm.mprotect(vma, READ)
    touch(engine, mm, [vma.first, vma.first + 1], False)
    with pytest.raises(DriverError, match="does not allow it"):
        touch(engine, mm, [vma.first], True)


def test_areas_start_where_alignment_and_offset_say() -> None:
    mm = AddressSpace(Frames("host", 100))
    mm.mmap(4096, "a")
    vma = mm.mmap(4096, "b", align=512, offset=224)
    assert vma.first % 512 == 224
    with pytest.raises(DriverError, match="length 0"):
        mm.mmap(0, "c")


def test_a_process_without_memory_faults_too() -> None:
    with pytest.raises(DriverError, match="in no area"):
        Process().touch([5])
