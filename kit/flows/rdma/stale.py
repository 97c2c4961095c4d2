"""Stale translations: an adapter that would look for an address's page where it no longer is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.mlx5.enums import MTT_PRESENT, PAGE_SHIFT
from kit.memory.types import PAGE

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.flows.rdma.content import Area
    from kit.flows.rdma.hosts import Host

__all__ = ["is_pinned", "stale_pages"]


def is_pinned(mr: Mlx5IbMr) -> bool:
    """Whether a region's pages are held where they are: nobody tells the adapter when their addresses get others."""
    return mr.umem is not None and not mr.is_odp and not mr.is_dmabuf


def stale_pages(host: Host, mr: Mlx5IbMr, area: Area, address: int, length: int) -> int:
    """Return how many of the pages of [address, address + length) a region's translations name wrongly.

    Parameters
    ----------
    host : Host
        Whose adapter and address space.
    mr : Mlx5IbMr
        An implicit region's child over the address is looked at in its place.
    area : Area
        Where the addresses are.
    """
    if mr.is_odp_implicit:
        child = mr.implicit_children.get(address >> host.dev.imr.mtt_shift)
        if child is None:
            return 0
        mr = child
    hca = host.dev.hca
    hardware = hca.mkeys.get(mr.mmkey.key)
    if hardware is None:
        return 0
    more = hardware.mkc.log_page_size - PAGE_SHIFT  # an entry names 1 << more pages, aligned
    pages = np.arange(address // PAGE, -(-(address + length) // PAGE))
    entries = hardware.entries[(pages >> more) - (mr.iova // PAGE >> more)]
    there = (entries & np.uint64(MTT_PRESENT)) != 0
    pfns, _ = hca.dma.resolve(entries & ~np.uint64(MTT_PRESENT))
    pfns = pfns + (pages & ((1 << more) - 1))
    return int((there & (pfns != area.frames(host.mm, int(pages[0]), len(pages)))).sum())
