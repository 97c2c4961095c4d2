"""The prefetch tree: the worked example of the documentation, its signatures, thresholds and corners."""

from __future__ import annotations

import random

import numpy as np
import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.types import CPU, GPU, VaRange


def ready(count: int = 512, offset: int = 0, **module: object) -> tuple[Harness, VaRange]:
    """A range whose every page the CPU has written."""
    h = Harness(thrashing_enable=False, **module)
    r = h.allocate(count, offset)
    h.touch(pages(r, range(count)))
    return h, r


def groups(h: Harness) -> int:
    return h.count("UvmEventTypeGpuFault")


def test_worked_example_of_section_4() -> None:
    h, r = ready(256)
    moved = []
    for unit in (1, 3, 0, 4, 8):
        before = h.where(r).count("G")
        h.kernel(pages(r, [16 * unit]))
        moved.append((h.where(r).count("G") - before) * 4)
        h.check()
    assert moved == [64, 64, 128, 256, 512]
    # The fault at unit 0 brings unit 2 as well, apart from its own 4 + 60 KiB.
    assert [c for c in h.copies(r.first) if c[1] in (0, 1, 32)] == [
        ("HtoD", 0, 1, "coherence"), ("HtoD", 1, 15, "prefetch"), ("HtoD", 32, 16, "prefetch"),
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_sweep_over_a_full_block_takes_six_faults(way: str) -> None:
    h, r = ready()
    h.kernel(pages(r, range(512) if way == "up" else range(511, -1, -1)))
    sizes = h.kib("HtoD")
    assert groups(h) == 6
    assert sum(sizes) == 2048
    if way == "up":
        assert sizes == [4, 60, 4, 60, 4, 124, 4, 252, 4, 508, 4, 1020]
        assert np.mean(sizes) == pytest.approx(170.67, abs=0.01) and np.median(sizes) == 32


def test_the_cpu_fetches_the_same_way() -> None:
    h, r = ready()
    assert h.count("UvmEventTypeCpuFault") == 6
    h.prefetch(r.first, 512, GPU)
    before = len(h.copies())
    h.touch(pages(r, range(512)), False)
    assert h.count("UvmEventTypeCpuFault") == 12
    assert [c[2] * 4 for c in h.copies()[before:]] == [4, 60, 4, 60, 4, 124, 4, 252, 4, 508, 4, 1020]


@pytest.mark.parametrize(("threshold", "faults"), [(1, 1), (50, 6), (51, 6), (53, 6), (54, 7), (75, 20), (100, 512)])
def test_faults_by_threshold(threshold: int, faults: int) -> None:
    h, r = ready(prefetch_threshold=threshold)
    before = groups(h)
    h.kernel(pages(r, range(512)))
    assert groups(h) - before == faults
    assert sum(h.kib("HtoD")) == 2048


def test_a_tail_block_of_465_pages() -> None:
    h, r = ready(465)
    h.kernel(pages(r, range(465)))
    assert groups(h) == 6
    assert h.kib("HtoD") == [4, 60, 4, 60, 4, 124, 4, 252, 4, 508, 4, 832]


def test_random_single_faults() -> None:
    faults, copies = [], []
    for seed in range(60):
        h, r = ready()
        h.kernel(pages(r, random.Random(seed).sample(range(512), 512)))
        faults.append(groups(h))
        copies.append(len(h.copies()))
    assert np.mean(faults) == pytest.approx(13.7, abs=0.6) and min(faults) >= 7 and max(faults) <= 17
    assert np.mean(copies) == pytest.approx(45.8, abs=2.5)


def test_zero_fill_faults_alike_and_copies_nothing() -> None:
    h = Harness()
    r = h.allocate(512)
    h.kernel(pages(r, range(512)))
    assert groups(h) == 6 and h.copies() == []
    assert h.where(r) == "G" * 512


def test_never_past_the_block() -> None:
    h, r = ready(1536)
    h.kernel(pages(r, [512, 1023, 767, 640]), lanes=4)
    assert set(h.where(r)[:512] + h.where(r)[1024:]) == {"C"}


def test_switched_off_every_page_faults() -> None:
    h, r = ready(64, prefetch_enable=False)
    h.kernel(pages(r, range(64)))
    assert groups(h) == 64 and h.kib("HtoD") == [4] * 64
    assert h.count("UvmEventTypeCpuFault") == 64


def test_minimum_of_faults_counts_those_to_the_last_destination() -> None:
    h, r = ready(512, prefetch_min_faults=3)
    for unit, expected in ((0, [4]), (4, [4]), (8, [4, 60]), (12, [4, 60])):
        before = len(h.copies())
        h.kernel(pages(r, [16 * unit]))
        assert [c[2] * 4 for c in h.copies()[before:]] == expected
    before = len(h.copies())
    h.touch(pages(r, [16 * 8]), False)  # another destination: the count starts again
    assert [c[2] * 4 for c in h.copies()[before:]] == [4]


def test_first_touch_at_the_preferred_location_populates_the_whole_block() -> None:
    h = Harness()
    r = h.allocate(512)
    h.advise("preferred_gpu", r.first, 512)
    h.kernel(pages(r, [77]))
    assert h.where(r) == "G" * 512 and groups(h) == 1


@pytest.mark.parametrize("destination", [CPU, GPU])
def test_short_blocks_without_a_whole_unit_are_one_unit(destination: int) -> None:
    h = Harness()
    r = h.allocate(20, offset=3)  # pages 3..22 of the block: no aligned 64 KiB inside
    if destination == CPU:
        h.touch(pages(r, [7]))
    else:
        h.kernel(pages(r, [7]))
    assert h.where(r) == ("C" if destination == CPU else "G") * 20


def test_head_and_tail_are_units_of_their_own() -> None:
    h = Harness()
    r = h.allocate(40, offset=10)  # head of 6 pages, 32 in whole units, tail of 2
    h.touch(pages(r, [39]))
    assert h.where(r) == "." * 38 + "CC"
    h.touch(pages(r, [8]))
    assert h.where(r) == "." * 6 + "C" * 16 + "." * 16 + "CC"
    # A node that starts in the padding before the head is cut to start at page 10, past its own end: nothing is fetched.
    h.touch(pages(r, [2]))
    assert h.where(r)[:6] == "..C..."


def test_bytes_of_faults_and_prefetches_are_the_bytes_moved() -> None:
    h, r = ready(1024)
    h.kernel(pages(r, random.Random(5).sample(range(1024), 300)), lanes=16)
    by_cause = {cause: sum(n for _, _, n, c in h.copies() if c == cause) for cause in ("coherence", "prefetch")}
    assert sum(by_cause.values()) == h.where(r).count("G")
    assert by_cause["coherence"] == sum(int(row["pages"]) for row in h.spans("UvmEventTypeGpuFault"))
