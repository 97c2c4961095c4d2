"""Where a faulting page goes, rule by rule, and what advice and prefetch calls do."""

from __future__ import annotations

import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.perf_thrashing_state import BlockThrashing, PageThrashing
from kit.drivers.uvm.types import (
    ATOMIC_STRONG,
    CPU,
    GPU,
    READ,
    READ_ONLY,
    READ_WRITE,
    READ_WRITE_ATOMIC,
    WRITE,
    VaBlock,
    VaRange,
)
from kit.drivers.uvm.va_range import uvm_va_range_block_create
from kit.errors import DriverError
from kit.memory.table.pagemask import EMPTY, bit, holds, region


def ready(advice: str = "", where: str = "C", **module: object) -> tuple[Harness, VaRange, VaBlock]:
    """A full block, resident where asked (C, G, or . nowhere), then advised; prefetch off unless asked for."""
    h = Harness(**{"prefetch_enable": False, "thrashing_enable": False, **module})
    r = h.allocate(512)
    if where == "C":
        h.touch(pages(r, range(512)))
    elif where == "G":
        h.kernel(pages(r, range(512)), lanes=512)
    if advice:
        h.advise(advice, r.first, 512)
    return h, r, uvm_va_range_block_create(r, h.cpu, r.first)


def rights(block: VaBlock, processor: int, page: int) -> int:
    return sum(holds(block.pte[processor][prot], page) for prot in (READ_ONLY, READ_WRITE, READ_WRITE_ATOMIC))


def block_of(r: VaRange) -> VaBlock:
    return r.blocks[r.first // 512]


# The rules of section 3.1, in their order (3, 5 and 11 are about HMM and about other processes).


@pytest.mark.parametrize("access", [READ, WRITE, ATOMIC_STRONG])
def test_rule_1_forced_to_system_memory(access: int) -> None:
    h, r, _ = ready("preferred_gpu", ".", fault_force_sysmem=True)
    h.touch(pages(r, [7]), False)
    assert h.kernel(pages(r, [7, 3]), access) is None
    assert h.where(r)[:9] == "...C...C." and h.copies() == []
    assert rights(block_of(r), GPU, 7) >= access - 1
    h.check()


def test_rule_2_reads_are_duplicated() -> None:
    h, r, block = ready("read_mostly")
    h.kernel(pages(r, [5]), READ)
    assert h.where(r)[4:7] == "CDC"
    assert (rights(block, CPU, 5), rights(block, GPU, 5)) == (1, 1)
    assert h.count("UvmEventTypeReadDuplicate") == 1
    h.check()


@pytest.mark.parametrize(("writer", "left"), [("gpu", "G"), ("cpu", "C")])
def test_rule_3_a_write_collapses_duplicates(writer: str, left: str) -> None:
    h, r, block = ready("read_mostly")
    h.kernel(pages(r, [5]), READ)
    copies = len(h.copies())
    h.kernel(pages(r, [5]), WRITE) if writer == "gpu" else h.touch(pages(r, [5]), True)
    assert h.where(r)[5] == left and not block.read_duplicated
    assert len(h.copies()) == copies, "the writer has a copy already"
    assert h.count("UvmEventTypeReadDuplicateInvalidate") == 1
    h.check()


def test_rule_4_the_preferred_location_always_migrates() -> None:
    h, r, _ = ready("preferred_gpu")
    h.advise("accessed_by_gpu", r.first, 512)  # would keep it remote otherwise
    h.advise("unaccessed_by_gpu", r.first, 512)
    h.kernel(pages(r, [5]), READ)
    assert h.where(r)[5] == "C" and rights(block_of(r), GPU, 5) == 2  # mapped by accessed-by, so no fault at all
    h, r, _ = ready("accessed_by_gpu", "C")
    h.advise("preferred_gpu", r.first, 512)  # removes the remote mappings
    h.kernel(pages(r, [5]), READ)
    assert h.where(r)[5] == "G"


def test_rule_6_a_pinned_page_goes_where_it_is_pinned() -> None:
    h, r, block = ready(thrashing_enable=True)
    info = block.thrashing = BlockThrashing()
    info.page = PageThrashing(512)
    info.pages = info.pinned = bit(5)
    info.page.pin_residency[5], info.page.processors[5], info.page.events[5] = CPU, 3, 3
    info.page.do_not_throttle[5] = 1 - GPU
    info.page.throttle_end[5] = h.engine.now + 1e6
    h.kernel(pages(r, [5, 6]), WRITE)
    assert h.where(r)[5:7] == "CG"
    assert rights(block, GPU, 5) == 2 and [s["cause"] for s in h.spans("UvmEventTypeMapRemote")] == ["thrashing"]


@pytest.mark.parametrize(
    ("advice", "toucher", "expected"),
    [
        ("", "gpu", "G"),
        ("", "cpu", "C"),
        ("preferred_cpu", "gpu", "C"),
        ("preferred_gpu", "gpu", "G"),
        ("preferred_gpu", "cpu", "C"),
    ],
)
def test_rule_7_first_touch(advice: str, toucher: str, expected: str) -> None:
    h, r, _ = ready(advice, ".")
    h.kernel(pages(r, [5]), WRITE) if toucher == "gpu" else h.touch(pages(r, [5]))
    assert h.where(r)[5] == expected
    assert h.copies() == []
    h.check()


def test_rule_8_accessed_by_stays_and_maps() -> None:
    h, r, _ = ready("accessed_by_gpu", ".")
    h.touch(pages(r, [5]), True)
    faults = h.count("UvmEventTypeGpuFault")
    assert rights(block_of(r), GPU, 5) == 2, "mapped by the first touch"
    h.kernel(pages(r, [5]), WRITE)
    assert h.count("UvmEventTypeGpuFault") == faults
    h.kernel(
        pages(r, [5]), ATOMIC_STRONG
    )  # PCIe has no native atomics: the GPU faults, and the CPU loses its write right
    assert h.count("UvmEventTypeGpuFault") == faults + 1
    assert h.where(r)[5] == "C" and (rights(block_of(r), GPU, 5), rights(block_of(r), CPU, 5)) == (3, 1)
    h.check()


def test_rule_10_what_the_faulter_lacks_goes_to_the_preferred_location() -> None:
    h, r, _ = ready("preferred_cpu", "C")
    h.kernel(pages(r, [5]), WRITE)
    assert h.where(r)[5] == "C" and [s["cause"] for s in h.spans("UvmEventTypeMapRemote")] == ["policy"]
    h, r, _ = ready("preferred_cpu", "G")
    h.kernel(pages(r, [5]), WRITE)
    assert h.where(r)[5] == "G", "resident with the faulter, there is no fault"


def test_rule_12_otherwise_it_migrates() -> None:
    for access in (READ, WRITE, ATOMIC_STRONG):
        h, r, block = ready()
        h.kernel(pages(r, [5]), access)
        assert h.where(r)[5] == "G" and rights(block, GPU, 5) == 3 and rights(block, CPU, 5) == 0
    h, r, block = ready(where="G")
    h.touch(pages(r, [5]), False)
    assert h.where(r)[5] == "C" and rights(block, CPU, 5) == 3 and rights(block, GPU, 5) == 0
    assert h.count("UvmEventTypeMapRemote") == 0


def test_destinations_of_one_service_finish_one_by_one_the_cpu_first() -> None:
    h, r, block = ready("accessed_by_gpu", "C", prefetch_enable=True)
    h.advise("unaccessed_by_gpu", r.first, 512)
    block.pte[GPU] = [EMPTY] * 4
    h.gpu.table.unmap(block.slot[GPU], 512)
    h.advise("preferred_gpu", r.first, 512)
    h.advise("unpreferred_gpu", r.first, 512)
    info = block.thrashing = BlockThrashing()
    info.page = PageThrashing(512)
    object.__setattr__(h.module, "thrashing_enable", True)
    info.pages = info.pinned = bit(5)
    info.page.pin_residency[5], info.page.processors[5], info.page.events[5] = CPU, 3, 3
    info.page.do_not_throttle[5], info.page.throttle_end[5] = CPU, h.engine.now + 1e6
    h.faults(pages(r, [5, 100]))
    copied = [s["start"] for s in h.spans("uvm_va_block_service_copy")][-2:]
    finished = [s["end"] for s in h.spans("uvm_va_block_service_finish")][-2:]
    assert copied[0] <= finished[0] <= copied[1] <= finished[1]
    (remote,), copy = h.spans("UvmEventTypeMapRemote")[-1:], h.spans("UvmEventTypeMigration")[-1]
    assert int(remote["va"]) // 4096 - r.first == 5 and int(copy["va"]) // 4096 - r.first == 100
    assert remote["start"] < copy["start"], "the CPU's page is mapped before the GPU's is copied"
    assert h.where(r)[5] == "C" and h.where(r)[100] == "G"
    assert h.where(r).count("G") == 1, "two destinations: nothing is prefetched"


# Advice


def test_preferred_location_moves_nothing_and_removes_its_remote_mappings() -> None:
    h, r, block = ready("accessed_by_gpu")
    assert block.mapped(GPU) == block.all_pages
    copies = len(h.copies())
    h.advise("preferred_gpu", r.first, 512)
    assert not block.mapped(GPU) and h.where(r) == "C" * 512 and len(h.copies()) == copies
    h.advise("preferred_cpu", r.first, 512)  # the old location is accessed-by: it may map remotely again
    assert block.mapped(GPU) == block.all_pages
    h.check()


@pytest.mark.parametrize("advice", ["preferred_cpu", "unpreferred_gpu"])
def test_a_change_of_preferred_location_waits_for_the_blocks_work(advice: str) -> None:
    h, r, block = ready("preferred_gpu", "G")
    block.tracker = h.engine.now + 500
    h.advise(advice, r.first, 512)
    assert h.engine.now == block.tracker
    h.check()


def test_accessed_by_maps_now_and_after_every_move() -> None:
    h, r, block = ready()
    h.advise("accessed_by_gpu", r.first, 512)
    assert block.pte[GPU][READ_WRITE] == block.all_pages and not block.pte[GPU][READ_WRITE_ATOMIC]
    h.prefetch(r.first, 512, GPU)
    assert block.pte[GPU][READ_WRITE_ATOMIC] == block.all_pages and not block.mapped(CPU)
    h.touch(pages(r, [9]), False)
    assert rights(block, GPU, 9) == 2 and h.where(r)[9] == "C"
    assert h.kernel(pages(r, range(512)), WRITE) is None
    assert h.count("UvmEventTypeGpuFault") == 0
    h.check()


def test_accessed_by_maps_evicted_pages_again() -> None:
    h = Harness(roots=1)
    r, other = h.allocate(512), h.allocate(512)
    h.advise("accessed_by_gpu", r.first, 512)
    h.kernel(pages(r, range(512)))
    h.kernel(pages(other, [0]))
    h.settle()
    block = block_of(r)
    # Mapped by nobody else, the GPU may even have atomics.
    assert h.where(r) == "C" * 512 and block.pte[GPU][READ_WRITE_ATOMIC] == block.all_pages
    h.touch(pages(r, range(512)), True)
    assert not block.pte[GPU][READ_WRITE_ATOMIC] & block.pte[CPU][READ_WRITE]
    h.check()


def test_the_cpu_cannot_be_mapped_to_gpu_memory() -> None:
    h, r, block = ready("accessed_by_cpu", "G")
    assert not block.mapped(CPU)
    h.touch(pages(r, [3]), False)
    assert h.where(r)[3] == "C"


def test_read_mostly_on_copies_nothing_and_takes_rights() -> None:
    h, r, block = ready("accessed_by_gpu")
    copies = len(h.copies())
    h.advise("read_mostly", r.first, 512)
    assert not block.mapped(GPU) and block.pte[CPU][READ_ONLY] == block.all_pages and not block.pte[CPU][READ_WRITE]
    assert len(h.copies()) == copies and h.where(r) == "C" * 512
    h.kernel(pages(r, range(100)), READ, lanes=100)
    assert h.where(r) == "D" * 100 + "C" * 412
    h.check()
    h.advise("unread_mostly", r.first, 512)
    assert h.where(r) == "C" * 512, "the lowest processor's copy survives"
    assert block.mapped(GPU) == block.all_pages, "accessed-by mappings return"
    h.check()


def test_a_write_before_the_right_to_it_is_gone_is_in_both_copies() -> None:
    """The GPU writes while the push that takes its right is still to be executed, and the copy is behind that push."""
    h = Harness(roots=1, architecture="pascal")
    r = h.allocate(5)
    h.advise("read_mostly", r.first, 5)
    h.kernel([r.first], READ)
    h.prefetch(r.first, 1, CPU)
    h.advise("read_mostly", r.first, 1)
    kernel = h.stream([r.first] * 3, WRITE, lanes=7)
    h.beside(kernel, h.touching([r.first], False), h.prefetching(r.first, 5, CPU))
    copy = [s for s in h.spans("UvmEventTypeMigration") if int(s["va"]) // 4096 == r.first][-1]
    assert copy["start"] > h.spans("gpu_stall")[-1]["end"], "it was written before it was copied"
    assert h.where(r) == "D" * 5
    h.check()


def test_read_mostly_off_prefers_the_preferred_locations_copy() -> None:
    h, r, _ = ready("read_mostly")
    h.kernel(pages(r, [0, 1]), READ)
    h.advise("preferred_gpu", r.first, 512)
    h.advise("unread_mostly", r.first, 512)
    assert h.where(r)[:3] == "GGC"
    h.check()


def test_read_mostly_prefetch_calls_duplicate() -> None:
    h, r, _ = ready("read_mostly")
    h.prefetch(r.first, 512, GPU)
    assert h.where(r) == "D" * 512 and h.kib("HtoD") == [2048]
    h.prefetch(r.first, 512, CPU)
    assert h.kib("DtoH") == []
    h.check()


def test_read_mostly_faults_fetch_and_duplicate_what_is_there_and_populate_what_is_not() -> None:
    h = Harness(thrashing_enable=False)
    r = h.allocate(512)
    h.advise("read_mostly", r.first, 512)
    h.touch(pages(r, [2, 3]), True)  # fetches 64 KiB
    h.touch(pages(r, [40]), True)
    h.kernel(pages(r, [20]), READ)
    h.kernel(pages(r, [0]), READ)
    assert h.where(r)[:48] == "D" * 16 + "G" * 16 + "C" * 16
    h.check()


def test_eviction_drops_duplicates_without_a_copy() -> None:
    h = Harness(roots=1, thrashing_enable=False)
    r, other = h.allocate(512), h.allocate(512)
    h.advise("read_mostly", r.first, 512)
    h.touch(pages(r, range(512)))
    h.kernel(pages(r, range(512)), READ)
    h.kernel(pages(other, [0]))
    assert h.where(r) == "C" * 512 and h.kib("DtoH") == []
    h.check()


def test_advice_to_a_part_splits_the_range_there() -> None:
    h = Harness()
    r = h.allocate(512)
    h.advise("preferred_cpu", r.first + 96, 208)
    assert [(part.first - r.vma.first, part.pages) for part in h.space.ranges] == [(0, 96), (96, 208), (304, 208)]
    h.kernel([r.vma.first + at for at in range(0, 512, 10)])
    assert h.where(r) == "G" * 96 + "C" * 208 + "G" * 208
    h.check()
    with pytest.raises(DriverError, match="managed memory") as error:
        h.advise("read_mostly", r.vma.first, 600)
    assert error.value.errno == 22


# cudaMemPrefetchAsync


def test_a_prefetch_call_moves_whole_blocks_and_leaves_no_faults() -> None:
    h = Harness()
    r = h.allocate(2048)
    h.touch(pages(r, range(2048)))
    h.prefetch(r.first, 2048, GPU)
    assert [c for c in h.copies() if c[0] == "HtoD"] == [("HtoD", 512 * at, 512, "user") for at in range(4)]
    h.kernel(pages(r, range(2048)), ATOMIC_STRONG)
    assert h.count("UvmEventTypeGpuFault") == 0
    h.prefetch(r.first, 2048, CPU)
    faults = h.count("UvmEventTypeCpuFault")
    h.touch(pages(r, range(2048)), True)
    assert h.count("UvmEventTypeCpuFault") == faults
    assert [c[2] for c in h.copies() if c[0] == "DtoH"] == [512] * 4
    h.check()


def test_a_prefetch_call_is_clipped_and_fetches_nothing_more() -> None:
    h = Harness()
    r = h.allocate(1024)
    h.touch(pages(r, range(1024)))
    h.prefetch(r.first + 500, 30, GPU)
    assert h.where(r) == "C" * 500 + "G" * 30 + "C" * 494
    assert h.copies() == [("HtoD", 500, 12, "user"), ("HtoD", 512, 18, "user")]


def test_several_blocks_are_copied_first_and_mapped_afterwards() -> None:
    h = Harness()
    r = h.allocate(1024)
    h.touch(pages(r, range(1024)))
    h.prefetch(r.first, 1024, GPU)
    mapped = [s["start"] for s in h.spans("block_migrate_map_unmapped_pages")]
    assert len(mapped) == 2 and min(mapped) >= max(s["start"] for s in h.spans("block_copy_resident_pages_between"))
    single, r = Harness(), None
    r = single.allocate(512)
    single.prefetch(r.first, 512, GPU)
    assert single.count("uvm_va_block_migrate_locked") == 1


def test_prefetching_untouched_memory_populates_without_a_record() -> None:
    h = Harness()
    r = h.allocate(512)
    h.prefetch(r.first, 512, GPU)
    assert h.where(r) == "G" * 512 and h.copies() == []


def test_a_prefetch_call_evicts() -> None:
    h = Harness(roots=2)
    r = h.allocate(2048)
    h.touch(pages(r, range(2048)))
    h.prefetch(r.first, 2048, GPU)
    assert h.where(r) == "C" * 1024 + "G" * 1024
    h.check()


@pytest.mark.parametrize("first_touch", [CPU, GPU])
def test_freed_memory_is_free(first_touch: int) -> None:
    h = Harness(roots=2)
    r = h.allocate(1100, offset=30)
    h.touch(pages(r, range(1100))) if first_touch == CPU else h.kernel(pages(r, range(1100)), lanes=64)
    h.advise("preferred_cpu", r.first, 482)
    h.free(r)
    assert h.host.used == 0 and not h.space.ranges and not h.blocks()
    h.check()
    again, evictions = h.allocate(1024), h.gpu.pmm.evictions
    h.kernel(pages(again, range(1024)), lanes=64)
    assert h.gpu.pmm.evictions == evictions
    h.check()


def test_rights_are_nested_regions() -> None:
    h, r, block = ready()
    h.kernel(pages(r, range(16, 32)), READ, lanes=16)
    assert block.pte[GPU][READ_WRITE_ATOMIC] == region(16, 16)
