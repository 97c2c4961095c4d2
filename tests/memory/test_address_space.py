"""Areas, first touch, protection and faults of a process's CPU side."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kit.errors import DriverError
from kit.memory.address_space import MMAP_BASE, READ, WRITE, AddressSpace, Vma
from kit.memory.frames import Frames
from kit.sim.engine import Engine, Thread, Wait

PAGE = 4096


class Process:
    """An address space with a thread in it."""

    def __init__(self, frames: int = 1000) -> None:
        self.engine = Engine()
        self.mm = AddressSpace(Frames("host memory", frames))
        self.thread = self.engine.thread("cpu")
        self.written: list[int] = []

    def touch(self, pages: Sequence[int], write: bool = False) -> None:
        work = self.mm.touch(self.thread, np.array(pages), np.full(len(pages), write), 0.5, self.written.extend)
        self.engine.run(self.engine.start(work))

    def rights(self, vma: Vma) -> list[int]:
        return self.mm.table.window(vma.slot, vma.pages).tolist()


def test_mapping_populates_nothing_and_touching_populates_what_is_touched() -> None:
    p = Process()
    vma = p.mm.mmap(10 * PAGE - 5, "heap")
    assert (vma.pages, vma.first * PAGE, p.mm.frames.used) == (10, MMAP_BASE, 0)
    p.touch([vma.first + 2, vma.first + 7, vma.first + 2], write=True)
    assert p.mm.frames.used == 2
    assert p.rights(vma) == [0, 0, WRITE, 0, 0, 0, 0, WRITE, 0, 0]
    assert p.written == [vma.first + 2, vma.first + 7, vma.first + 2]


def test_areas_are_rounded_aligned_and_apart() -> None:
    p = Process()
    odd = p.mm.mmap(1, "odd")
    block = p.mm.mmap(5 * PAGE, "block", align=512, offset=3)
    assert (odd.pages, block.first % 512, block.pages) == (1, 3, 5)
    assert p.mm.find(block.first) is block and p.mm.find(block.end) is None and p.mm.find(block.first - 1) is not block
    with pytest.raises(DriverError, match="length 0") as error:
        p.mm.mmap(0, "nothing")
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("write", [False, True])
def test_a_touch_outside_every_area_is_a_segmentation_fault(write: bool) -> None:
    p = Process()
    vma = p.mm.mmap(PAGE, "heap")
    with pytest.raises(DriverError, match=f"{vma.end * PAGE:#x}: in no area") as error:
        p.touch([vma.first, vma.end], write)
    assert error.value.errno == errno.EFAULT
    assert p.mm.frames.used == 1  # what came before it happened


def test_a_process_without_memory_faults_too() -> None:
    with pytest.raises(DriverError, match="in no area"):
        Process().touch([5])


def test_a_right_that_the_area_lacks_is_a_segmentation_fault() -> None:
    p = Process()
    vma = p.mm.mmap(4 * PAGE, "constants", prot=READ)
    p.touch([vma.first])
    assert p.rights(vma)[0] == READ
    with pytest.raises(DriverError, match="constants does not allow it"):
        p.touch([vma.first], write=True)
    p.mm.mprotect(vma, 0)
    with pytest.raises(DriverError, match="constants does not allow it"):
        p.touch([vma.first])


def test_mprotect_takes_the_write_right_from_present_pages() -> None:
    p = Process()
    vma = p.mm.mmap(2 * PAGE, "heap")
    p.touch([vma.first], write=True)
    p.mm.mprotect(vma, READ)
    p.touch([vma.first, vma.first + 1])
    with pytest.raises(DriverError, match="does not allow it"):
        p.touch([vma.first], write=True)


@pytest.mark.parametrize("without", [READ, 0])
def test_rights_taken_away_come_back_without_losing_the_page(without: int) -> None:
    p = Process()
    vma = p.mm.mmap(4 * PAGE, "heap")
    p.touch([vma.first], write=True)
    frame = int(p.mm.table.lookup(np.array([vma.first]))[1][0])
    p.mm.mprotect(vma, without)
    assert p.rights(vma)[0] == without
    p.mm.mprotect(vma, READ | WRITE)
    p.touch([vma.first], write=True)
    assert int(p.mm.table.lookup(np.array([vma.first]))[1][0]) == frame
    assert p.mm.frames.used == 1
    p.mm.mprotect(vma, 0)
    p.mm.munmap(vma)
    assert p.mm.frames.used == 0


def test_unmapped_memory_is_gone() -> None:
    p = Process()
    vma, other = p.mm.mmap(8 * PAGE, "a"), p.mm.mmap(8 * PAGE, "b")
    p.touch([*range(vma.first, vma.end), other.first], write=True)
    p.mm.munmap(vma)
    assert p.mm.frames.used == 1 and p.mm.find(vma.first) is None
    with pytest.raises(DriverError, match="in no area"):
        p.touch([vma.first])
    p.touch([other.first])


def test_running_out_of_frames_is_an_error_that_names_the_memory() -> None:
    p = Process(frames=3)
    vma = p.mm.mmap(8 * PAGE, "heap")
    with pytest.raises(DriverError, match="host memory has no 1 frames left"):
        p.touch(range(vma.first, vma.end), write=True)


def test_a_drivers_area_asks_the_driver() -> None:
    p, asked = Process(), []

    def fault(thread: Thread, page: int, write: bool) -> Wait:
        asked.append((page - vma.first, write))
        thread.charge(10.0)
        p.mm.table.map(vma.slot + page - vma.first, 4, 0, WRITE if write else READ)
        yield from thread.sync()

    vma = p.mm.mmap(8 * PAGE, "managed", fault=fault)
    p.touch([vma.first + at for at in range(8)])
    p.touch([vma.first + at for at in range(8)], write=True)
    assert asked == [(0, False), (4, False), (0, True), (4, True)]
    assert p.thread.now == pytest.approx(4 * 10 + 16 * 0.5)
    assert p.mm.frames.used == 0


def test_time_is_charged_for_every_access() -> None:
    p = Process()
    vma = p.mm.mmap(100 * PAGE, "heap")
    p.touch(list(range(vma.first, vma.end)) * 3)
    assert p.thread.now == pytest.approx(300 * 0.5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 699), st.booleans()), max_size=80))
def test_touches_against_a_set(touches: list[tuple[int, int, bool]]) -> None:
    p = Process(frames=5000)
    areas = [p.mm.mmap(700 * PAGE, str(number)) for number in range(3)]
    for area, page, write in touches:
        p.touch([areas[area].first + page], write)
    seen = {(area, page) for area, page, _ in touches}
    assert p.mm.frames.used == len(seen)
    for number, area in enumerate(areas):
        assert {page for page, right in enumerate(p.rights(area)) if right} == {page for a, page in seen if a == number}
    frames = p.mm.table.lookup(np.array(sorted(areas[a].first + page for a, page in seen), dtype=np.int64))[1]
    assert len(set(frames.tolist())) == len(seen)
