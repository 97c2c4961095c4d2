"""One mlx5 RDMA device as its driver sees it: capabilities, tables, locks, and what can be made to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kit.drivers.mlx5.caps import NO_GENERAL, HcaCaps, OdpCaps, OdpGeneral, OdpTransport
from kit.drivers.mlx5.core.waiting import Semaphore, WaitQueue, Workqueue
from kit.drivers.mlx5.enums import PAGE_SHIFT, U64_MAX, Era
from kit.drivers.mlx5.inject import Injection
from kit.drivers.mlx5.objects import IbPd, Mlx5IbMkey
from kit.sim.costs import Costs
from kit.sim.engine import Thread
from kit.sim.locks import Lock
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.drivers.mlx5.mr.mkey_cache import MkeyCache
    from kit.drivers.mlx5.odp.pf_eq import PfEq
    from kit.sim.engine import Engine

__all__ = [
    "MAX_UMR_WR", "MLX5_MAX_UMR_SHIFT", "TASK_SIZE", "UMR_ACTIVE", "UMR_ERR", "UMR_RECOVER", "UMR_UNINIT", "Imr",
    "Injection", "Mlx5IbDev", "OdpOptions", "UmrCommon", "imr_shape", "internal_fill_odp_caps", "mlx5_ib_odp_init",
    "mlx5_ib_odp_init_one", "mlx5r_umr_can_load_pas",
]  # fmt: skip

TASK_SIZE = (1 << 47) - 4096  # x86-64, 4-level page tables
MLX5_MAX_UMR_SHIFT = 16  # umr.h
MAX_UMR_WR = 128  # umr.c
UNBOUND_MAX_ACTIVE = 256  # WQ_DFL_ACTIVE (include/linux/workqueue.h @ 6.9)
UMR_UNINIT, UMR_ACTIVE, UMR_RECOVER, UMR_ERR = range(4)  # MLX5_UMR_STATE_*


@dataclass(frozen=True)
class Imr:
    """Shape of implicit regions (odp.c: macros up to 6.11, set by mlx5_ib_odp_init since).

    Attributes
    ----------
    mtt_shift : int
        log2 of the bytes of one child.
    mtt_entries, mtt_size : int
        Translations and bytes of one child.
    ksm_entries : int
        Slots of a parent; 0: implicit regions are not supported.
    """

    mtt_shift: int
    mtt_entries: int
    mtt_size: int
    ksm_entries: int


@step
def mlx5_ib_odp_init(dev: Mlx5IbDev, thread: Thread) -> Imr:
    """Loading the module: compute the shape of implicit regions from the size of a process (odp.c)."""
    return imr_shape(dev.era, dev.options.task_size)


def imr_shape(era: Era = Era.MID, task_size: int = TASK_SIZE) -> Imr:
    """Return the shape of implicit regions for a kernel and a size of address spaces, bytes."""
    order = (-(-task_size // (1 << PAGE_SHIFT)) - 1).bit_length()  # get_order
    shift = 30
    if era == Era.NEW:
        log_va_pages = task_size.bit_length() - 1 - PAGE_SHIFT
        if log_va_pages > 56 - PAGE_SHIFT:
            return Imr(0, 0, 0, 0)
        if log_va_pages > 48 - PAGE_SHIFT:
            shift = 34
    return Imr(shift, 1 << (shift - PAGE_SHIFT), 1 << shift, 1 << (order - (shift - PAGE_SHIFT)))


@dataclass(frozen=True)
class OdpOptions:
    """How the modelled kernel differs from the plain release of its era.

    Attributes
    ----------
    config_odp : bool
        CONFIG_INFINIBAND_ON_DEMAND_PAGING.
    invalidations_fixed : bool or None
        Count invalidations once for each UMR request (79195147644) instead of n(n+1)/2; None: as in the era.
    handled_counters : bool or None
        The ``*_handled`` counters exist (December 2024); None: as in the era.
    revoke_under_lock : bool or None
        dereg revokes under umem_mutex and detaches the region first (abb604a1a9c8); None: as in the era.
    child_cmpxchg : bool or None
        An unused child leaves its parent by compare-and-exchange (d3d930411ce3); None: as in the era.
    private_hmm_pfns : bool
        `hmm_range_fault` writes into an array of its own, and the region's list changes under umem_mutex only. No
        release up to 7.0 does this. Without it entries of a fault that failed, or is not checked yet, are valid in
        the list, and since the list is where translations are made from (6.15), a neighbour's fault programs them.
    memory_fault_holds_parent : bool
        Memory scheme: a fault that was reported for an implicit region's null key or child also takes a use of the
        region itself. No release up to 7.0 does: deregistering does not wait for such a fault, which then writes to
        a revoked key.
    lazy_umr : bool
        The UMR queue pair is made by the first registration (since 6.11) and not with the device.
    task_size : int
        Bytes of a process's address space; decides the shape of implicit regions.
    pf_max_active : int
        Work items of the page-fault queue that run at a time (MLX5_NUM_CMD_EQE).
    pf_reserve : int
        Reserved fault descriptors (MLX5_IB_NUM_PF_DRAIN).
    max_prefetch_len : int
        Bytes (MAX_PREFETCH_LEN).
    """

    config_odp: bool = True
    invalidations_fixed: bool | None = None
    handled_counters: bool | None = None
    revoke_under_lock: bool | None = None
    child_cmpxchg: bool | None = None
    private_hmm_pfns: bool = False
    memory_fault_holds_parent: bool = False
    lazy_umr: bool = True
    task_size: int = TASK_SIZE
    pf_max_active: int = 32
    pf_reserve: int = 64
    max_prefetch_len: int = 4 << 20

    def of(self, name: str, era: Era) -> bool:
        """Return an option whose default follows from the era."""
        chosen: bool | None = getattr(self, name)
        return era == Era.NEW if chosen is None else chosen


class UmrCommon:
    """The queue pair that all UMR work requests go through (struct umr_common)."""

    def __init__(self, pd: IbPd) -> None:
        self.pd = pd
        self.sem = Semaphore(MAX_UMR_WR)
        self.lock, self.init_lock = Lock(), Lock()
        self.state = UMR_UNINIT
        self.posted = 0  # work requests given to the hardware since the device was made


class Mlx5IbDev:
    """Struct mlx5_ib_dev: one device of one host.

    Parameters
    ----------
    hca : Hca
        The hardware.
    costs : Costs
        `kit.drivers.mlx5.costs.make_costs`.
    era : Era
    options : OdpOptions

    Attributes
    ----------
    odp_mkeys : dict of int to Mlx5IbMkey
        By key without variant (xarray; looked up and changed without yielding, which is its lock).
    umr_wqes : int
        UMR work requests executed; what the counts of the reference are about.
    """

    def __init__(
        self, hca: Hca, costs: Costs, era: Era = Era.MID, options: OdpOptions | None = None
    ) -> None:  # fmt: skip
        from kit.drivers.mlx5.mr.mkey_cache import MkeyCache

        self.hca, self.costs, self.era = hca, costs, era
        self.engine: Engine = hca.engine
        self.options = options or OdpOptions()
        self.caps: HcaCaps = hca.caps
        kmod = self.engine.thread("kmod")
        self.imr = mlx5_ib_odp_init(self, kmod)
        self.odp_caps = OdpCaps()
        self.odp_max_size = 0
        self.odp_mkeys: dict[int, Mlx5IbMkey] = {}
        self.odp_pf_eq: PfEq | None = None
        self.odp_eq_mutex, self.slow_path_mutex = Lock(), Lock()
        self.xlt_emergency_page_mutex = Lock()
        self.umrc = UmrCommon(IbPd(self, 0))
        self.system_unbound_wq = Workqueue(self.engine, "kworker/u", UNBOUND_MAX_ACTIVE, costs.wq_dispatch)
        self.system_wq = Workqueue(self.engine, "kworker", UNBOUND_MAX_ACTIVE, costs.wq_dispatch)
        self.cache: MkeyCache = MkeyCache(self)
        self.inject = Injection()
        hca.inject_umr = lambda wqe: self.inject.hit("umr")
        hca.memory_scheme = self.mem_page_fault()
        self.mkey_var = 0
        self.reg_pages = 0
        self.srcu = WaitQueue()  # OLD: readers of mr_srcu end here
        self.srcu_readers = 0
        mlx5_ib_odp_init_one(self, kmod)

    def mem_page_fault(self) -> bool:
        """Whether the memory scheme is on: a 6.12 driver, and firmware with both capabilities."""
        return self.era == Era.NEW and self.caps.mem_page_fault and self.caps.page_prefetch


@step
def mlx5r_umr_can_load_pas(dev: Mlx5IbDev, thread: Thread, length: int) -> bool:
    """Whether UMR can write the translations of `length` bytes (umr.h)."""
    if dev.caps.umr_modify_entity_size_disabled:
        return False
    return dev.caps.umr_extended_translation_offset or length < (1 << MLX5_MAX_UMR_SHIFT) << PAGE_SHIFT


@step
def mlx5_ib_odp_init_one(dev: Mlx5IbDev, thread: Thread) -> None:
    """Fill the ODP capabilities of one device; the page-fault queue comes with the first region (odp.c)."""
    internal_fill_odp_caps(dev, thread)


@step
def internal_fill_odp_caps(dev: Mlx5IbDev, thread: Thread) -> None:
    """Derive what is offered from what the firmware can do (odp.c)."""
    caps = dev.caps
    dev.odp_caps = OdpCaps()
    if not (caps.pg and mlx5r_umr_can_load_pas(dev, thread, 0) and dev.options.config_odp):
        return
    general = OdpGeneral.SUPPORT
    dev.odp_max_size = U64_MAX if caps.umr_extended_translation_offset else 1 << (MLX5_MAX_UMR_SHIFT + PAGE_SHIFT)
    implicit = caps.fixed_buffer_size and caps.null_mkey and caps.umr_extended_translation_offset
    if implicit and not caps.umr_indirect_mkey_disabled and dev.imr.ksm_entries:
        general |= OdpGeneral.IMPLICIT
    ud = OdpTransport.SEND | OdpTransport.SRQ_RECV
    dev.odp_caps = OdpCaps(general, caps.rc_odp, caps.ud_odp & ud, caps.xrc_odp, caps.dc_odp)
    assert dev.odp_caps.general_caps != NO_GENERAL
