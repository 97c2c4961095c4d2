"""uvm_va_block.c, mappings: rights of CPU and GPU, given, lowered and taken."""

from __future__ import annotations

from kit.drivers.uvm.perf_thrashing_events import thrashing_notify_revocation
from kit.drivers.uvm.types import (
    CPU,
    GPU,
    PAGE_SHIFT,
    READ_ONLY,
    READ_WRITE,
    READ_WRITE_ATOMIC,
    VaBlock,
    VaSpace,
)
from kit.drivers.uvm.va_block_ptes import downgrade_membar, push_ptes
from kit.memory.space.vm_insert import insert_runs, zap_runs
from kit.memory.table.pagemask import EMPTY, PageMask, runs
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = [
    "uvm_va_block_add_mappings", "uvm_va_block_add_mappings_after_migration", "uvm_va_block_map",
    "uvm_va_block_revoke_prot", "uvm_va_block_revoke_prot_mask", "uvm_va_block_unmap", "uvm_va_block_unmap_mask",
]  # fmt: skip


@step
def uvm_va_block_unmap_mask(block: VaBlock, thread: Thread, processors: tuple[int, ...], mask: PageMask) -> None:
    """Remove every right that `processors` have on pages of `mask` (uvm_va_block.c)."""
    for processor in processors:
        if block.pte[processor][READ_ONLY] & mask:
            uvm_va_block_unmap(block, thread, processor, mask)


@step
def uvm_va_block_unmap(block: VaBlock, thread: Thread, processor: int, mask: PageMask) -> None:
    """Remove one processor's mappings (uvm_va_block.c)."""
    mask &= block.pte[processor][READ_ONLY]
    if not mask:
        return
    thread.note(block.va, mask.bit_count())
    if processor == CPU:
        block_unmap_cpu(block, thread, mask)
    else:
        block_unmap_gpu(block, thread, mask)
    rights = block.pte[processor]
    for prot in (READ_ONLY, READ_WRITE, READ_WRITE_ATOMIC):
        rights[prot] &= ~mask


@step
def block_unmap_cpu(block: VaBlock, thread: Thread, mask: PageMask) -> None:
    """unmap_mapping_range per contiguous run; synchronous (uvm_va_block.c)."""
    va_space = block.range.va_space
    costs = va_space.gpu.costs
    for _, count in runs(mask):
        thread.charge(costs.unmap_cpu_run + count * costs.unmap_cpu_page)
    zap_runs(block.range.vma, block.slot[CPU], runs(mask), block.base(CPU))


@step
def block_unmap_gpu(block: VaBlock, thread: Thread, mask: PageMask) -> None:
    """Clear GPU entries, invalidate the TLB, membar; the next push on the block waits for it (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    push_ptes(block, thread, gpu, mask, 0, GPU, mask, downgrade_membar(block, gpu, mask))


@step
def uvm_va_block_map(
    block: VaBlock, thread: Thread, processor: int, mask: PageMask, prot: int, cause: str = "coherence"
) -> None:
    """Give `processor` at least right `prot` on pages of `mask` that have a copy it can reach (uvm_va_block.c)."""
    if processor == CPU and prot == READ_WRITE:
        prot = READ_WRITE_ATOMIC  # a CPU entry that may be written allows its atomics too
    rights, resident = block.pte[processor], block.resident
    reachable = resident[CPU]
    if processor == GPU:
        reachable |= resident[GPU]
    mask &= reachable & ~rights[prot]
    if not mask:
        return
    thread.note(block.va, mask.bit_count())
    if processor == CPU:
        block_map_cpu_to(block, thread, mask, prot)
    else:
        local = mask & resident[GPU]
        if local:
            block_map_gpu_to(block, thread, GPU, local, prot, cause)
        if mask != local:
            block_map_gpu_to(block, thread, CPU, mask & ~local, prot, cause)
    for at_most in range(READ_ONLY, prot + 1):
        rights[at_most] |= mask


@step
def block_map_cpu_to(block: VaBlock, thread: Thread, mask: PageMask, prot: int) -> None:
    """Insert CPU entries page by page, once the block's GPU work is over (uvm_va_block.c)."""
    va_space = block.range.va_space
    thread.now = max(thread.now, block.tracker)
    vma, slot = block.range.vma, block.slot[CPU]
    lower = mask & block.pte[CPU][READ_ONLY]
    if lower:  # an entry gives way to one with more rights
        zap_runs(vma, slot, runs(lower))
    insert_runs(vma, slot, runs(mask), block.frames[CPU], prot > READ_ONLY, block.base(CPU))
    thread.charge(mask.bit_count() * va_space.gpu.costs.map_cpu_page)


@step
def block_map_gpu_to(block: VaBlock, thread: Thread, location: int, mask: PageMask, prot: int, cause: str) -> None:
    """Write GPU entries that point at `location` (uvm_va_block.c)."""
    va_space = block.range.va_space
    gpu = va_space.gpu
    upgraded = mask & block.pte[GPU][READ_ONLY]
    push_ptes(block, thread, gpu, mask, prot, location, upgraded, 0.0)
    if location != GPU:
        for first, count in runs(mask):
            thread.engine.trace.span(
                "UvmEventTypeMapRemote", "gpu", thread.now, thread.now, parent=thread.row,
                va=block.va + (first << PAGE_SHIFT), pages=count, bytes=count << PAGE_SHIFT, cause=cause,
            )  # fmt: skip


@step
def uvm_va_block_revoke_prot_mask(
    block: VaBlock, thread: Thread, processors: tuple[int, ...], mask: PageMask, prot: int
) -> None:
    """Take right `prot` from several processors (uvm_va_block.c)."""
    for processor in processors:
        uvm_va_block_revoke_prot(block, thread, processor, mask, prot)


@step
def uvm_va_block_revoke_prot(block: VaBlock, thread: Thread, processor: int, mask: PageMask, prot: int) -> None:
    """Take right `prot` and everything above it away; lower rights stay (uvm_va_block.c)."""
    if processor == CPU and prot == READ_WRITE_ATOMIC:
        return  # the CPU's write right is what its atomics need: nothing to take
    mask &= block.pte[processor][prot]
    if not mask:
        return
    thread.note(block.va, mask.bit_count())
    if processor == CPU:
        block_revoke_cpu_write(block, thread, mask)
    else:
        block_revoke_prot_gpu_to(block, thread, mask, prot)
    for level in range(prot, READ_WRITE_ATOMIC + 1):
        block.pte[processor][level] &= ~mask


@step
def block_revoke_cpu_write(block: VaBlock, thread: Thread, mask: PageMask) -> None:
    """Unmap, then map again read-only: Linux has no other way for a driver (uvm_va_block.c)."""
    block_unmap_cpu(block, thread, mask)
    for level in range(READ_ONLY, READ_WRITE_ATOMIC + 1):
        block.pte[CPU][level] &= ~mask
    thrashing_notify_revocation(block, thread, mask, CPU)
    uvm_va_block_map(block, thread, CPU, mask, READ_ONLY)


@step
def block_revoke_prot_gpu_to(block: VaBlock, thread: Thread, mask: PageMask, prot: int) -> None:
    """Write lower rights over the GPU's entries and invalidate (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    location = GPU if mask & block.resident[GPU] else CPU
    membar = downgrade_membar(block, gpu, mask)
    push_ptes(block, thread, gpu, mask, prot - 1, location, mask, membar)
    block_revoke_prot_gpu_perf_notify(block, thread, mask)


@step
def block_revoke_prot_gpu_perf_notify(block: VaBlock, thread: Thread, mask: PageMask) -> None:
    """Tell listeners that the GPU lost rights (uvm_va_block.c)."""
    thrashing_notify_revocation(block, thread, mask, GPU)


@step
def uvm_va_block_add_mappings_after_migration(
    block: VaBlock,
    thread: Thread,
    mask: PageMask,
    prot: int,
    served: int,
    processors: tuple[int, ...],
    cause: str = "policy",
) -> None:
    """Map `processors` but the one that is served, with what its right leaves them (uvm_va_block.c)."""
    policy, va_space = block.range.policy, block.range.va_space
    if block.range.read_duplicate:
        return
    for location in (CPU, GPU):
        there = mask & block.resident[location] & ~block.read_duplicated & ~block.discarded
        for processor in processors:
            away = processor == policy.preferred_location and processor != location  # it never maps remote pages
            if there and processor != served and not away and va_space.accessible(processor, location):
                right = _right_beside(va_space, prot, served, processor, location)
                uvm_va_block_map(block, thread, processor, there, right, cause)


def _right_beside(va_space: VaSpace, prot: int, served: int, processor: int, location: int) -> int:
    """Return what `processor` may have on pages at `location` where `served` has `prot`."""
    if prot < READ_WRITE_ATOMIC:
        return prot
    if not va_space.native_atomics(served, location):
        return READ_WRITE if served == CPU else READ_ONLY
    return READ_WRITE_ATOMIC if va_space.native_atomics(processor, location) else READ_WRITE


@step
def uvm_va_block_add_mappings(block: VaBlock, thread: Thread, mask: PageMask, processor: int) -> None:
    """Map what is resident for a processor, with all that takes nothing from anybody (uvm_va_block.c)."""
    va_space, other = block.range.va_space, 1 - processor
    unmapped = ~(block.mapped(CPU) | block.mapped(GPU))
    by_prot = {READ_ONLY: EMPTY, READ_WRITE: EMPTY, READ_WRITE_ATOMIC: EMPTY}
    for location in (CPU, GPU):
        if va_space.accessible(processor, location):
            todo = mask & block.resident[location] & ~block.read_duplicated & ~block.discarded
            atomics = EMPTY if va_space.native_atomics(other, location) else block.pte[other][READ_WRITE_ATOMIC]
            writes = EMPTY if va_space.native_atomics(processor, location) else block.pte[other][READ_WRITE]
            by_prot[READ_ONLY] |= todo & ~unmapped & atomics
            by_prot[READ_WRITE] |= todo & ~unmapped & ~atomics & writes
            by_prot[READ_WRITE_ATOMIC] |= todo & (unmapped | ~atomics & ~writes)
    for prot, pages in by_prot.items():
        if pages:
            uvm_va_block_map(block, thread, processor, pages, prot, "policy")
