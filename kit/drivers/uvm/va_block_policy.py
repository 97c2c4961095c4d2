"""uvm_va_block.c, policy: where a faulting page goes."""

from __future__ import annotations

from kit.drivers.uvm.types import COUNT_PROT, CPU, GPU, READ_ONLY, VaBlock
from kit.drivers.uvm.va_block_populate import BlockContext
from kit.memory.table.pagemask import EMPTY, PageMask, bit, from_pages
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["ServiceContext", "pinned_mask", "uvm_va_block_select_residency"]


class ServiceContext:
    """uvm_service_block_context_t: one service operation, kept over its retries.

    ``wanted[prot]`` are the faulting pages whose access needs that right; ``new_residency[dest]`` those
    that go there; ``pinned`` pages that thrashing pinned (page to residency). Of a batch's faults:
    ``strongest`` the pages by access type, ``distinct`` their number, ``instances`` that of the faults.
    A throttled CPU fault tries again at ``wakeup_time_stamp``.
    """

    num_retries = 0
    did_migrate = False
    wakeup_time_stamp = 0.0
    strongest: dict[int, PageMask]
    distinct: int
    instances: int
    wanted: list[PageMask]
    new_residency: list[PageMask]
    pinned: dict[int, int]

    def __init__(self) -> None:
        self.block_context = BlockContext()

    def reset(self) -> None:
        """Start the operation, or start it again, keeping what the retry holds."""
        self.faulted = self.read_duplicate = self.prefetched = EMPTY
        self.wanted = [EMPTY] * COUNT_PROT
        self.new_residency, self.pinned = [EMPTY, EMPTY], {}


@step
def uvm_va_block_select_residency(block: VaBlock, thread: Thread, context: ServiceContext, processor: int) -> None:
    """Choose the destination of every faulting page (uvm_va_block.c).

    The driver asks page by page; here the same rules in the same order act on masks.
    """
    block_select_processor_residency(block, thread, context, processor)


@step
def block_select_processor_residency(block: VaBlock, thread: Thread, context: ServiceContext, processor: int) -> None:
    """Take the first rule that matches (uvm_va_block.c).

    Rules about HMM, native atomics and other processes do not arise over PCIe.
    """
    va_space, policy = block.range.va_space, block.range.policy
    todo, preferred, other = context.faulted, policy.preferred_location, 1 - processor
    advised = preferred is not None or policy.accessed_by or block.range.read_duplicate
    if not advised and not context.pinned and not va_space.module.fault_force_sysmem:
        context.new_residency[processor] = todo  # what the rules come to, wherever the pages are
        return
    chosen = [EMPTY, EMPTY]
    if va_space.module.fault_force_sysmem:
        chosen[CPU], todo = todo, EMPTY
    if block.range.read_duplicate:
        duplicated = todo & ~pinned_mask(context)
        context.read_duplicate |= duplicated & context.wanted[READ_ONLY]
        chosen[processor] |= duplicated
        todo &= ~duplicated
    if preferred == processor:
        chosen[processor] |= todo
        todo = EMPTY
    for index, residency in context.pinned.items():
        chosen[residency] |= todo & bit(index)
        todo &= ~bit(index)
    resident = block.resident
    reachable = preferred is not None and va_space.accessible(processor, preferred)
    target = preferred if preferred is not None and reachable else processor
    somewhere = resident[CPU] | resident[GPU]
    chosen[target] |= todo & ~somewhere
    todo &= somewhere
    if processor in policy.accessed_by:
        chosen[processor] |= todo & resident[processor]
        todo &= ~resident[processor]
        if va_space.accessible(processor, other):
            chosen[other] |= todo
            todo = EMPTY
    if preferred is not None and reachable:
        elsewhere = resident[other] & ~resident[processor]
        chosen[preferred] |= todo & elsewhere
        todo &= ~elsewhere
    chosen[processor] |= todo
    context.new_residency = chosen


def pinned_mask(context: ServiceContext) -> PageMask:
    """Return the mask of pages that thrashing pinned."""
    return from_pages(list(context.pinned)) if context.pinned else EMPTY
