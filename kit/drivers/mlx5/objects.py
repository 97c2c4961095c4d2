"""The driver's objects: protection domain, mkey, memory region, counters (mlx5_ib.h, ib_verbs.h)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kit.drivers.mlx5.core.waiting import WaitQueue
from kit.drivers.mlx5.enums import PAGE_SHIFT

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.mr.mkey_cache import CacheEnt
    from kit.drivers.mlx5.umem.odp import IbUmemOdp
    from kit.drivers.mlx5.umem.umem import IbUmem
    from kit.memory.space.mm import Mm

__all__ = [
    "MKEY_IMPLICIT_CHILD", "MKEY_INDIRECT_DEVX", "MKEY_MR", "MKEY_MW", "MKEY_NULL", "PF_DOWNGRADE", "PF_ENABLE",
    "PF_SNAPSHOT", "UPD_XLT_ACCESS", "UPD_XLT_ADDR", "UPD_XLT_ATOMIC", "UPD_XLT_DOWNGRADE", "UPD_XLT_ENABLE",
    "UPD_XLT_INDIRECT", "UPD_XLT_KEEP_PGSZ", "UPD_XLT_PD", "UPD_XLT_ZAP", "IbPd", "Mlx5IbMkey", "Mlx5IbMr",
    "OdpStats", "RbKey",
]  # fmt: skip

# enum mlx5_mkey_type (mlx5_ib.h @ 7.0)
MKEY_MR, MKEY_MW, MKEY_INDIRECT_DEVX, MKEY_NULL, MKEY_IMPLICIT_CHILD = range(1, 6)
# MLX5_IB_UPD_XLT_* (mlx5_ib.h @ 7.0); plain integers: they are combined on every fault
UPD_XLT_ZAP, UPD_XLT_ENABLE, UPD_XLT_ATOMIC, UPD_XLT_ADDR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
UPD_XLT_PD, UPD_XLT_ACCESS, UPD_XLT_INDIRECT, UPD_XLT_DOWNGRADE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
UPD_XLT_KEEP_PGSZ = 1 << 8  # 6.9 has no such flag
# MLX5_PF_FLAGS_* (odp.c @ 7.0)
PF_DOWNGRADE, PF_SNAPSHOT, PF_ENABLE = 1 << 1, 1 << 2, 1 << 3


class RbKey(NamedTuple):
    """What a UMR cannot change about an mkey (struct mlx5r_cache_rb_key); compared in this order."""

    ats: int
    access_mode: int
    access_flags: int
    ndescs: int


@dataclass(eq=False)
class IbPd:
    """A protection domain of a process (struct ib_pd).

    Attributes
    ----------
    dev : Mlx5IbDev
    pdn : int
    mm : Mm or None
        The address space of the process that calls the verbs (``current->mm``); None in the kernel's own.
    """

    dev: Mlx5IbDev
    pdn: int
    mm: Mm | None = None


@dataclass(eq=False)
class Mlx5IbMkey:
    """Struct mlx5_ib_mkey: a key, how many use it right now, and where it goes back to.

    Attributes
    ----------
    mr : Mlx5IbMr or None
        The region that contains it (container_of).
    usecount : int
        Whoever looks it up in ``odp_mkeys`` holds one; the table itself holds one.
    """

    key: int = 0
    type: int = MKEY_MR
    ndescs: int = 0
    usecount: int = 0
    wait: WaitQueue = field(default_factory=WaitQueue)
    cache_ent: CacheEnt | None = None
    rb_key: RbKey | None = None
    cacheable: bool = False
    mr: Mlx5IbMr | None = None


@dataclass
class OdpStats:
    """Struct ib_odp_counters: 4 KiB pages for faults and prefetch, entries for invalidations, operations handled."""

    faults: int = 0
    faults_handled: int = 0
    invalidations: int = 0
    invalidations_handled: int = 0
    prefetch: int = 0


@dataclass(eq=False)
class Mlx5IbMr:
    """Struct mlx5_ib_mr with its ib_mr: a memory region.

    Attributes
    ----------
    pd : IbPd
    umem : IbUmem or IbUmemOdp or None
    iova, length : int
        What the key translates, bytes.
    parent : Mlx5IbMr or None
        A child of an implicit region has one.
    implicit_children : dict of int to Mlx5IbMr
        By slot of the parent (xarray; looked up and changed without yielding, which is its lock).
    dmabuf_faulted : bool
        A dma-buf that has been mapped before; from then on another page size has to be changed with care.
    dead : bool
        Deregistered: the struct is freed.
    """

    dev: Mlx5IbDev
    pd: IbPd
    mmkey: Mlx5IbMkey = field(default_factory=Mlx5IbMkey)
    umem: IbUmem | IbUmemOdp | None = None
    lkey: int = 0
    rkey: int = 0
    iova: int = 0
    length: int = 0
    page_shift: int = PAGE_SHIFT
    access_flags: int = 0
    parent: Mlx5IbMr | None = None
    implicit_children: dict[int, Mlx5IbMr] = field(default_factory=dict)
    odp_stats: OdpStats = field(default_factory=OdpStats)
    is_odp_implicit: bool = False
    null_mmkey: Mlx5IbMkey = field(default_factory=lambda: Mlx5IbMkey(type=MKEY_NULL))
    dmabuf_faulted: bool = False
    dead: bool = False

    def __post_init__(self) -> None:
        self.mmkey.mr = self.null_mmkey.mr = self

    @property
    def is_odp(self) -> bool:
        """Whether its pages come on demand (is_odp_mr)."""
        return self.umem is not None and self.umem.is_odp

    @property
    def is_dmabuf(self) -> bool:
        """Whether it is memory that another driver exports (is_dmabuf_mr)."""
        return self.umem is not None and self.umem.is_dmabuf
