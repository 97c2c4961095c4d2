"""The fault buffer, batches, coalescing, flush and replay."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.uvm.harness import Harness, pages

from kit.drivers.uvm.fault_batch import FaultBatch, fetch_fault_buffer_entries, preprocess_fault_batch
from kit.drivers.uvm.types import ATOMIC_STRONG, PREFETCH, READ, WRITE

P, R, W, A = PREFETCH, READ, WRITE, ATOMIC_STRONG
Entry = tuple[int, int, int]  # uTLB, page, access


def fetched(
    entries: list[Entry], fatal: list[int] | None = None, everything: bool = False, **settings: object
) -> FaultBatch:
    """What one fetch makes of these entries."""
    h = Harness(**settings)
    h.gpu.fault_buffer.interrupt = lambda: None
    utlb, page, access = (np.array(column) for column in zip(*entries, strict=True))
    h.gpu.fault_buffer.write(np.zeros(len(page)), page, access, utlb, np.array(fatal or [0] * len(page)))
    batch = FaultBatch()
    fetch_fault_buffer_entries(h.gpu, h.cpu, batch, everything)
    return batch


def representatives(batch: FaultBatch) -> list[tuple[int, int, int, int]]:
    """uTLB, page, access and instances of each."""
    columns = zip(batch.utlb, batch.page, batch.access, batch.instances, strict=True)
    return [(int(utlb), int(page), int(access), int(instances)) for utlb, page, access, instances in columns]


COALESCING: dict[str, tuple[list[Entry], list[tuple[int, int, int, int]]]] = {
    "same uTLB, same page": ([(0, 5, R), (0, 5, R)], [(0, 5, R, 2)]),
    "same uTLB, weaker access": ([(0, 5, W), (0, 5, R)], [(0, 5, W, 2)]),
    "same uTLB, stronger access takes over": ([(0, 5, R), (0, 5, W)], [(0, 5, W, 2)]),
    "same uTLB, another page in between": (
        [(0, 5, R), (0, 6, R), (0, 5, R)],
        [(0, 5, R, 1), (0, 6, R, 1), (0, 5, R, 1)],
    ),
    "another uTLB's entry in between does not matter": (
        [(0, 5, R), (1, 9, R), (0, 5, W)],
        [(0, 5, W, 2), (1, 9, R, 1)],
    ),
    "other uTLB, last representative": ([(0, 5, R), (1, 5, R)], [(0, 5, R, 2)]),
    "other uTLB, weaker access": ([(0, 5, W), (1, 5, P)], [(0, 5, W, 2)]),
    "other uTLB, stronger access stays apart": ([(0, 5, R), (1, 5, W)], [(0, 5, R, 1), (1, 5, W, 1)]),
    "other uTLB, no longer the last": ([(0, 5, R), (0, 6, R), (1, 5, R)], [(0, 5, R, 1), (0, 6, R, 1), (1, 5, R, 1)]),
    "merging does not make an entry its uTLB's last": (
        [(0, 5, R), (1, 5, R), (2, 8, R), (1, 5, R)],
        [(0, 5, R, 2), (2, 8, R, 1), (1, 5, R, 1)],
    ),
    # The driver compares with the entry that became the last representative, even after a stronger one replaced it.
    "a promotion is not seen by other uTLBs": ([(0, 5, R), (0, 5, W), (1, 5, W)], [(0, 5, W, 2), (1, 5, W, 1)]),
    "a weaker one still merges": ([(0, 5, R), (0, 5, W), (1, 5, R)], [(0, 5, W, 3)]),
    "atomics are the strongest": ([(0, 5, W), (0, 5, A), (0, 5, R)], [(0, 5, A, 3)]),
}


@pytest.mark.parametrize("name", COALESCING)
def test_coalescing_while_fetching(name: str) -> None:
    entries, expected = COALESCING[name]
    batch = fetched(entries)
    assert representatives(batch) == expected
    assert batch.num_cached == len(entries)


def test_fatal_entries_never_merge() -> None:
    assert representatives(fetched([(0, 5, R), (0, 5, R)], [0, 7])) == [(0, 5, R, 1), (0, 5, R, 1)]
    assert representatives(fetched([(0, 5, R)] * 4, [0, 0, 7, 7])) == [(0, 5, R, 2), (0, 5, R, 1), (0, 5, R, 1)]


def test_no_coalescing_where_it_is_switched_off_and_in_pascals_cancel_path() -> None:
    entries = [(0, 5, R)] * 4
    assert len(fetched(entries, fault_coalesce=False)) == 4
    assert len(fetched(entries, everything=True, architecture="pascal")) == 4
    assert len(fetched(entries, everything=True, architecture="volta")) == 1


def test_a_batch_is_sorted_by_address_then_strongest_access() -> None:
    batch = fetched([(0, 9, R), (1, 5, R), (2, 9, A), (3, 1, W), (4, 9, W)])
    h = Harness()
    preprocess_fault_batch(h.gpu, h.cpu, batch)
    assert [(int(p), int(a)) for p, a in zip(batch.page, batch.access, strict=True)] == [
        (1, W),
        (5, R),
        (9, A),
        (9, W),
        (9, R),
    ]


def test_the_limit_counts_raw_entries() -> None:
    assert (len(fetched([(0, 5, R)] * 300)), fetched([(0, 5, R)] * 300).num_cached) == (1, 256)
    assert fetched([(0, page, R) for page in range(300)]).num_cached == 256
    assert fetched([(0, page, R) for page in range(300)], fault_batch_count=20).num_cached == 20
    assert fetched([(0, page, R) for page in range(300)], everything=True).num_cached == 300


def test_only_entries_that_have_arrived_are_fetched() -> None:
    h = Harness()
    h.gpu.fault_buffer.interrupt = lambda: None
    h.gpu.fault_buffer.write(np.array([1.0, 2.0, 50.0]), np.arange(3), np.full(3, R), np.zeros(3, dtype=int))
    h.cpu.now = 10.0
    batch = FaultBatch()
    fetch_fault_buffer_entries(h.gpu, h.cpu, batch)
    assert list(batch.page) == [0, 1]
    h.cpu.now = 60.0
    fetch_fault_buffer_entries(h.gpu, h.cpu, batch)
    assert list(batch.page) == [2]


# Everything below runs kernels.


def batches(h: Harness) -> list[tuple[int, int]]:
    """(representatives, raw entries) of every fetch that found something."""
    return [(int(s["pages"]), int(s["value"])) for s in h.spans("fetch_fault_buffer_entries") if s["value"]]


@pytest.mark.parametrize("count", [1, 7, 64, 256])
def test_no_batch_is_larger_than_asked_and_the_rest_faults_again(count: int) -> None:
    h = Harness(fault_batch_count=count, prefetch_enable=False)
    r = h.allocate(512)
    assert h.kernel(pages(r, range(300)), lanes=300) is None
    assert max(raw for _, raw in batches(h)) == min(count, 300)
    assert h.where(r) == "G" * 300 + "." * 212
    assert len(batches(h)) == -(-300 // count)
    assert int(h.spans("fault_buffer_flush_locked")[0]["value"]) == 300 - min(count, 300)
    h.check()


@pytest.mark.parametrize("policy", [0, 1, 2, 3])
def test_every_stalled_access_completes_under_every_policy(policy: int) -> None:
    h = Harness(fault_replay_policy=policy)
    ranges = [h.allocate(512) for _ in range(3)]
    touched = [page for r in ranges for page in pages(r, range(0, 512, 5))]
    assert h.kernel(touched, lanes=64) is None
    for r in ranges:
        assert set(h.where(r)[::5]) == {"G"}
    h.check()


def one_batch(policy: int) -> tuple[Harness, list[float]]:
    """Faults in three blocks at once; the replays that follow."""
    h = Harness(fault_replay_policy=policy)
    ranges = [h.allocate(512) for _ in range(3)]
    h.faults([r.first for r in ranges])
    return h, [s["start"] for s in h.spans("UvmEventTypeGpuFaultReplay")]


@pytest.mark.parametrize(("policy", "replays", "flushes"), [(0, 3, 0), (1, 1, 0), (2, 1, 1), (3, 1, 0)])
def test_replays_of_one_batch(policy: int, replays: int, flushes: int) -> None:
    h, times = one_batch(policy)
    assert (len(times), h.count("fault_buffer_flush_locked")) == (replays, flushes)


def test_block_replays_after_each_block_and_once_at_the_end_of_the_service() -> None:
    h, times = one_batch(0)
    blocks = [s["end"] for s in h.spans("service_fault_batch_block")]
    assert all(block < replay for block, replay in zip(blocks, times, strict=True)) and times[0] < blocks[2]
    h = Harness(fault_replay_policy=3, fault_batch_count=1)
    r = h.allocate(1536)
    h.faults(pages(r, [0, 512, 1024]))
    assert len(batches(h)) == 3 and h.count("UvmEventTypeGpuFaultReplay") == 1


def test_without_a_flush_nothing_is_thrown_away() -> None:
    for policy, left in ((1, 3), (2, 1)):
        h = Harness(fault_replay_policy=policy, fault_batch_count=1)
        r = h.allocate(1536)
        h.faults(pages(r, [0, 512, 1024]))
        assert len(batches(h)) == left


@pytest.mark.parametrize(("ratio", "flushed"), [(49, 3), (50, 0), (100, 0)])
def test_put_is_read_again_when_duplicates_exceed_the_ratio(ratio: int, flushed: int) -> None:
    h = Harness(fault_replay_update_put_ratio=ratio, prefetch_enable=False, costs={"service_block": 1000.0})
    r = h.allocate(512)
    buffer = h.gpu.fault_buffer
    page = np.array(pages(r, [0, 0, 1, 1]))  # four entries, two duplicates: 50 %
    late = np.array(pages(r, [7, 8, 9]))
    buffer.write(np.zeros(4), page, np.full(4, W), np.zeros(4, dtype=int))
    buffer.write(np.full(3, 700.0), late, np.full(3, W), np.zeros(3, dtype=int))  # arrive during the service
    h.settle()
    assert int(h.spans("fault_buffer_flush_locked")[0]["value"]) == flushed


@pytest.mark.parametrize("entries", [2, 3, 8, 33])
@pytest.mark.parametrize("policy", [0, 1, 2, 3])
def test_a_full_buffer_drops_and_loses_nothing(entries: int, policy: int) -> None:
    h = Harness(entries=entries, fault_replay_policy=policy)
    r = h.allocate(1024)
    h.touch(pages(r, range(1024)))
    assert h.kernel(pages(r, range(0, 1024, 3)), lanes=96) is None
    assert h.gpu.fault_buffer.dropped > 0
    assert set(h.where(r)[::3]) == {"G"}
    assert max(raw for _, raw in batches(h)) <= entries - 1
    h.check()


def test_nothing_is_recorded_after_an_overflow_until_get_moves() -> None:
    h = Harness(entries=4)
    h.gpu.fault_buffer.interrupt = lambda: None
    buffer = h.gpu.fault_buffer

    def write(count: int) -> None:
        buffer.write(np.zeros(count), np.arange(count), np.full(count, R), np.zeros(count, dtype=int))

    write(3)
    assert (buffer.space, buffer.overflow) == (0, False)
    write(1)
    assert buffer.overflow and buffer.dropped == 1
    write(1)
    assert buffer.dropped == 2
    buffer.read(1)
    assert not buffer.overflow and buffer.space == 1
    write(2)
    assert buffer.overflow and buffer.dropped == 3


@pytest.mark.parametrize(("limit", "services"), [(1, 12), (5, 3), (20, 1)])
def test_batches_in_one_service_call(limit: int, services: int) -> None:
    h = Harness(fault_max_batches_per_service=limit, fault_batch_count=1, fault_replay_policy=1)
    r = h.allocate(12 * 512)
    h.faults(pages(r, range(0, 12 * 512, 512)))
    assert h.count("uvm_parent_gpu_service_replayable_faults") == services
    assert h.count("service_fault_batch") == 12


def test_a_service_call_replays_at_least_once() -> None:
    h = Harness()
    r = h.allocate(512)
    h.kernel(pages(r, range(512)), lanes=16)
    for service in h.spans("uvm_parent_gpu_service_replayable_faults"):
        inside = [s for s in h.spans("push_replay_on_gpu") if service["start"] <= s["start"] <= service["end"]]
        assert inside


def test_the_next_batch_starts_after_the_replay_of_the_one_before() -> None:
    h = Harness()
    r = h.allocate(2048)
    h.touch(pages(r, range(2048)))
    h.kernel(pages(r, range(0, 2048, 9)), lanes=40)
    fetches = [s["start"] for s in h.spans("fetch_fault_buffer_entries") if s["value"]]
    replays = [s["start"] for s in h.spans("UvmEventTypeGpuFaultReplay")]
    copies = h.spans("UvmEventTypeMigration")
    assert len(fetches) == len(replays)
    assert all(fetch < replay for fetch, replay in zip(fetches, replays, strict=True))
    assert all(replay <= fetch for replay, fetch in zip(replays, fetches[1:], strict=False))
    # Unmap, copy, map, replay: no copy is under way when its batch's replay happens.
    for fetch, replay in zip(fetches, replays, strict=True):
        mine = [c for c in copies if c["actor"] == "copy HtoD" and fetch <= c["start"] <= replay]
        assert all(c["end"] <= replay for c in mine)


def test_a_group_counts_the_instances_of_its_first_page() -> None:
    h = Harness()
    r = h.allocate(512)
    h.faults(pages(r, [8, 3, 3, 8, 3]), utlb=[0, 1, 1, 2, 3])
    (group,) = h.spans("UvmEventTypeGpuFault")
    assert (int(group["va"]) // 4096 - r.first, group["value"], group["pages"], group["cause"]) == (3, 3, 2, "write")


def test_spurious_faults_are_counted_and_not_served_again() -> None:
    h = Harness()
    r = h.allocate(512)
    h.kernel(pages(r, [0]))
    served = h.count("uvm_va_block_service_locked")
    h.faults(pages(r, [0]))
    assert h.count("uvm_va_block_service_locked") == served
    assert h.count("UvmEventTypeGpuFault") == 2


def test_a_read_only_mapping_is_upgraded_by_a_write_without_a_copy() -> None:
    h = Harness()
    r = h.allocate(512)
    h.advise("read_mostly", r.first, 512)
    h.touch(pages(r, range(512)))
    h.kernel(pages(r, range(512)), READ)
    copies = len(h.copies())
    assert h.where(r) == "D" * 512
    h.kernel(pages(r, range(512)), WRITE, lanes=600)
    assert len(h.copies()) == copies and h.where(r) == "G" * 512
    h.check()
