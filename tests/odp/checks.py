"""What must hold of a host with an on-demand device: at any moment, and when everything has come to its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kit.drivers.mlx5.enums import MTT_WRITE, Era, WcStatus
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.drivers.mlx5.umem.odp import IbUmemOdp
from kit.memory.device.hmm_entries import HMM_PFN_DMA_MAPPED, HMM_PFN_VALID, HMM_PFN_WRITE
from kit.memory.invariants import check_invariants
from kit.memory.types import Bit, Kind
from kit.sim.engine import Engine

LOW_BITS = np.uint64(3)
MAPPED, WRITE = np.uint64(HMM_PFN_VALID | HMM_PFN_DMA_MAPPED), np.uint64(HMM_PFN_WRITE)
NONE = np.zeros(0, dtype=np.uint64)


class Broken(AssertionError):
    """An invariant does not hold; the first word says which."""


def need(holds: object, what: str) -> None:
    """Assert an invariant under its name."""
    if not holds:
        raise Broken(what)


class Checks:
    """The invariants, on every host of a schedule."""

    era: Era
    pages: int
    hosts: tuple[Any, ...]
    engine: Engine

    def check(self, what: str) -> None:
        """What holds at any moment, on both hosts."""
        try:
            for host in self.hosts:
                self.check_host(host)
        except Broken as error:
            error.add_note(f"after {what}")
            raise

    def check_host(self, host: Any) -> None:
        dma, mkeys = host.hca.dma, host.hca.mkeys
        need(not dma.stale, "stale DMA: an access through a translation that outlived its page")
        need(not dma.errors, "DMA address unmapped twice")
        need(not host.hca.counters.unknown_resumes, "page fault resumed twice")
        need((host.memory.refcount[: len(dma.mapped)][dma.mapped > 0] > 0).all(), "a free page is mapped for DMA")
        for mr in odp_regions(host):
            if not mr.is_odp_implicit:
                self.check_entries(host, mr)
                continue
            table = mkeys.get(mr.mmkey.key)
            if table is None or table.mkc.free:
                continue
            for idx, child in list(mr.implicit_children.items()):
                need(not child.dead, "a freed child is in implicit_children")
                self.check_entries(host, child)
                key = int(table.entries["key"][idx])
                below = mkeys.get(key)
                need(below is not None and (not below.mkc.free), "a slot names a key that is gone")

    def check_entries(self, host: Any, mr: Mlx5IbMr) -> None:
        """Hardware entry => driver's entry => the CPU's page, with no more rights than each allows."""
        odp, low, high = window(host, mr, self.pages)
        if odp is None or low >= high:
            return
        soft = odp.dma_list[low:high]
        if self.era < Era.NEW:
            at = np.flatnonzero(soft)
            writes = (soft[at] & np.uint64(2)) != 0
        else:
            pfns = odp.pfn_list[low:high]
            at = np.flatnonzero((pfns & MAPPED) == MAPPED)
            writes = (pfns[at] & WRITE) != 0
        key = host.hca.mkeys.get(mr.mmkey.key)
        usable = key is not None and not key.mkc.free and mr.lkey == key.key
        hard = key.entries[low:high] if key is not None and usable else NONE
        if not len(at):
            need(not hard.any(), "MTT present for a page that is not mapped")
            return
        addresses = soft[at] & ~LOW_BITS
        frames, stale = host.hca.dma.resolve(addresses)
        need(not stale.any(), "the driver's list names a DMA address that is not mapped")
        table = host.mm.table
        slots = table.slots_of((odp.start >> 12) + low + at)
        need((slots >= 0).all() and (table.kind[slots] == Kind.PRESENT).all(), "mapped, but the CPU's page is gone")
        need((table.frame[slots] == frames).all(), "mapped, but the CPU has another page")
        if not usable:
            return
        mine = hard[at]
        need(np.count_nonzero(hard) == np.count_nonzero(mine), "MTT present for a page that is not mapped")
        need(((mine == 0) | (mine & ~LOW_BITS == addresses)).all(), "MTT of another page")
        may = (mine & np.uint64(MTT_WRITE)) != 0
        if odp.umem_mutex.holder is None:  # else a right may be on its way out of the hardware
            need(not (may & ~writes).any(), "MTT writable, the driver's entry is not")
        need(not (may & (table.bits[slots] & Bit.WRITABLE == 0)).any(), "MTT writable, the CPU's entry is not")

    def check_end(self) -> None:
        """Nothing is left: no fault, no use, no pin, no mapping, no key that two own."""
        for host in self.hosts:
            hca, dev = host.hca, host.dev
            self.check_host(host)
            need(not hca.outstanding_faults, "a page fault was never resumed")
            need(hca.counters.resumes == hca.counters.page_faults, "faults and resumes differ")
            need(dev.odp_pf_eq is None or dev.odp_pf_eq.pool.out == 0, "fault descriptors are lost")
            need(not dev.odp_mkeys, "keys are left in odp_mkeys")
            need(all(mr.dead and mr.mmkey.usecount == 0 for mr in host.all_mrs), "uses are left")
            need(dev.system_unbound_wq.active == 0 and dev.umrc.state <= 1, "work is left")
            need(hca.dma.live == 0, "pages are still mapped for DMA")
            need(host.mm.pinned_vm == 0 and not host.memory.pincount.any(), "pins are left")
            need(dev.umrc.sem.count == 128, "UMR places are lost")
            free = [key for ent in dev.cache.ents.values() for key in ent.mkeys]
            need(len(set(free)) == len(free), "a key is in the cache twice")
            need(all(hca.mkeys.get(key) is not None for key in free), "the cache holds a key that is gone")
            need("umr" not in refused_steps(self.engine), "a UMR request was refused")
            check_invariants(host.memory, [mm for mm in host.mms if mm.mm_users or mm.vmas])


def odp_regions(host: Any) -> Iterator[Mlx5IbMr]:
    """On-demand regions that faults can find."""
    for region in host.regions:
        if not region.mr.dead and region.kind != "pinned":
            yield region.mr


def window(host: Any, mr: Mlx5IbMr, pages: int) -> tuple[IbUmemOdp | None, int, int]:
    """Entries of a region, or of a child the few of the area that is used."""
    odp = mr.umem
    if not isinstance(odp, IbUmemOdp) or not len(odp.dma_list):
        return None, 0, 0
    if mr.parent is None:
        return odp, 0, odp.num_pages()
    start = odp.start >> 12
    end = host.first + (pages if host is host.plan.server else 32 * 9)
    return odp, max(host.first - start, 0), min(end - start, odp.num_pages())


def refused_steps(engine: Engine) -> set[str]:
    """Names of steps that ended with the status of a refused UMR request."""
    trace = engine.trace
    if WcStatus.MW_BIND_ERR.name not in trace.statuses.ids:
        return set()
    rows = trace.spans.column("status") == trace.statuses.ids[WcStatus.MW_BIND_ERR.name]
    return {trace.steps.words[int(number)] for number in np.unique(trace.spans.column("step")[rows])}
