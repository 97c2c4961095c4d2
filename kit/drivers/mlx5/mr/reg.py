"""mr.c: registering memory: on demand, implicit, and pinned."""

from __future__ import annotations

from errno import EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, cast

from kit.drivers.mlx5.caps import OdpGeneral
from kit.drivers.mlx5.core.linux import xa_init, xa_store
from kit.drivers.mlx5.device import mlx5r_umr_can_load_pas
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era, base_mkey
from kit.drivers.mlx5.mr.alloc import alloc_cacheable_mr, page_sizes, reg_create
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_mr_pas
from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_resource_init
from kit.drivers.mlx5.objects import UPD_XLT_ENABLE, IbPd, Mlx5IbMkey
from kit.drivers.mlx5.odp.fault import mlx5_ib_init_odp_mr
from kit.drivers.mlx5.odp.implicit import mlx5_ib_alloc_implicit_mr
from kit.drivers.mlx5.odp.invalidate import mlx5_mn_ops
from kit.drivers.mlx5.odp.pf_eq import mlx5r_odp_create_eq
from kit.drivers.mlx5.umem.odp import ib_umem_odp_get
from kit.drivers.mlx5.umem.umem import ib_umem_find_best_pgsz, ib_umem_get, ib_umem_release
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.umem.umem import IbUmem
    from kit.drivers.mlx5.verbs import Dmah
    from kit.memory.space.mm import Mm

__all__ = [
    "create_real_mr", "create_user_odp_mr", "ib_check_mr_access", "ib_uverbs_reg_mr", "mlx5_ib_reg_user_mr",
    "mlx5r_store_odp_mkey",
]  # fmt: skip

OPTIONAL = 0x3FF00000  # IB_ACCESS_OPTIONAL: ignored by devices that do not know them
KNOWN = (1 << 10) - 1  # IB_ACCESS_LOCAL_WRITE to IB_ACCESS_FLUSH_PERSISTENT


@waiting_step
def ib_uverbs_reg_mr(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, start: int, length: int, hca_va: int, access_flags: int,
    dmah: Dmah | None = None,
) -> Wait:  # fmt: skip
    """What ibv_reg_mr enters the kernel through: check, then let the driver do it (core/uverbs_cmd.c).

    Returns
    -------
    Mlx5IbMr or Errno
    """
    thread.charge(dev.costs.verb)
    if (start ^ hca_va) & (PAGE - 1):
        return Errno(EINVAL, "ib_uverbs_reg_mr", f"start {start:#x} and address {hca_va:#x} differ within the page")
    ret = ib_check_mr_access(dev, thread, access_flags)
    if ret:
        return ret
    return (yield from mlx5_ib_reg_user_mr(dev, thread, pd, start, length, hca_va, access_flags, dmah))


@step
def ib_check_mr_access(dev: Mlx5IbDev, thread: Thread, access_flags: int) -> int:
    """Refuse rights that contradict each other or that nobody knows (include/rdma/ib_verbs.h)."""
    name = "ib_check_mr_access"
    if access_flags & (Access.REMOTE_ATOMIC | Access.REMOTE_WRITE) and not access_flags & Access.LOCAL_WRITE:
        return Errno(EINVAL, name, "a remote right to write needs the local one")
    if access_flags & ~(KNOWN | OPTIONAL):
        return Errno(EINVAL, name, f"unknown flags {access_flags & ~(KNOWN | OPTIONAL):#x}")
    if access_flags & Access.ON_DEMAND and not dev.odp_caps.general_caps & OdpGeneral.SUPPORT:
        return Errno(EINVAL if dev.era < Era.NEW else EOPNOTSUPP, name, "the device cannot page")
    return 0


@waiting_step
def mlx5_ib_reg_user_mr(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, start: int, length: int, iova: int, access_flags: int,
    dmah: Dmah | None = None,
) -> Wait:  # fmt: skip
    """Register memory of the process that owns `pd`; returns the region or an Errno (mr.c).

    A DMA handle goes with pinned memory only.
    """
    thread.note(va=start, bytes=length)
    if access_flags & Access.ON_DEMAND and dmah is not None:
        return Errno(EOPNOTSUPP, "mlx5_ib_reg_user_mr", "an on-demand region takes no DMA handle")
    if dev.options.lazy_umr:
        ret = yield from mlx5r_umr_resource_init(dev, thread)
        if ret:
            return ret
    if access_flags & Access.ON_DEMAND:
        return (yield from create_user_odp_mr(dev, thread, pd, start, length, iova, access_flags))
    umem = yield from ib_umem_get(dev, thread, cast("Mm", pd.mm), start, length, access_flags)
    if isinstance(umem, Errno):
        return umem
    return (yield from create_real_mr(dev, thread, pd, umem, iova, access_flags))


@waiting_step
def create_user_odp_mr(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, start: int, length: int, iova: int, access_flags: int
) -> Wait:
    """Register on demand: make it findable by faults, then program what is resident now (mr.c)."""
    name = "create_user_odp_mr"
    if not dev.options.config_odp:
        return Errno(EOPNOTSUPP, name, "the kernel was built without on-demand paging")
    ret = yield from mlx5r_odp_create_eq(dev, thread)
    if ret:
        return ret
    if not start and length == U64_MAX:
        if iova:
            return Errno(EINVAL, name, f"an implicit region starts at 0, not at {iova:#x}")
        if not dev.odp_caps.general_caps & OdpGeneral.IMPLICIT:
            return Errno(EINVAL, name, "the device has no implicit regions")
        return (yield from mlx5_ib_alloc_implicit_mr(dev, thread, pd, access_flags))
    if not mlx5r_umr_can_load_pas(dev, thread, length):
        return Errno(EINVAL, name, f"UMR cannot write translations of {length} bytes")
    odp = yield from ib_umem_odp_get(dev, thread, cast("Mm", pd.mm), start, length, access_flags, mlx5_mn_ops)
    if isinstance(odp, Errno):
        return odp
    mr = yield from alloc_cacheable_mr(dev, thread, pd, odp, iova, access_flags)
    if isinstance(mr, Errno):
        yield from ib_umem_release(odp, thread)
        return mr
    xa_init(mr.implicit_children, thread)
    odp.private = mr
    ret = mlx5r_store_odp_mkey(dev, thread, mr.mmkey)
    if not ret:
        ret = yield from mlx5_ib_init_odp_mr(mr, thread)
    if ret:
        yield from mlx5_ib_dereg_mr(mr, thread)
        return ret
    return mr


@step
def mlx5r_store_odp_mkey(dev: Mlx5IbDev, thread: Thread, mmkey: Mlx5IbMkey) -> int:
    """From now on page faults find the key; the table holds one use of it (mlx5_ib.h)."""
    mmkey.usecount = 1
    if dev.inject.hit("odp_mkeys"):
        return Errno(ENOMEM, "mlx5r_store_odp_mkey", "the table of keys cannot grow")
    xa_store(dev.odp_mkeys, thread, base_mkey(mmkey.key), mmkey)
    return 0


@waiting_step
def create_real_mr(dev: Mlx5IbDev, thread: Thread, pd: IbPd, umem: IbUmem, iova: int, access_flags: int) -> Wait:
    """Register pinned memory: its translations by UMR, or within the command that creates the key (mr.c)."""
    xlt_with_umr = mlx5r_umr_can_load_pas(dev, thread, umem.length)
    if xlt_with_umr:
        mr = yield from alloc_cacheable_mr(dev, thread, pd, umem, iova, access_flags)
    else:
        page_size = ib_umem_find_best_pgsz(umem, thread, page_sizes(dev), iova)
        yield from dev.slow_path_mutex.acquire(thread)
        mr = Errno(EINVAL, "reg_create", "the device has no page size that fits")
        if page_size:
            mr = yield from reg_create(dev, thread, pd, umem, iova, access_flags, page_size.bit_length() - 1, True)
        yield from dev.slow_path_mutex.release(thread)
    if isinstance(mr, Errno):
        yield from ib_umem_release(umem, thread)
        return mr
    dev.reg_pages += umem.num_pages()
    if xlt_with_umr:
        ret = yield from mlx5r_umr_update_mr_pas(mr, thread, UPD_XLT_ENABLE)
        if ret:
            yield from mlx5_ib_dereg_mr(mr, thread)
            return ret
    return mr
