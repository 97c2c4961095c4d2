"""Before Pascal: whole ranges at launch, no GPU faults, no CPU access while a kernel runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from drivers.uvm.harness import Harness, pages

import kit
from kit.drivers.uvm.types import GPU, PREFETCH, READ_WRITE_ATOMIC, WRITE, VaRange
from kit.errors import DriverError
from kit.sim.engine import Wait


def ready(count: int = 512) -> tuple[Harness, VaRange]:
    h = Harness(architecture="kepler")
    return h, h.allocate(count)


def test_allocation_populates_and_maps_the_range_on_the_gpu() -> None:
    h, r = ready(600)
    assert h.where(r) == "G" * 600 and h.copies() == []
    assert all(block.pte[GPU][READ_WRITE_ATOMIC] == block.all_pages for block in h.blocks())
    h.check()


def test_the_first_cpu_writes_bring_data_home_with_the_tree() -> None:
    h, r = ready()
    h.touch(pages(r, range(512)))
    assert h.count("UvmEventTypeCpuFault") == 6
    assert h.kib("DtoH") == [4, 60, 4, 60, 4, 124, 4, 252, 4, 508, 4, 1020]
    assert all(block.mapped(GPU) == block.all_pages for block in h.blocks()), "GPU entries stay valid throughout"
    h.check()


def test_a_launch_moves_whole_written_blocks_in_one_record_each() -> None:
    h, r = ready(1600)
    h.touch(pages(r, range(1600)))
    h.kernel(pages(r, [0]))
    assert h.kib("HtoD") == [2048, 2048, 2048, 256]
    assert [c[3] for c in h.copies() if c[0] == "HtoD"] == ["coherence"] * 4
    assert h.where(r) == "G" * 1600
    assert h.count("UvmEventTypeGpuFault") == 0
    h.check()


def test_only_dirty_pages_are_copied() -> None:
    h, r = ready()
    h.touch(pages(r, range(512)), False)
    h.kernel(pages(r, range(512)))
    assert h.kib("HtoD") == [] and h.where(r) == "G" * 512, "read only: residency changes without a copy"
    h.touch(pages(r, range(512)), False)
    h.touch(pages(r, [3, 4, 5, 300]), True)
    h.kernel(pages(r, range(512)))
    assert h.kib("HtoD") == [12, 4]
    h.check()


def test_ranges_that_did_not_leave_home_cost_nothing() -> None:
    h, r = ready()
    other = h.allocate(512)
    h.touch(pages(r, [0]))
    visits = h.count("uvm_range_group_va_range_migrate_block_locked")
    h.kernel(pages(other, [0]))
    assert h.count("uvm_range_group_va_range_migrate_block_locked") == visits + 1


def test_cpu_access_while_a_kernel_runs_is_fatal_even_elsewhere() -> None:
    h, r = ready()
    other = h.allocate(512)
    h.touch(pages(other, [0]))

    def beside() -> Wait:
        running = h.engine.start(h.launching(h.stream(pages(r, list(range(512)) * 200))))
        while other.migratable:
            yield h.engine.env.timeout(10.0)
        yield h.engine.env.timeout(100.0)
        assert running.is_alive
        h.cpu.now = h.engine.now
        yield from h.touching(pages(other, [1, 100]), False)

    with pytest.raises(DriverError, match="NV_ERR_INVALID_OPERATION, SIGBUS") as error:
        h.engine.run(h.engine.start(beside()))
    assert error.value.errno == 14


def test_the_flag_is_up_only_while_kernels_run() -> None:
    h, r = ready()
    assert r.migratable
    seen = []

    def watching() -> Wait:
        running = h.engine.start(h.launching(h.stream(pages(r, list(range(512)) * 50))))
        while running.is_alive:
            seen.append(r.migratable)
            yield h.engine.env.timeout(5.0)

    h.run(watching())
    assert False in seen and r.migratable
    h.touch(pages(r, [0]), False)
    h.check()


def test_cpu_chunks_are_single_pages() -> None:
    h, r = ready()
    h.touch(pages(r, [0]), False)
    assert h.host.used == 16 and {each for b in h.blocks() for _, _, each in b.cpu_chunks.values()} == {1}


def test_the_k80_row_of_the_documentation() -> None:
    # Two arrays of 4 MB back to back: blocks of 1152, 2048 and 896 KiB each.
    run = kit.run("cuda_demand_paging", machine="k80", program="vector_add", grid=4096, block=256, range_offset=917504)
    found = Counter(event["kind"] for event in run.events())
    sizes = [event["bytes"] for event in run.events() if event["kind"] == "BYTES_TRANSFER_HTOD"]
    assert sorted(sizes) == sorted(2 * [1152 << 10, 2048 << 10, 896 << 10])
    assert found == {"CPU_PAGE_FAULT_COUNT": 51, "BYTES_TRANSFER_HTOD": 6, "BYTES_TRANSFER_DTOH": 102}
    assert run.metrics["dtoh_bytes"] == 12 << 20 and run.integrity.lost == 0


def test_managed_memory_is_limited_by_the_gpus() -> None:
    with pytest.raises(DriverError, match="limited by GPU memory"):
        kit.run(
            "cuda_demand_paging", machine="k80", program="three_lines", buffer_bytes=8 << 20, gpu_memory_bytes=4 << 20
        )


def test_the_cpu_may_not_touch_beside_a_kernel_in_the_flow() -> None:
    with pytest.raises(DriverError, match="SIGBUS"):
        kit.run(
            "cuda_demand_paging", machine="k80", program="stream", buffer_bytes=2 << 20, touches=100_000, cpu_touches=5
        )


@pytest.mark.parametrize("program", ["three_lines", "unit_touch", "stream"])
def test_a_stray_access_is_an_mmu_fault_that_ends_the_kernel(program: str) -> None:
    run = kit.run("cuda_demand_paging", machine="k80", program=program, stray_bytes=1)
    where = run.allocations[0].va + (2 << 20)
    (said,) = run.errors
    assert said.endswith(f"killed by a fatal GPU fault: InvalidAddress, MMU fault at {where:#x}")
    assert run.integrity.lost == 0
    assert run.metrics["gpu_fault_groups"] == run.metrics["fatal_faults"] == 0, "the driver itself sees no fault"


def test_after_a_stray_access_the_driver_is_at_rest() -> None:
    h, r = ready()
    h.touch(pages(r, range(512)))
    assert h.kernel([*pages(r, range(64)), r.end + 7], lanes=4) == f"InvalidAddress, MMU fault at {r.end + 7 << 12:#x}"
    assert r.migratable
    h.touch(pages(r, range(512)), False)
    h.check()


def test_prefetch_instructions_past_the_end_are_dropped() -> None:
    h, r = ready()
    kinds = [PREFETCH, WRITE, PREFETCH]
    assert h.kernel([r.end + 9, r.first, r.end + 1], kinds, lanes=2) is None
    h.check()


@pytest.mark.parametrize(
    "given",
    [
        {"init": "gpu"},
        {"arrays": 3},
        {"program": "stream", "first_touch": "gpu"},
        {"program": "trace", "first_touch": "gpu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["allocation", "first_touch"])
def test_read_mostly_has_no_effect(given: dict[str, Any], when: str) -> None:
    plain, advised = (
        kit.run("cuda_demand_paging", machine="k80", advice=advice, advice_when=when, **given)
        for advice in ("none", "read_mostly")
    )
    assert [e["kind"] for e in advised.events()] == [e["kind"] for e in plain.events()]
    assert advised.metrics["read_duplicates"] == 0 and advised.integrity.lost == 0 and not advised.errors


def test_the_wish_for_read_duplication_is_kept() -> None:
    h, r = ready()
    h.advise("read_mostly", r.first, 512)
    assert r.policy.read_duplication and not r.read_duplicate
    assert all(block.pte[GPU][READ_WRITE_ATOMIC] == block.all_pages for block in h.blocks()), "no right is taken"
    h.touch(pages(r, range(512)), False)
    assert h.where(r) == "C" * 512
    h.kernel(pages(r, range(512)))
    h.check()
