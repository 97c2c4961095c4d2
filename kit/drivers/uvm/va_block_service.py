"""uvm_va_block.c, one service operation on a block: prefetch, copy, residency, rights."""

from __future__ import annotations

from kit.drivers.uvm.perf_prefetch import uvm_perf_prefetch_get_hint_va_block
from kit.drivers.uvm.types import CPU, GPU, NV_OK, READ_ONLY, READ_WRITE, READ_WRITE_ATOMIC, VaBlock
from kit.drivers.uvm.va_block_map import (
    uvm_va_block_add_mappings_after_migration,
    uvm_va_block_map,
    uvm_va_block_revoke_prot_mask,
    uvm_va_block_unmap,
)
from kit.drivers.uvm.va_block_policy import ServiceContext, pinned_mask
from kit.drivers.uvm.va_block_residency import (
    uvm_va_block_make_resident_copy,
    uvm_va_block_make_resident_finish,
    uvm_va_block_make_resident_read_duplicate,
)
from kit.memory.table.pagemask import EMPTY, PageMask, bit, holds
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["uvm_va_block_service_locked"]


@waiting_step
def uvm_va_block_service_locked(block: VaBlock, thread: Thread, context: ServiceContext, processor: int) -> Wait:
    """Prefetch, then copy and finish for each destination, the CPU first; returns NV_STATUS (uvm_va_block.c)."""
    thread.note(block.va, context.faulted.bit_count())
    uvm_va_block_get_prefetch_hint(block, thread, context)
    for destination in (CPU, GPU):
        if not context.new_residency[destination]:
            continue
        status: int = yield from uvm_va_block_service_copy(block, thread, context, processor, destination)
        if status != NV_OK:
            return status
        uvm_va_block_service_finish(block, thread, context, processor, destination)
    return NV_OK


@step
def uvm_va_block_get_prefetch_hint(block: VaBlock, thread: Thread, context: ServiceContext) -> None:
    """Ask the tree, only when exactly one destination is in play (uvm_va_block.c)."""
    to_cpu, to_gpu = context.new_residency
    if bool(to_cpu) == bool(to_gpu):
        return
    destination = GPU if to_gpu else CPU
    pages = context.new_residency[destination]
    context.prefetched = hint = uvm_perf_prefetch_get_hint_va_block(block, thread, destination, pages)
    context.new_residency[destination] = pages | hint
    if block.range.read_duplicate and not block.range.va_space.module.fault_force_sysmem:
        context.read_duplicate |= hint


@waiting_step
def uvm_va_block_service_copy(
    block: VaBlock, thread: Thread, context: ServiceContext, processor: int, destination: int
) -> Wait:
    """Read duplicates first, then pages to move; the CPU waits for what reaches it; NV_STATUS (uvm_va_block.c)."""
    pages, inner, prefetched = context.new_residency[destination], context.block_context, context.prefetched
    inner.pages_changed_residency, inner.did_copy = EMPTY, False
    inner.dest, inner.cause = destination, "fault"
    duplicated, status = pages & context.read_duplicate, NV_OK
    if duplicated:
        status = yield from uvm_va_block_make_resident_read_duplicate(
            block, thread, inner, destination, duplicated, prefetched, "fault"
        )
        pages &= ~duplicated
    if pages and status == NV_OK:
        status = yield from uvm_va_block_make_resident_copy(
            block, thread, inner, destination, pages, prefetched, "fault"
        )
    if status == NV_OK and inner.did_copy:
        context.did_migrate = True
        if destination == CPU:
            thread.now = max(thread.now, block.tracker)
    return status


@step
def uvm_va_block_service_finish(
    block: VaBlock, thread: Thread, context: ServiceContext, processor: int, destination: int
) -> None:
    """Residency, then rights: revoke, map the faulter, map accessed-by processors (uvm_va_block.c)."""
    pages, inner = context.new_residency[destination], context.block_context
    moved = pages & ~context.read_duplicate
    if moved:
        uvm_va_block_make_resident_finish(block, thread, inner, moved)
    stayed = pages & ~inner.pages_changed_residency
    by_prot = _compute_new_permission(block, context, pages, processor, destination)
    block_service_finish_revoke_prot(block, thread, by_prot, stayed, processor, destination)
    block_service_finish_map(block, thread, context, by_prot, processor)
    if block.range.policy.accessed_by or context.pinned:
        block_service_finish_map_accessed_by(block, thread, context, by_prot, processor)
    if block.discarded:
        block.discarded &= ~(by_prot[READ_WRITE] | by_prot[READ_WRITE_ATOMIC])


def _compute_new_permission(
    block: VaBlock, context: ServiceContext, pages: PageMask, processor: int, destination: int
) -> list[PageMask]:
    """Return pages by right: what the access needs, raised where that takes nothing from anybody (query_promote)."""
    va_space, wanted = block.range.va_space, context.wanted
    atomic = pages & wanted[READ_WRITE_ATOMIC]
    write = pages & wanted[READ_WRITE]
    read = pages & ~(atomic | write)
    contested = EMPTY
    for other in va_space.contenders[destination]:
        contested |= block.pte[other][READ_WRITE_ATOMIC]
    may_duplicate = block.all_pages if block.range.read_duplicate else block.read_duplicated
    promoted = read & ~(may_duplicate | contested | block.discarded)
    read ^= promoted
    write |= promoted
    if va_space.native_atomics(processor, destination):
        write, atomic = EMPTY, atomic | write
    return [EMPTY, read, write, atomic]


@step
def block_service_finish_revoke_prot(
    block: VaBlock, thread: Thread, by_prot: list[PageMask], stayed: PageMask, processor: int, destination: int
) -> None:
    """Pages that did not move and get more than read-only: others lose what conflicts (uvm_va_block.c)."""
    va_space = block.range.va_space
    for prot in (READ_WRITE, READ_WRITE_ATOMIC):
        pages = by_prot[prot] & stayed
        if not pages:
            continue
        for other in (CPU, GPU):
            if other == processor or not block.pte[other][READ_ONLY] & pages:
                continue
            like_write = prot == READ_WRITE or va_space.native_atomics(processor, destination)
            if like_write and va_space.native_atomics(other, destination):
                continue
            revoked = READ_WRITE_ATOMIC if like_write and other == GPU else READ_WRITE
            taken = pages & block.pte[other][revoked]
            if taken:
                uvm_va_block_revoke_prot_mask(block, thread, (other,), taken, revoked)


@step
def block_service_finish_map(
    block: VaBlock, thread: Thread, context: ServiceContext, by_prot: list[PageMask], processor: int
) -> None:
    """Map the faulter: read-only pages, then read-write, then atomics (uvm_va_block.c)."""
    pinned = pinned_mask(context)
    for prot, pages in enumerate(by_prot):
        if not pages:
            continue
        if processor == CPU:
            uvm_va_block_unmap(block, thread, CPU, pages)
        if pages & pinned:
            uvm_va_block_map(block, thread, processor, pages & pinned, prot, "thrashing")
            pages &= ~pinned
        if pages:
            uvm_va_block_map(block, thread, processor, pages, prot, "policy")


@step
def block_service_finish_map_accessed_by(
    block: VaBlock, thread: Thread, context: ServiceContext, by_prot: list[PageMask], processor: int
) -> None:
    """Pinned pages: everybody who fought over them; the others: accessed-by processors (uvm_va_block.c)."""
    info, accessed_by = block.thrashing, tuple(sorted(block.range.policy.accessed_by))
    for prot, pages in enumerate(by_prot):
        for index in context.pinned:
            if holds(pages, index) and info is not None and info.page is not None:
                fighters = tuple(p for p in (CPU, GPU) if info.page.processors[index] >> p & 1)
                uvm_va_block_add_mappings_after_migration(
                    block, thread, bit(index), prot, processor, fighters, "thrashing"
                )
                pages &= ~bit(index)
        if pages and accessed_by:
            uvm_va_block_add_mappings_after_migration(block, thread, pages, prot, processor, accessed_by)
