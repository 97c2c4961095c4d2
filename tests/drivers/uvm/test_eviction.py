"""Oversubscription: who goes, what is copied, what starts again, and what happens when nothing can go."""

from __future__ import annotations

import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.types import CPU, GPU, READ, VaRange
from kit.errors import DriverError
from kit.memory.table.pagemask import EMPTY
from kit.sim.engine import Wait


def filled(roots: int, blocks: int, **module: object) -> tuple[Harness, list[VaRange]]:
    """Full blocks as ranges of their own, written by the CPU."""
    h = Harness(roots=roots, thrashing_enable=False, **module)
    ranges = [h.allocate(512) for _ in range(blocks)]
    for r in ranges:
        h.touch(pages(r, range(512)))
    return h, ranges


def on_gpu(h: Harness, ranges: list[VaRange]) -> str:
    return "".join("G" if "G" in h.where(r) else "c" for r in ranges)


def test_the_least_recently_serviced_into_goes_first_and_hits_do_not_count() -> None:
    h, ranges = filled(3, 5)
    for r in ranges[:3]:
        h.kernel(pages(r, range(512)))
    h.kernel(pages(ranges[0], range(512)), READ)  # no fault: refreshes nothing
    h.kernel(pages(ranges[3], [0]))
    assert on_gpu(h, ranges) == "cGGGc"
    h.kernel(pages(ranges[4], [0]))
    assert on_gpu(h, ranges) == "ccGGG"
    h.check()


def test_a_service_refreshes() -> None:
    h, ranges = filled(3, 4)
    h.kernel(pages(ranges[0], [0]))
    for r in ranges[1:3]:
        h.kernel(pages(r, range(512)))
    h.kernel(pages(ranges[0], [300]))  # a fault in the oldest block
    h.kernel(pages(ranges[3], [0]))
    assert on_gpu(h, ranges) == "GcGG"


def test_a_prefetch_call_refreshes_even_when_nothing_moves() -> None:
    h, ranges = filled(2, 3)
    for r in ranges[:2]:
        h.prefetch(r.first, 512, GPU)
    h.prefetch(ranges[0].first, 512, GPU)
    h.prefetch(ranges[2].first, 512, GPU)
    assert on_gpu(h, ranges) == "GcG"


def test_a_read_duplication_refreshes() -> None:
    h, ranges = filled(2, 3)
    h.advise("read_mostly", ranges[0].first, 512)
    h.kernel(pages(ranges[0], [0]), READ)
    h.kernel(pages(ranges[1], [0]))
    h.kernel(pages(ranges[0], [100]), READ)  # a copy more
    h.kernel(pages(ranges[2], [0]))
    assert ["G" in h.where(r) or "D" in h.where(r) for r in ranges] == [True, False, True]


def test_unused_goes_before_used_and_without_a_copy() -> None:
    h, ranges = filled(3, 4)
    for r in ranges[:3]:
        h.kernel(pages(r, range(512)))
    h.touch(pages(ranges[1], range(512)))  # everything home: its chunk holds nothing
    before = len(h.copies())
    h.kernel(pages(ranges[3], [0]))
    assert on_gpu(h, ranges) == "GcGG"
    assert not [c for c in h.copies()[before:] if c[3] == "eviction"]
    assert h.gpu.pmm.evictions == 1


def test_only_resident_pages_are_written_back_and_clean_ones_too() -> None:
    h, ranges = filled(1, 2)
    h.kernel(pages(ranges[0], [0]), READ)  # 64 KiB, only read
    before = len(h.copies())
    h.kernel(pages(ranges[1], [0]))
    assert [c for c in h.copies()[before:] if c[0] == "DtoH"] == [("DtoH", 0, 16, "eviction")]
    assert h.where(ranges[0]) == "C" * 512


def test_pages_never_on_the_cpu_get_memory_there() -> None:
    h = Harness(roots=1)
    one, two = h.allocate(512), h.allocate(512)
    h.kernel(pages(one, range(512)))
    assert h.host.used == 0
    h.kernel(pages(two, [0]))
    assert h.where(one) == "C" * 512 and h.host.used == 512
    h.check()


def test_evicted_pages_are_unmapped_and_fault_on_the_cpu() -> None:
    h, ranges = filled(1, 2)
    h.kernel(pages(ranges[0], range(512)))
    h.kernel(pages(ranges[1], [0]))
    block = ranges[0].blocks[ranges[0].first // 512]
    assert not block.mapped(CPU) | block.mapped(GPU)
    faults, copies = h.count("UvmEventTypeCpuFault"), len(h.copies())
    h.touch(pages(ranges[0], range(512)), False)
    # Resident here already, but not mapped: the tree sees it full and maps the whole block at once.
    assert h.count("UvmEventTypeCpuFault") == faults + 1 and len(h.copies()) == copies


def test_a_restart_counts_nothing_twice() -> None:
    h, ranges = filled(1, 2)
    h.kernel(pages(ranges[0], [0]))
    before = {step: h.count(step) for step in ("service_fault_batch_block_locked", "update_batch_and_notify_fault")}
    groups = h.count("UvmEventTypeGpuFault")
    h.kernel(pages(ranges[1], [5, 5, 100]), lanes=3)
    assert h.count("service_fault_batch_block_locked") - before["service_fault_batch_block_locked"] == 2
    assert h.count("update_batch_and_notify_fault") - before["update_batch_and_notify_fault"] == 1
    assert h.count("UvmEventTypeGpuFault") == groups + 1
    assert h.spans("UvmEventTypeGpuFault")[-1]["pages"] == 2


def test_a_short_blocks_chunk_keeps_its_neighbours_until_the_root_goes() -> None:
    h = Harness(roots=2, thrashing_enable=False)
    short = [h.allocate(100) for _ in range(4)]
    whole = [h.allocate(512) for _ in range(2)]
    for r in [*short, *whole]:
        h.touch(pages(r, range(r.pages)))
    for r in short:
        h.prefetch(r.first, 100, GPU)
    assert len({c.root for b in h.blocks() for c in b.gpu_chunks.values()}) == 1
    h.kernel(pages(whole[0], [0]))
    before = len(h.copies())
    h.kernel(pages(whole[1], [0]))
    gone = [c for c in h.copies()[before:] if c[3] == "eviction"]
    assert [(c[1], c[2]) for c in gone] == [(r.first - short[0].first, 100) for r in short]
    h.check()


def test_out_of_gpu_memory_kills_and_does_not_map_remotely() -> None:
    h = Harness(roots=1)
    r = h.allocate(511)  # 31 chunks of 64 KiB and 15 of 4 KiB: one root chunk holds no more than 31 and 16
    h.touch(pages(r, range(511)))
    other = h.allocate(511)
    h.touch(pages(other, range(511)))
    h.gpu.pmm.used.clear()
    h.kernel(pages(r, range(511)))
    root = next(iter(h.gpu.pmm.used))
    del h.gpu.pmm.used[root]
    root.pins += 1  # somebody holds the only chunk
    assert h.kernel(pages(other, [0])) == "OutOfMemory"
    assert h.count("UvmEventTypeMapRemote") == 0 and set(h.where(other)) == {"C"}
    assert [row["cause"] for row in h.spans("UvmEventTypeFatalFault")] == ["OutOfMemory"]
    root.pins -= 1
    h.gpu.pmm.mark_used(root)
    h.check()
    assert h.kernel(pages(other, [0])) is None  # and the driver goes on
    h.check()


@pytest.mark.parametrize("sizes", [[512, 512], [100, 100, 512]])
def test_no_host_memory_for_the_victim_is_out_of_memory_and_loses_nothing(sizes: list[int]) -> None:
    h = Harness(roots=1, host_pages=150, cpu_chunk_allocation_sizes="4K")
    ranges = [h.allocate(count) for count in sizes]
    for r in ranges[:-1]:
        h.kernel(pages(r, range(r.pages)))
    assert h.kernel(pages(ranges[-1], [0])) == "OutOfMemory"
    # The first short block could still go; what could not stays, evictable, and everybody else lives on.
    assert "".join(h.where(r)[0] for r in ranges) == {2: "G.", 3: "CG."}[len(sizes)]
    assert len(h.gpu.pmm.used) == 1
    h.check()
    h.free(ranges[-2])
    assert h.kernel(pages(ranges[-1], [0])) is None
    h.check()


@pytest.mark.parametrize("sizes", ["4K+64K+2M", "4K+2M", "4K+64K"])
def test_host_memory_that_is_nearly_full_is_populated_in_smaller_chunks(sizes: str) -> None:
    h = Harness(host_pages=600, cpu_chunk_allocation_sizes=sizes)
    one, two = h.allocate(512), h.allocate(512)
    h.touch(pages(one, range(512)))
    h.touch(pages(two, [0, 20, 40]))
    h.check()
    with pytest.raises(DriverError, match="host memory has no") as error:
        h.touch(pages(two, range(512)))
    assert error.value.errno == 12
    h.check()


def test_memory_freed_while_its_chunk_is_being_evicted_has_one_owner() -> None:
    h, ranges = filled(1, 2)
    h.kernel(pages(ranges[0], range(512)))
    block = ranges[0].blocks[ranges[0].first // 512]
    other = h.engine.thread("other")

    def holding() -> Wait:
        yield from block.lock.acquire(other)
        other.charge(500.0)
        yield from block.lock.release(other)

    def freeing() -> Wait:
        yield h.engine.env.timeout(400.0)
        h.space.ranges.remove(ranges[0])  # the block dies while the evicting thread waits for its lock
        h.gpu.pmm.free(other, block.gpu_chunks.pop(0))
        h.space.ranges.insert(0, ranges[0])
        block.frames[GPU][:] = -1
        block.resident[GPU] = EMPTY

    h.engine.start(holding())
    h.engine.start(freeing())
    h.space.content.forget(ranges[0].slot, 512)
    h.kernel(pages(ranges[1], [0]))
    root = ranges[1].blocks[ranges[1].first // 512].gpu_chunks[0].root
    assert h.gpu.pmm.pma_returned == [] and root not in h.gpu.pmm.free_dirty
    assert [chunk.block for chunk in root.owners.values()] == [ranges[1].blocks[ranges[1].first // 512]]


def test_pieces_of_a_chunk_in_eviction_are_not_handed_out() -> None:
    h = Harness(roots=2, thrashing_enable=False)
    short, other, whole = h.allocate(40), h.allocate(60), h.allocate(512)
    for r in (short, other, whole):
        h.touch(pages(r, range(r.pages)))
    h.kernel(pages(short, [0]))
    h.kernel(pages(whole, [0]))
    third = h.allocate(512)
    # The kernel evicts the split root chunk while the CPU asks for more of its pieces.
    h.beside(h.stream(pages(third, [0])), h.prefetching(other.first, 60, GPU))
    h.check()


def test_only_a_full_device_evicts() -> None:
    h, ranges = filled(4, 4)
    for r in ranges:
        h.kernel(pages(r, [0]))
    assert h.gpu.pmm.evictions == 0
    with pytest.raises(DriverError, match="every root chunk is pinned or in eviction"):
        h.gpu.pmm.used.clear()
        h.run(h.gpu.pmm.pick_and_evict_root_chunk(h.cpu))
