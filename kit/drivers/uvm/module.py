"""Module parameters of nvidia-uvm (tag 580.105.08): name, default, bounds, meaning. The one list."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ModuleParameters"]


def _parameter(
    default: Any, documented: str, help: str, *, unit: str = "", choices: tuple[Any, ...] = (), **bounds: Any
) -> Any:
    facts = {"documented": documented, "help": help, "unit": unit, "choices": choices, "bounds": bounds}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class ModuleParameters:
    """What ``modprobe nvidia-uvm`` takes, as far as the modelled mechanisms read it.

    Field names are the documented ones without ``uvm_`` or ``uvm_perf_`` (`documented` in the
    field's metadata is the whole name). Source: ``module_param`` lines of kernel-open/nvidia-uvm.
    """

    prefetch_enable: bool = _parameter(True, "uvm_perf_prefetch_enable", "tree prefetch")
    prefetch_threshold: int = _parameter(
        51,
        "uvm_perf_prefetch_threshold",
        "share of a tree node above which it is fetched whole",
        unit="%",
        ge=1,
        le=100,
    )
    prefetch_min_faults: int = _parameter(
        1, "uvm_perf_prefetch_min_faults", "faults on a block before prefetch acts", ge=1, le=20
    )
    fault_batch_count: int = _parameter(
        256, "uvm_perf_fault_batch_count", "raw fault entries in a batch", ge=1, le=1 << 20
    )
    fault_replay_policy: int = _parameter(
        2, "uvm_perf_fault_replay_policy", "0 BLOCK, 1 BATCH, 2 BATCH_FLUSH, 3 ONCE", choices=(0, 1, 2, 3)
    )
    fault_replay_update_put_ratio: int = _parameter(
        50, "uvm_perf_fault_replay_update_put_ratio", "share of duplicates above which a flush re-reads PUT",
        unit="%", ge=0, le=100,
    )  # fmt: skip
    fault_max_batches_per_service: int = _parameter(
        20, "uvm_perf_fault_max_batches_per_service", "batches in one service call", ge=1
    )
    fault_max_throttle_per_service: int = _parameter(
        5, "uvm_perf_fault_max_throttle_per_service", "batches with throttled faults in one service call", ge=1
    )
    fault_coalesce: bool = _parameter(True, "uvm_perf_fault_coalesce", "merge duplicate faults while fetching")
    reenable_prefetch_faults_lapse_msec: int = _parameter(
        1000, "uvm_perf_reenable_prefetch_faults_lapse_msec", "pause after too many invalid prefetch faults",
        unit="ms", ge=0,
    )  # fmt: skip
    force_prefetch_fault_support: bool = _parameter(
        False,
        "uvm_force_prefetch_fault_support",
        "let prefetch instructions fault on GPUs where they do not by default",
    )
    thrashing_enable: bool = _parameter(True, "uvm_perf_thrashing_enable", "thrashing detection")
    thrashing_threshold: int = _parameter(
        3, "uvm_perf_thrashing_threshold", "events on a page before it thrashes", ge=1, le=7
    )
    thrashing_pin_threshold: int = _parameter(
        10, "uvm_perf_thrashing_pin_threshold", "throttles before a page is pinned", ge=1, le=255
    )
    thrashing_lapse_usec: int = _parameter(
        500, "uvm_perf_thrashing_lapse_usec", "events closer than this are suspicious", unit="us", ge=1
    )
    thrashing_nap: int = _parameter(1, "uvm_perf_thrashing_nap", "throttle period, in lapses", ge=1, le=250)
    thrashing_epoch: int = _parameter(2000, "uvm_perf_thrashing_epoch", "lapses until counters are reset", ge=1)
    thrashing_pin: int = _parameter(300, "uvm_perf_thrashing_pin", "pin duration in lapses, 0: for ever", ge=0)
    thrashing_max_resets: int = _parameter(
        4, "uvm_perf_thrashing_max_resets", "resets after which a block's counters stop", ge=0
    )
    pma_batch_nonpinned_order: int = _parameter(
        6, "uvm_perf_pma_batch_nonpinned_order", "root chunks taken from PMA at a time, as a power of two", ge=0, le=12
    )
    cpu_chunk_allocation_sizes: str = _parameter(
        "4K+64K+2M", "uvm_cpu_chunk_allocation_sizes", "CPU chunk sizes tried, largest first",
        choices=("4K", "4K+64K", "4K+2M", "4K+64K+2M"),
    )  # fmt: skip
    fault_force_sysmem: bool = _parameter(
        False, "uvm_fault_force_sysmem", "serve every fault from system memory (needs the driver's built-in tests)"
    )
    downgrade_force_membar_sys: bool = _parameter(
        True, "uvm_downgrade_force_membar_sys", "system membar on unmap and downgrade, instead of a GPU-wide one"
    )
    channel_num_gpfifo_entries: int = _parameter(
        1024, "uvm_channel_num_gpfifo_entries", "pushes that a channel holds", ge=32, le=1 << 20
    )
