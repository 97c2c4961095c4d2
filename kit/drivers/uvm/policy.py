"""uvm_policy.c: what cudaMemAdvise asks for."""

from __future__ import annotations

from kit.drivers.uvm.migrate import block_operation
from kit.drivers.uvm.types import CPU, GPU, NV_OK, VaBlock, VaRange, VaSpace
from kit.drivers.uvm.va_block_map import uvm_va_block_add_mappings, uvm_va_block_unmap
from kit.drivers.uvm.va_block_populate import BlockContext
from kit.drivers.uvm.va_block_residency import uvm_va_block_make_resident, uvm_va_block_make_resident_read_duplicate
from kit.drivers.uvm.va_block_split import split_span_as_needed
from kit.memory.table.pagemask import EMPTY
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "uvm_api_disable_read_duplication", "uvm_api_enable_read_duplication", "uvm_api_set_accessed_by",
    "uvm_api_set_preferred_location", "uvm_api_unset_accessed_by", "uvm_api_unset_preferred_location",
]  # fmt: skip


@waiting_step
def uvm_api_set_preferred_location(va_space: VaSpace, thread: Thread, first: int, pages: int, location: int) -> Wait:
    """Set the policy; nothing moves, the location's remote mappings go (uvm_policy.c)."""
    yield from preferred_location_set(va_space, thread, first, pages, location)


@waiting_step
def uvm_api_unset_preferred_location(va_space: VaSpace, thread: Thread, first: int, pages: int) -> Wait:
    """Forget the preferred location (uvm_policy.c)."""
    yield from preferred_location_set(va_space, thread, first, pages, None)


@waiting_step
def preferred_location_set(va_space: VaSpace, thread: Thread, first: int, pages: int, location: int | None) -> Wait:
    """Range by range, then wait for all of it (uvm_policy.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    tracker = 0.0
    for va_range in (yield from split_span_as_needed(va_space, thread, first, pages)):
        tracker = max(tracker, (yield from uvm_va_range_set_preferred_location(va_range, thread, location)))
    thread.now = max(thread.now, tracker)


@waiting_step
def uvm_va_range_set_preferred_location(va_range: VaRange, thread: Thread, location: int | None) -> Wait:
    """Block by block; returns the end of the blocks' work (uvm_va_range.c)."""
    policy, old, tracker = va_range.policy, va_range.policy.preferred_location, 0.0
    if location == old:
        return tracker
    policy.preferred_location = location
    for block in list(va_range.blocks.values()):
        if old is not None and old in policy.accessed_by:
            yield from uvm_va_block_set_accessed_by(block, thread, old)
        yield from block.lock.acquire(thread)
        uvm_va_block_set_preferred_location_locked(block, thread, location)
        tracker = max(tracker, block.tracker)
        yield from block.lock.release(thread)
    return tracker


@step
def uvm_va_block_set_preferred_location_locked(block: VaBlock, thread: Thread, location: int | None) -> None:
    """From now on the location maps only what is local to it (uvm_va_block.c)."""
    preferred_location_unmap_remote_pages(block, thread, location)


@step
def preferred_location_unmap_remote_pages(block: VaBlock, thread: Thread, location: int | None) -> None:
    """Remove its mappings of pages that live elsewhere (uvm_policy.c)."""
    if location is None:
        return
    remote = block.mapped(location) & ~block.resident[location]
    if remote:
        uvm_va_block_unmap(block, thread, location, remote)


@waiting_step
def uvm_api_set_accessed_by(va_space: VaSpace, thread: Thread, first: int, pages: int, processor: int) -> Wait:
    """Keep the processor mapped, now and after every move (uvm_policy.c)."""
    yield from accessed_by_set(va_space, thread, first, pages, processor, True)


@waiting_step
def uvm_api_unset_accessed_by(va_space: VaSpace, thread: Thread, first: int, pages: int, processor: int) -> Wait:
    """Stop keeping the processor mapped; present mappings stay (uvm_policy.c)."""
    yield from accessed_by_set(va_space, thread, first, pages, processor, False)


@waiting_step
def accessed_by_set(va_space: VaSpace, thread: Thread, first: int, pages: int, processor: int, on: bool) -> Wait:
    """Range by range (uvm_policy.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    for va_range in (yield from split_span_as_needed(va_space, thread, first, pages)):
        policy = va_range.policy
        if on:
            policy.accessed_by |= {processor}
            yield from uvm_va_range_set_accessed_by(va_range, thread, processor)
        else:
            policy.accessed_by -= {processor}


@waiting_step
def uvm_va_range_set_accessed_by(va_range: VaRange, thread: Thread, processor: int) -> Wait:
    """Block by block (uvm_va_range.c)."""
    for block in list(va_range.blocks.values()):
        yield from uvm_va_block_set_accessed_by(block, thread, processor)


@waiting_step
def uvm_va_block_set_accessed_by(block: VaBlock, thread: Thread, processor: int) -> Wait:
    """Map what is resident now, and wait for it; read duplication takes precedence (uvm_va_block.c)."""
    if block.range.read_duplicate:
        return
    yield from block.lock.acquire(thread)
    uvm_va_block_set_accessed_by_locked(block, thread, processor)
    thread.now = max(thread.now, block.tracker)
    yield from block.lock.release(thread)


@step
def uvm_va_block_set_accessed_by_locked(block: VaBlock, thread: Thread, processor: int) -> None:
    """Add the mappings (uvm_va_block.c)."""
    uvm_va_block_add_mappings(block, thread, block.all_pages, processor)


@waiting_step
def uvm_api_enable_read_duplication(va_space: VaSpace, thread: Thread, first: int, pages: int) -> Wait:
    """Read-mostly on: rights shrink to read, nothing is copied (uvm_policy.c)."""
    yield from read_duplication_set(va_space, thread, first, pages, True)


@waiting_step
def uvm_api_disable_read_duplication(va_space: VaSpace, thread: Thread, first: int, pages: int) -> Wait:
    """Read-mostly off: one copy survives (uvm_policy.c)."""
    yield from read_duplication_set(va_space, thread, first, pages, False)


@waiting_step
def read_duplication_set(va_space: VaSpace, thread: Thread, first: int, pages: int, on: bool) -> Wait:
    """Range by range (uvm_policy.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    for va_range in (yield from split_span_as_needed(va_space, thread, first, pages)):
        if va_range.policy.read_duplication == on:
            continue
        va_range.policy.read_duplication = on
        if va_space.can_read_duplicate:  # else only the user's wish is kept
            set_or_unset = uvm_va_range_set_read_duplication if on else uvm_va_range_unset_read_duplication
            yield from set_or_unset(va_range, thread)


@waiting_step
def uvm_va_range_set_read_duplication(va_range: VaRange, thread: Thread) -> Wait:
    """Block by block (uvm_va_range.c)."""
    for block in list(va_range.blocks.values()):
        yield from uvm_va_block_set_read_duplication(block, thread)


@waiting_step
def uvm_va_block_set_read_duplication(block: VaBlock, thread: Thread) -> Wait:
    """One block operation (uvm_va_block.c)."""
    yield from block_operation(block, thread, lambda c: va_block_set_read_duplication_locked(block, thread, c))


@waiting_step
def va_block_set_read_duplication_locked(block: VaBlock, thread: Thread, context: BlockContext) -> Wait:
    """Each holder keeps its pages as a read-only copy; returns NV_STATUS (uvm_va_block.c)."""
    for holder in (CPU, GPU):
        if block.resident[holder]:
            status: int = yield from uvm_va_block_make_resident_read_duplicate(
                block, thread, context, holder, block.resident[holder], EMPTY, "api"
            )
            if status != NV_OK:
                return status
    return NV_OK


@waiting_step
def uvm_va_range_unset_read_duplication(va_range: VaRange, thread: Thread) -> Wait:
    """Block by block (uvm_va_range.c)."""
    for block in list(va_range.blocks.values()):
        yield from uvm_va_block_unset_read_duplication(block, thread)


@waiting_step
def uvm_va_block_unset_read_duplication(block: VaBlock, thread: Thread) -> Wait:
    """One block operation (uvm_va_block.c)."""
    yield from block_operation(block, thread, lambda c: va_block_unset_read_duplication_locked(block, thread, c))


@waiting_step
def va_block_unset_read_duplication_locked(block: VaBlock, thread: Thread, context: BlockContext) -> Wait:
    """The preferred location's copy survives, else the lowest processor's; returns NV_STATUS (uvm_va_block.c)."""
    duplicated = block.read_duplicated
    preferred = block.range.policy.preferred_location
    survivor = CPU if preferred is None else preferred
    if duplicated:
        status: int = yield from uvm_va_block_make_resident(block, thread, context, survivor, duplicated, EMPTY, "api")
        if status != NV_OK:
            return status
    for processor in sorted(block.range.policy.accessed_by):
        uvm_va_block_set_accessed_by_locked(block, thread, processor)
    return NV_OK
