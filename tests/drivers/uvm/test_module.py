"""Every module parameter: its documented default, its bounds in the driver's source, and that it changes what happens."""

from __future__ import annotations

import random
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
from drivers.uvm.harness import Harness, pages

import kit
from kit.drivers.uvm.module import ModuleParameters
from kit.errors import ParameterError

FIELDS = {f.name: f for f in fields(ModuleParameters)}

# Defaults of the documentation's table, under the whole names.
DOCUMENTED: dict[str, Any] = {
    "uvm_perf_prefetch_enable": True, "uvm_perf_prefetch_threshold": 51, "uvm_perf_prefetch_min_faults": 1,
    "uvm_perf_fault_batch_count": 256, "uvm_perf_fault_replay_policy": 2, "uvm_perf_fault_replay_update_put_ratio": 50,
    "uvm_perf_fault_max_batches_per_service": 20, "uvm_perf_fault_max_throttle_per_service": 5, "uvm_perf_fault_coalesce": True,
    "uvm_perf_reenable_prefetch_faults_lapse_msec": 1000, "uvm_force_prefetch_fault_support": False,
    "uvm_perf_thrashing_enable": True, "uvm_perf_thrashing_threshold": 3, "uvm_perf_thrashing_pin_threshold": 10,
    "uvm_perf_thrashing_lapse_usec": 500, "uvm_perf_thrashing_nap": 1, "uvm_perf_thrashing_epoch": 2000,
    "uvm_perf_thrashing_pin": 300, "uvm_perf_thrashing_max_resets": 4, "uvm_perf_pma_batch_nonpinned_order": 6,
    "uvm_cpu_chunk_allocation_sizes": "4K+64K+2M", "uvm_fault_force_sysmem": False, "uvm_downgrade_force_membar_sys": True,
    "uvm_channel_num_gpfifo_entries": 1024,
}  # fmt: skip

LINES = {"program": "three_lines"}
RANDOM = {
    "program": "stream", "buffer_bytes": 8 << 20, "pattern": "random", "touches": 4000, "oversubscription": 1.6,
}  # fmt: skip
DUPLICATES = {"program": "vector_add", "grid": 4096, "block": 256}
FIGHT = {
    "program": "stream",
    "buffer_bytes": 8192,
    "touches": 60_000,
    "lanes": 1,
    "cpu_touches": 20_000,
    "write_fraction": 1.0,
}
LONG_FIGHT = {**FIGHT, "thrashing_epoch": 1}
AHEAD = {"program": "stream", "buffer_bytes": 4 << 20, "prefetch_ahead_bytes": 65536, "lanes": 8}
PAST_THE_END = {
    **AHEAD, "machine": "v100", "prefetch_ahead_bytes": 64 << 20, "touches": 4096, "lanes": 256, "first_touch": "gpu",
}  # fmt: skip
CALLS = {"program": "three_lines", "buffer_bytes": 256 << 20, "prefetch": "to_gpu"}
ON_THE_GPU = {"program": "three_lines", "buffer_bytes": 32 << 20, "first_touch": "gpu"}

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("prefetch_enable", False, LINES),
    ("prefetch_threshold", 75, LINES),
    ("prefetch_min_faults", 3, LINES),
    ("fault_batch_count", 4, RANDOM),
    ("fault_replay_policy", 0, RANDOM),
    ("fault_replay_policy", 1, RANDOM),
    ("fault_replay_policy", 3, RANDOM),
    ("fault_replay_update_put_ratio", 100, DUPLICATES),
    ("fault_max_batches_per_service", 1, RANDOM),
    ("fault_max_throttle_per_service", 1, FIGHT),
    ("fault_coalesce", False, DUPLICATES),
    ("reenable_prefetch_faults_lapse_msec", 0, PAST_THE_END),
    ("force_prefetch_fault_support", True, AHEAD),
    ("thrashing_enable", False, FIGHT),
    ("thrashing_threshold", 5, FIGHT),
    ("thrashing_pin_threshold", 2, FIGHT),
    ("thrashing_lapse_usec", 50, FIGHT),
    ("thrashing_nap", 3, FIGHT),
    ("thrashing_epoch", 1, FIGHT),
    ("thrashing_pin", 4, FIGHT),
    ("thrashing_max_resets", 0, LONG_FIGHT),
    ("pma_batch_nonpinned_order", 0, ON_THE_GPU),
    ("cpu_chunk_allocation_sizes", "4K", RANDOM),
    ("cpu_chunk_allocation_sizes", "4K+64K", RANDOM),
    ("fault_force_sysmem", True, LINES),
    ("downgrade_force_membar_sys", False, RANDOM),
    ("channel_num_gpfifo_entries", 32, CALLS),
]


@cache
def happened(items: tuple[tuple[str, Any], ...]) -> tuple[bytes, bytes, tuple[tuple[str, float], ...]]:
    """Times and kinds of all spans, all moves, and the metrics of a run."""
    run = kit.run("cuda_demand_paging", **dict(items))
    assert run.integrity.lost == 0 and not run.conformance.violations
    names = np.array(run.trace.steps.words)[run.trace.spans.column("step").astype(int)]
    times = np.stack([run.trace.spans.column("start"), run.trace.spans.column("end")])
    return (
        times.tobytes() + b"".join(n.encode() for n in names),
        run.trace.moves.array().tobytes(),
        tuple(run.metrics.items()),
    )


@pytest.mark.parametrize(("name", "value", "parameters"), CASES, ids=[f"{name}={value}" for name, value, _ in CASES])
def test_it_changes_what_happens(name: str, value: Any, parameters: dict[str, Any]) -> None:
    before = happened(tuple(parameters.items()))
    after = happened(tuple({**parameters, name: value}.items()))
    changed = [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    assert changed, f"{name} = {value!r} changes nothing"


def test_every_parameter_is_tried() -> None:
    assert {name for name, _, _ in CASES} == set(FIELDS)
    assert all(FIELDS[name].default != value for name, value, _ in CASES)


def test_documented_names_and_defaults() -> None:
    assert {f.metadata["documented"]: f.default for f in FIELDS.values()} == DOCUMENTED
    assert all(f.metadata["documented"].endswith(name) for name, f in FIELDS.items())


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("prefetch_threshold", 100, 101), ("prefetch_threshold", 1, 0), ("prefetch_min_faults", 20, 21),
        ("thrashing_threshold", 7, 8), ("thrashing_pin_threshold", 255, 256), ("fault_replay_update_put_ratio", 100, 101),
        ("fault_replay_policy", 3, 4), ("channel_num_gpfifo_entries", 32, 31), ("fault_batch_count", 1, 0),
        ("thrashing_lapse_usec", 1, 0), ("cpu_chunk_allocation_sizes", "4K+2M", "64K"),
    ],
)  # fmt: skip
def test_bounds_are_the_drivers(name: str, good: Any, bad: Any) -> None:
    small = {"program": "three_lines", "buffer_bytes": 65536}
    kit.run("cuda_demand_paging", **{**small, name: good})
    with pytest.raises(ParameterError, match=name):
        kit.run("cuda_demand_paging", **{**small, name: bad})


# What some of them do, in numbers.


@pytest.mark.parametrize(("sizes", "populated"), [("4K", 16), ("4K+64K", 16), ("4K+2M", 512), ("4K+64K+2M", 512)])
def test_one_cpu_touch_populates_the_largest_chunk_that_fits(sizes: str, populated: int) -> None:
    h = Harness(cpu_chunk_allocation_sizes=sizes)
    r = h.allocate(512)
    h.touch(pages(r, [100]))
    assert (h.where(r).count("C"), h.host.used) == (16, populated)
    h.check()


@pytest.mark.parametrize("order", [0, 1, 6])
def test_root_chunks_come_from_pma_in_batches(order: int) -> None:
    h = Harness(roots=100, pma_batch_nonpinned_order=order)
    r = h.allocate(70 * 512)
    h.prefetch(r.first, r.pages, 1)
    asked = [s for s in h.spans("alloc_root_chunk") if s["end"] - s["start"] > 0.99 * h.gpu.costs.pma_alloc]
    assert len(asked) == -(-70 // (1 << order))
    assert len(h.gpu.pmm.free_zeroed) == {0: 0, 1: 0, 6: 30}[order]


def test_a_channel_holds_no_more_pushes_than_it_has_entries() -> None:
    most = {}
    for entries in (32, 1024):
        h = Harness(roots=200, host_pages=1 << 18, channel_num_gpfifo_entries=entries)
        r = h.allocate(150 * 512)
        h.touch(pages(r, range(r.pages)))
        h.prefetch(r.first, r.pages, 1)
        copies = [s for s in h.spans("UvmEventTypeMigration") if s["actor"] == "copy HtoD"]
        pushed = [s["end"] for s in h.spans("block_copy_resident_pages_between")][-len(copies) :]
        most[entries] = max(
            sum(c["end"] > now and p <= now for c, p in zip(copies, pushed, strict=True)) for now in pushed
        )
    assert most[32] <= 31 < most[1024]


def test_random_settings_never_lose_anything() -> None:
    rng = random.Random(3)
    for _ in range(8):
        picked = {name: value for name, value, _ in rng.sample(CASES, 8) if name != "fault_batch_count"}
        run = kit.run("cuda_demand_paging", **{**RANDOM, "touches": 1500, "cpu_touches": 200, **picked})
        assert run.integrity.lost == 0 and not run.conformance.violations and not run.errors
