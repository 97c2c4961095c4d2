"""One GPU as the driver holds it: hardware layer, memory, page table, channels, fault buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from kit.drivers.uvm.channel import Channel
from kit.drivers.uvm.fault_buffer import FaultBuffer
from kit.drivers.uvm.hal import FAMILIES
from kit.drivers.uvm.module import ModuleParameters
from kit.drivers.uvm.pmm_gpu import Pmm
from kit.drivers.uvm.types import BLOCK_PAGES, GPU, READ_ONLY
from kit.errors import ParameterError
from kit.memory.columns import marked
from kit.memory.physical.content import Content
from kit.memory.physical.frames import Frames
from kit.memory.table.pagemask import PageMask, bools, run_count, runs
from kit.memory.table.pagetable import GEOMETRIES, PageTable
from kit.sim.costs import Costs
from kit.sim.engine import Engine, Thread
from kit.sim.locks import Lock
from kit.sim.machine import Machine

if TYPE_CHECKING:
    from kit.drivers.uvm.types import VaBlock, VaSpace

__all__ = ["COSTS", "Gpu"]

# Microseconds that a profile must give, and what each pays for.
COSTS: Final = {
    "interrupt": "fault buffer entry to running bottom half",
    "idle_wake": "the CPU of the bottom half woken from deep idle",
    "gpu_first_fault": "once, on the process's first GPU fault",
    "fetch_batch": "a look at PUT and the start of a batch",
    "fetch_entry": "one raw fault-buffer entry read and coalesced",
    "preprocess_entry": "one entry sorted and translated",
    "service_block": "locks and look-ups of one block in a batch",
    "service_fault": "policy of one faulting page",
    "prefetch_hint": "one prefetch tree",
    "gpu_state": "first GPU operation on a block, without its DMA mappings",
    "dma_map": "one CPU chunk mapped for the GPU",
    "unmap_cpu_run": "one unmap_mapping_range",
    "unmap_cpu_page": "one CPU entry removed",
    "map_cpu_page": "one CPU entry inserted",
    "chunk_alloc": "one GPU chunk taken",
    "pma_alloc": "one PMA batch",
    "zero_page": "one GPU page cleared by the copy engine",
    "cpu_alloc_chunk": "one CPU chunk allocated",
    "cpu_zero_page": "one CPU page cleared",
    "push": "one push begun and ended",
    "copy_command": "one copy-engine command written",
    "pte_write": "one GPU entry written by the GPU",
    "tlb_invalidate": "one TLB invalidate method",
    "membar_sys": "one system membar",
    "membar_gpu": "one GPU membar",
    "flush_buffer": "one fault-buffer flush",
    "replay": "one replay, push to resumed warps",
    "cpu_fault": "one CPU fault, kernel entry to return, without what it moves",
    "cpu_touch_page": "the program's own work on one page",
    "thread_hit": "one loop iteration of one GPU thread whose line is cached",
    "thread_miss": "one loop iteration of one warp whose line is not",
    "fault_interval": "spacing of entries arriving in the fault buffer",
    "launch": "one kernel launch and its end, without what it does",
    "touch_pause": "pause between touches of a single thread",
    "ioctl": "one UVM ioctl, without what it does",
    "cancel": "one cancel method and its wait",
}


class Unwritten:
    """What pushed entries of a block replace at `time`: rights by pages, and pages that lose the right to write."""

    __slots__ = ("before", "first", "lost", "pages", "slot", "time")

    def __init__(self, time: float, block: VaBlock, lost: PageMask) -> None:
        self.time, self.lost = time, lost
        self.first, self.slot, self.pages = block.first, block.slot[GPU], block.pages
        self.before = block.pte[GPU][READ_ONLY:]


class Gpu:
    """uvm_gpu_t with its parent.

    Parameters
    ----------
    engine : Engine
    machine : Machine
    module : ModuleParameters
    memory_bytes : int
        Memory for managed data, whole 2 MiB root chunks of it.
    payload_bytes : int
        Content carried for each page.
    fault_buffer_entries : int
        0: the machine's.

    Raises
    ------
    ParameterError
        The machine's profile lacks a constant, or the memory holds no root chunk.
    """

    def __init__(
        self, engine: Engine, machine: Machine, module: ModuleParameters, memory_bytes: int, payload_bytes: int,
        fault_buffer_entries: int = 0,
    ) -> None:  # fmt: skip
        if machine.architecture not in FAMILIES:
            raise ParameterError("architecture", machine.architecture, "one of " + ", ".join(FAMILIES))
        roots = memory_bytes // (BLOCK_PAGES * 4096)
        if roots < 1:
            raise ParameterError(
                "gpu_memory_bytes", memory_bytes, f"at least {BLOCK_PAGES * 4096} (one 2 MiB root chunk)"
            )
        self.engine, self.machine, self.module = engine, machine, module
        self.hal = FAMILIES[machine.architecture]
        self.costs = Costs(COSTS, {name: machine[name] for name in COSTS})
        # Microseconds of one copy by its pages.
        self.copy_htod, self.copy_dtoh = (
            machine.curves[name].by_pages(BLOCK_PAGES) for name in ("copy_htod", "copy_dtoh")
        )
        self.frames = Frames("GPU memory", roots * BLOCK_PAGES, payload_bytes)
        self.table = PageTable(GEOMETRIES[self.hal.geometry])
        self.pmm = Pmm(self, roots, 1 << module.pma_batch_nonpinned_order)
        entries = module.channel_num_gpfifo_entries
        self.cpu_to_gpu = Channel("CPU_TO_GPU", entries)
        self.gpu_to_cpu = Channel("GPU_TO_CPU", entries)
        self.gpu_internal = Channel("GPU_INTERNAL", entries)
        self.memops = Channel("MEMOPS", entries)
        self.fault_buffer = FaultBuffer(fault_buffer_entries or int(machine["fault_buffer_entries"]))
        self.service_lock = Lock()
        self.replay_event = engine.env.event()
        self.replays = 0
        self.prefetch_faults_supported = self.hal.prefetch_faults or module.force_prefetch_fault_support
        self.prefetch_faults_enabled = self.prefetch_faults_supported
        self.prefetch_faults_disabled_at = 0.0
        self.seen_fault = False
        self.group_has_copies = bool(machine["group_has_copies"])
        self.bottom_half: Thread | None = None
        self.unwatched: Thread | None = None  # whose pushes end before anybody can look at the table (`launch`)
        self._unwritten: list[Unwritten] = []
        self.cancelled: dict[int, str] = {}  # page -> reason
        self.cancelled_all = ""
        self.va_space: VaSpace | None = None

    def tlb_invalidate(self, mask: PageMask) -> float:
        """Return the cost of invalidating `mask`: a method a page or a range, or one for everything."""
        ranges = run_count(mask)
        units = ranges if self.hal.tlb_by_range else mask.bit_count()
        # More than four queued ranges become one invalidate-all (uvm_tlb_batch.h), as do too many pages.
        if ranges > 4 or units > self.hal.tlb_ranges_max:
            units = 1
        return units * float(self.costs.tlb_invalidate)

    def written_at(self, time: float, block: VaBlock, lost: PageMask) -> None:
        """A block's entries are written at `time`: until then the GPU finds the old ones and may write `lost` pages."""
        self._forget_written(self.engine.now)
        self._unwritten.append(Unwritten(time, block, lost))

    def rights_at(self, now: float) -> NDArray[np.uint8]:
        """Return the rights that the GPU finds in its table at a time, by slot; not to be written to."""
        self._forget_written(now)
        rights = self.table.rights
        if self._unwritten:
            rights = rights.copy()
            for each in reversed(self._unwritten):
                found = sum(bools(mask, each.pages).view(np.uint8) for mask in each.before)
                rights[each.slot : each.slot + each.pages] = found
        return rights

    def written_late(self, content: Content) -> list[NDArray[np.int64]]:
        """Return pages that were written though entries that have been pushed do not allow it any more."""
        found = []
        for each in self._unwritten:
            if each.lost and marked(content.marks, each.slot, runs(each.lost)):
                dirty = content.dirty[each.slot : each.slot + each.pages] & bools(each.lost, each.pages)
                found.append(each.first + dirty.nonzero()[0])
        return found

    def _forget_written(self, now: float) -> None:
        unwritten = self._unwritten
        while unwritten and unwritten[0].time <= now:  # pushes end in the order in which they were made
            unwritten.pop(0)

    def wake_stalled(self) -> None:
        """Let every stalled access try again: what a replay does."""
        self.replays += 1
        event, self.replay_event = self.replay_event, Event(self.engine.env)
        event.succeed()
