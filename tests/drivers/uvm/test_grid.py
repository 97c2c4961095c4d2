"""A grid's warps: an access is made once, and loops over more than fits in memory end."""

from __future__ import annotations

import numpy as np
import pytest

import kit
from kit.drivers.uvm.grid_accesses import GridAccesses, Shape
from kit.memory.physical.content import Content
from kit.memory.table.pagetable import GEOMETRIES, PageTable

LANES = np.arange(2)
MIB = 1 << 20


class Warps:
    """Two warps on page 0 and page 1 of two arrays that are read, the second also written."""

    def __init__(self) -> None:
        self.table = PageTable(GEOMETRIES["pascal"])
        slot = self.table.reserve(0, 4)
        self.accesses = GridAccesses(Shape(2048, 1, 64, (0, 8192), (8192,)), self.table, 2)
        self.content = Content()
        self.content.grow(slot + 4)
        self.page = slice(slot, slot + 4)  # x 0, x 1, y 0, y 1
        self.offset = LANES * 4096

    def wait(self, *rights: int) -> int:
        """Let both warps make what these rights of the four pages allow."""
        self.table.rights[self.page] = rights
        return self.accesses.wait(LANES, self.offset, self.table.rights, self.content)

    def passes(self, *rights: int) -> list[bool]:
        """Whether each warp's step can go through."""
        self.table.rights[self.page] = rights
        inside = np.ones((2, 1), dtype=bool)
        found = [
            self.accesses.granted(LANES, self.table.rights, self.offset[:, None], inside, kind)[:, 0] for kind in (1, 2)
        ]
        return (found[0] & found[1]).tolist()

    def made(self) -> list[str]:
        """The accesses that each warp has made: loads of x and y, store to y."""
        columns = [self.accesses.made(LANES, kind, turn) for kind, turn in ((1, 0), (1, 1), (2, 0))]
        return ["".join(np.array(list("xyY"))[[c[lane] for c in columns]]) for lane in LANES]

    @property
    def written(self) -> list[bool]:
        """Which of the four pages have been written."""
        return self.content.dirty[self.page].tolist()


def test_a_load_that_came_back_needs_its_page_no_more() -> None:
    warps = Warps()
    assert warps.wait(2, 0, 0, 2) == 2
    assert warps.made() == ["x", "y"], "the store waits for the other load"
    assert warps.passes(0, 2, 2, 0) == [True, False], "the second warp's store misses"
    assert warps.wait(0, 2, 2, 0) == 2
    assert warps.made() == ["xyY", "xy"]


def test_a_store_is_made_when_it_can_be_and_not_again() -> None:
    warps = Warps()
    warps.wait(2, 2, 1, 1)
    assert warps.made() == ["xy", "xy"] and not any(warps.written)
    warps.wait(0, 0, 2, 1)
    assert warps.written == [False, False, True, False]
    warps.content.dirty[:] = False
    ran = np.array([[True], [False]])
    warps.accesses.passed(LANES, warps.offset[:, None], ran, warps.content)
    assert not any(warps.written), "the page may have left since"
    assert warps.made() == ["", "xy"], "the next step starts from nothing"


def test_nothing_new_is_no_progress() -> None:
    warps = Warps()
    assert warps.wait(1, 1, 0, 0) == 2 and warps.wait(1, 1, 0, 0) == 0


@pytest.mark.parametrize("policy", [0, 1, 2, 3])
@pytest.mark.parametrize("arrays", [2, 3])
def test_a_loop_over_more_arrays_than_root_chunks_ends(arrays: int, policy: int) -> None:
    run = kit.run(
        "cuda_demand_paging", n=1 << 19, arrays=arrays, grid=64, block=256, gpu_memory_bytes=2 * MIB, seed=arrays,
        fault_replay_policy=policy, update="yes",
    )  # fmt: skip
    assert run.integrity.lost == 0 and not run.errors
    assert run.metrics["evictions"] >= arrays - 1


def test_one_root_chunk_and_one_warp_fault_once_for_each_access() -> None:
    run = kit.run("cuda_demand_paging", n=1 << 19, arrays=3, gpu_memory_bytes=2 * MIB)
    # c = a + b on 512 pages each; the root chunk holds one array's page at a time.
    assert run.metrics["gpu_fault_groups"] == 3 * 512
    assert run.integrity.lost == 0


@pytest.mark.parametrize("arrays", [2, 5])
@pytest.mark.parametrize("init", ["cpu", "gpu"])
def test_stores_to_read_mostly_arrays_end(init: str, arrays: int) -> None:
    """A prefetched page enters read duplication, which takes the write right that a neighbour's store had just got."""
    run = kit.run(
        "cuda_demand_paging", advice="read_mostly", update="yes", arrays=arrays, init=init, grid=64, block=256,
        n=1 << 18,
    )  # fmt: skip
    assert run.integrity.lost == 0 and not run.errors
