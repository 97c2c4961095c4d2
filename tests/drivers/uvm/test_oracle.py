"""The batch driver against the page-at-a-time model, on random programs."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from drivers.uvm.harness import Harness, pages
from drivers.uvm.oracle import Oracle
from hypothesis import given, settings

from kit.drivers.uvm.types import CPU, GPU, READ, WRITE
from kit.memory.table.pagemask import pages_of

Step = tuple[str, int, list[int], bool]  # cpu, gpu (one thread) or batch (all at once); range; pages; write


def compare(ranges: list[tuple[int, int]], steps: list[Step], roots: int, **module: Any) -> None:
    """Run both and compare everything that the model knows after every step."""
    known = {"prefetch_threshold": "threshold", "prefetch_min_faults": "min_faults", "prefetch_enable": "prefetch"}
    h = Harness(roots=roots, thrashing_enable=False, **module)
    oracle = Oracle(roots, **{known[name]: value for name, value in module.items() if name in known})
    made = [h.allocate(count, offset) for count, offset in ranges]
    for each in made:
        oracle.allocate(each.first, each.pages)
    for kind, which, indexes, write in steps:
        touched = pages(made[which], [i % made[which].pages for i in indexes])
        if kind == "cpu":
            h.touch(touched, write)
            for page in touched:
                oracle.cpu_touch(page)
        elif kind == "gpu" or module.get("fault_batch_count") == 1:  # entries past the batch would be flushed for good
            killed = h.kernel(touched, WRITE if write else READ)
            for page in touched:
                if not oracle.out_of_memory:
                    oracle.gpu_touch(page)
            assert bool(killed) == oracle.out_of_memory
        else:
            h.faults(touched)
            oracle.gpu_batch(touched)
        agree(h, oracle)
        if oracle.out_of_memory:
            return


def agree(h: Harness, oracle: Oracle) -> None:
    h.check()
    assert h.copies(0) == oracle.records
    assert h.count("UvmEventTypeCpuFault") == oracle.cpu_faults
    assert h.gpu.pmm.evictions == oracle.evictions
    blocks = {block.first: block for block in h.blocks()}
    for model in oracle.blocks:
        block = blocks.get(model.first)
        if block is None:
            assert not model.at
            continue
        assert set(pages_of(block.resident[CPU])) == {p for p, where in model.at.items() if where == "cpu"}
        assert set(pages_of(block.resident[GPU])) == {p for p, where in model.at.items() if where == "gpu"}
        assert set(pages_of(block.mapped(CPU))) == model.cpu_mapped
        assert set(pages_of(block.populated(CPU))) == model.cpu_memory
        chunks = {first: (chunk.offset, chunk.pages) for first, chunk in block.gpu_chunks.items()}
        assert chunks == {first: (offset, size) for first, (_, offset, size) in model.gpu_memory.items()}
    for mine, theirs in ((h.gpu.pmm.unused, oracle.unused), (h.gpu.pmm.used, oracle.used)):
        assert [owners(root) for root in mine] == [
            sorted((offset, block.first + start) for offset, (block, start) in root.owners.items()) for root in theirs
        ]


def owners(root: Any) -> list[tuple[int, int]]:
    return sorted((offset, chunk.block.first + chunk.page_index) for offset, chunk in root.owners.items())


GEOMETRIES = [
    [(512, 0)],
    [(1536, 0)],
    [(512, 0), (512, 0), (512, 0)],
    [(465, 0), (512, 0)],
    [(40, 3), (512, 0), (600, 0)],
    [(1100, 250), (130, 16)],
    [(5, 0), (16, 0), (17, 7), (512, 0)],
    [(1030, 509)],
    [(300, 100), (300, 100), (300, 100)],
]


def program(rng: random.Random, ranges: list[tuple[int, int]], length: int) -> list[Step]:
    """Interleaved touches of both processors: runs, strides and scattered pages."""
    steps: list[Step] = []
    for _ in range(length):
        which = rng.randrange(len(ranges))
        count = ranges[which][0]
        kind = rng.choice(["cpu", "gpu", "gpu", "batch"])
        first = rng.randrange(count)
        touched = rng.choice(
            [
                list(range(first, first + rng.choice([1, 3, 40, 300]))),
                list(range(first, first + 700, rng.choice([7, 16, 64]))),
                list(range(first + 200, first, -rng.choice([1, 16, 33]))),
                [rng.randrange(count) for _ in range(rng.randint(1, 30))],
            ]
        )
        steps.append((kind, which, touched[:200], rng.random() < 0.5))
    return steps


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int) -> None:
    rng = random.Random(seed)
    ranges = GEOMETRIES[seed % len(GEOMETRIES)]
    module: dict[str, Any] = {"fault_batch_count": 1} if seed % 2 else {}
    module["prefetch_threshold"] = rng.choice([51, 51, rng.randint(1, 100)])
    module["prefetch_min_faults"] = rng.choice([1, 1, 2, 5])
    module["prefetch_enable"] = rng.random() < 0.9
    compare(ranges, program(rng, ranges, 12), roots=1 + seed % 4, **module)


@pytest.mark.parametrize("threshold", [1, 25, 50, 51, 52, 53, 54, 75, 90, 99, 100])
@pytest.mark.parametrize("ranges", [[(512, 0)], [(465, 0)], [(300, 250)]], ids=str)
def test_thresholds(ranges: list[tuple[int, int]], threshold: int) -> None:
    rng = random.Random(threshold)
    order = rng.sample(range(ranges[0][0]), 60)
    steps: list[Step] = [
        ("cpu", 0, list(range(ranges[0][0])), True),
        ("gpu", 0, order, True),
        ("cpu", 0, order[::-1], False),
    ]
    compare(ranges, steps, roots=1, prefetch_threshold=threshold, fault_batch_count=1)


def test_a_batch_that_runs_out_of_memory_serves_no_further_block() -> None:
    """The second range's first block does not fit beside the first range; its second block is not tried."""
    steps: list[Step] = [("cpu", 0, [0], False), ("gpu", 0, [0], False), ("batch", 2, [0, 412], False)]
    for last in (428, 413):
        compare([(104, 0), (1, 0), (last, 100)], steps, roots=1, prefetch_threshold=2, fault_batch_count=256)


def test_memory_that_is_empty_already_keeps_its_place_among_the_unused() -> None:
    """Both ranges have left the GPU; then the CPU touches the first one again, where nothing was yet."""
    there_and_back: list[Step] = [(kind, which, [0], True) for which in (0, 1) for kind in ("cpu", "gpu", "cpu")]
    compare([(512, 0), (512, 0)], [*there_and_back, ("cpu", 0, [256], False)], roots=2, prefetch_threshold=4)


def test_a_page_that_the_retry_finds_evicted_is_a_fault_again() -> None:
    """Page 0 is there when the batch begins; memory for page 336 is what takes it away."""
    steps: list[Step] = [("cpu", 0, [0], False), *(("gpu", which, [0], False) for which in (1, 2, 0))]
    steps.append(("batch", 2, [0, 336], False))
    compare([(512, 0), (161, 0), (353, 0)], steps, roots=2, prefetch_threshold=2, fault_batch_count=256)


SIZES = st.tuples(st.integers(1, 700), st.sampled_from([0, 0, 1, 8, 100, 500]))
STEPS = st.tuples(
    st.sampled_from(["cpu", "gpu", "batch"]),
    st.integers(0, 2),
    st.lists(st.integers(0, 699), min_size=1, max_size=12),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(SIZES, min_size=3, max_size=3),
    st.lists(STEPS, min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(1, 100),
)
def test_any_program(ranges: list[tuple[int, int]], steps: list[Step], roots: int, threshold: int) -> None:
    compare(ranges, steps, roots, prefetch_threshold=threshold, fault_batch_count=1 if threshold % 2 else 256)
