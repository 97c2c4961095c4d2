"""odp.c: faulting what one data segment or one remote operation names: a key, an address, a length."""

from __future__ import annotations

from errno import EFAULT, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.core.cmd import mlx5_core_query_mkey
from kit.drivers.mlx5.core.linux import xa_load
from kit.drivers.mlx5.enums import PAGE, PAGE_SHIFT, Era, base_mkey
from kit.drivers.mlx5.mr.dereg import mlx5r_deref_odp_mkey
from kit.drivers.mlx5.objects import MKEY_INDIRECT_DEVX, MKEY_MR, MKEY_MW, Mlx5IbMkey
from kit.drivers.mlx5.odp.fault import BytesMapped, count, pagefault_mr
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = ["find_odp_mkey", "mkey_is_eq", "pagefault_single_data_segment", "pages_in_range"]

Frame = tuple[int, int, int, int]  # struct pf_frame: key, io_virt, bcnt, depth


@step
def mkey_is_eq(mmkey: Mlx5IbMkey, thread: Thread, key: int) -> bool:
    """Whether a key is the one that was found; windows and raw indirect keys change their variant freely (odp.c)."""
    if mmkey.type in (MKEY_MW, MKEY_INDIRECT_DEVX):
        return base_mkey(mmkey.key) == base_mkey(key)
    return mmkey.key == key


def find_odp_mkey(dev: Mlx5IbDev, thread: Thread, key: int) -> Mlx5IbMkey | Errno:
    """Look a key up and take a use of it; -ENOENT when it is not on demand, -EFAULT for another variant (odp.c)."""
    mmkey = xa_load(dev.odp_mkeys, thread, base_mkey(key))
    if mmkey is None:
        return Errno(ENOENT, "find_odp_mkey", f"key {key:#x} is not on demand")
    if not mkey_is_eq(mmkey, thread, key):
        return Errno(EFAULT, "find_odp_mkey", f"key {key:#x} is out of date: {mmkey.key:#x}")
    mmkey.usecount += 1
    return mmkey


def pages_in_range(address: int, length: int) -> int:
    """4 KiB pages that a range of bytes touches (odp.c)."""
    return (address + length + PAGE - 1 & -PAGE) - (address & -PAGE) >> PAGE_SHIFT


@waiting_step
def pagefault_single_data_segment(
    dev: Mlx5IbDev, thread: Thread, key: int, io_virt: int, bcnt: int, committed: int, bytes_mapped: BytesMapped | None
) -> Wait:
    """Fault one segment, through as many indirect keys as it takes; return its pages, or an errno (odp.c).

    Since 6.14 success is 0. A key that is not on demand counts as mapped: lists may mix both kinds.

    Parameters
    ----------
    committed : int
        Bytes at its start that the hardware has already dealt with.
    """
    io_virt, bcnt = io_virt + committed, bcnt - committed
    thread.note(va=io_virt, bytes=bcnt, value=key)
    frames: list[Frame] = [(key, io_virt, bcnt, 0)]
    npages = 0
    while frames:
        key, io_virt, bcnt, depth = frames.pop()  # last in, first out
        mmkey = find_odp_mkey(dev, thread, key)
        if isinstance(mmkey, Errno):
            if mmkey != -ENOENT:
                return mmkey
            if bytes_mapped is not None:
                bytes_mapped.add(bcnt)
            return npages if dev.era < Era.NEW else 0  # frames that are left are forgotten
        if mmkey.type == MKEY_MR:
            ret = yield from fault_mr(dev, thread, mmkey, io_virt, bcnt, bytes_mapped)
            npages += max(ret, 0)
        elif mmkey.type in (MKEY_MW, MKEY_INDIRECT_DEVX):
            ret = yield from push_klms(dev, thread, mmkey, frames, io_virt, bcnt, depth)
        else:
            ret = Errno(EFAULT, "pagefault_single_data_segment", f"key {key:#x} is of type {mmkey.type}")
        mlx5r_deref_odp_mkey(mmkey, thread)
        if ret < 0:
            return ret
    return npages if dev.era < Era.NEW else 0


def fault_mr(
    dev: Mlx5IbDev, thread: Thread, mmkey: Mlx5IbMkey, io_virt: int, bcnt: int, bytes_mapped: BytesMapped | None
) -> Wait:
    """Fault a region and count; newer drivers fail what came short."""
    mr = mmkey.mr
    assert mr is not None
    ret = yield from pagefault_mr(mr, thread, io_virt, bcnt, bytes_mapped, 0)
    if ret < 0:
        return ret
    count(mr, thread, "faults", ret)
    if dev.era == Era.NEW and ret < pages_in_range(io_virt, bcnt):
        return Errno(EFAULT, "pagefault_single_data_segment", f"{ret} pages of {pages_in_range(io_virt, bcnt)}")
    return ret


def push_klms(
    dev: Mlx5IbDev, thread: Thread, mmkey: Mlx5IbMkey, frames: list[Frame], io_virt: int, bcnt: int, depth: int
) -> Wait:
    """Read an indirect key and note each piece of it that the range touches."""
    name = "pagefault_single_data_segment"
    if depth >= dev.caps.max_indirection:
        return Errno(EFAULT, name, f"more than {dev.caps.max_indirection} levels of keys")
    out = yield from mlx5_core_query_mkey(dev.hca, thread, mmkey.key)
    if isinstance(out, Errno):
        return out
    offset = io_virt - out.mkc.start_addr
    for entry in out.klms[: mmkey.ndescs]:
        if not bcnt:
            break
        size = int(entry["bcount"])
        if offset >= size:
            offset -= size
            continue
        if dev.inject.hit("pf_frame"):
            return Errno(ENOMEM, name, "struct pf_frame")
        part = min(bcnt, size - offset)
        frames.append((int(entry["key"]), int(entry["va"]) + offset, part, depth + 1))
        bcnt, offset = bcnt - part, 0
    return 0
