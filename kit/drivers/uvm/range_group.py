"""uvm_range_group.c: GPUs without page faults (UVM-Lite). Whole ranges move when a kernel is launched."""

from __future__ import annotations

from functools import partial

from kit.drivers.uvm.migrate import block_operation
from kit.drivers.uvm.types import CPU, GPU, NV_OK, READ_WRITE_ATOMIC, VaBlock, VaRange, VaSpace
from kit.drivers.uvm.va_block_map import uvm_va_block_map, uvm_va_block_unmap
from kit.drivers.uvm.va_block_populate import BlockContext
from kit.drivers.uvm.va_block_residency import uvm_va_block_make_resident
from kit.drivers.uvm.va_range import uvm_va_range_block_create
from kit.memory.table.pagemask import EMPTY
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "uvm_api_allow_migration_range_groups", "uvm_api_prevent_migration_range_groups", "uvm_api_set_range_group",
]  # fmt: skip


@waiting_step
def uvm_api_set_range_group(va_space: VaSpace, thread: Thread, va_range: VaRange) -> Wait:
    """At allocation: the GPU is the preferred location and the whole range is populated there (uvm_range_group.c)."""
    va_range.policy.preferred_location = GPU
    yield from uvm_range_group_va_range_migrate(va_range, thread)


@waiting_step
def uvm_api_prevent_migration_range_groups(va_space: VaSpace, thread: Thread) -> Wait:
    """Before a launch: bring every range that left home, and let nobody touch it until it ends (uvm_range_group.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    yield from uvm_range_groups_set_migration_policy(va_space, thread, False)


@waiting_step
def uvm_api_allow_migration_range_groups(va_space: VaSpace, thread: Thread) -> Wait:
    """After synchronisation: only the flag changes (uvm_range_group.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    yield from uvm_range_groups_set_migration_policy(va_space, thread, True)


@waiting_step
def uvm_range_groups_set_migration_policy(va_space: VaSpace, thread: Thread, allow: bool) -> Wait:
    """Set the flag of every range; when migration stops, move first (uvm_range_group.c)."""
    for va_range in va_space.ranges:
        va_range.migratable = allow
    if not allow:
        yield from uvm_range_group_prevent_migration(va_space, thread)


@waiting_step
def uvm_range_group_prevent_migration(va_space: VaSpace, thread: Thread) -> Wait:
    """Ranges with a page away from the preferred location; the others cost nothing (uvm_range_group.c)."""
    end = thread.now
    for va_range in va_space.ranges:
        if any(block.resident[CPU] for block in va_range.blocks.values()):
            end = max(end, (yield from uvm_range_group_va_range_migrate(va_range, thread)))
    thread.now = max(thread.now, end)
    yield from thread.sync()


@waiting_step
def uvm_range_group_va_range_migrate(va_range: VaRange, thread: Thread) -> Wait:
    """All blocks of the range; returns when the copies end (uvm_range_group.c)."""
    page, end = va_range.first, 0.0
    while page < va_range.end:
        block = uvm_va_range_block_create(va_range, thread, page)
        operation = partial(uvm_range_group_va_range_migrate_block_locked, block, thread)
        yield from block_operation(block, thread, operation)
        end = max(end, block.tracker)
        page = block.first + block.pages
    return end


@waiting_step
def uvm_range_group_va_range_migrate_block_locked(block: VaBlock, thread: Thread, context: BlockContext) -> Wait:
    """Unmap the CPU, make the whole block resident, map the GPU with every right; NV_STATUS (uvm_range_group.c)."""
    uvm_va_block_unmap(block, thread, CPU, block.all_pages)
    status: int = yield from uvm_va_block_make_resident(
        block, thread, context, GPU, block.all_pages, EMPTY, "range_group"
    )
    if status == NV_OK:
        uvm_va_block_map_mask(block, thread)
    return status


@step
def uvm_va_block_map_mask(block: VaBlock, thread: Thread) -> None:
    """Map the UVM-Lite GPUs (uvm_va_block.c)."""
    uvm_va_block_map(block, thread, GPU, block.all_pages, READ_WRITE_ATOMIC)
