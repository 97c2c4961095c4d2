"""odp.c: faults of the memory scheme: firmware names the key, the pages, and how far to look around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.drivers.mlx5.enums import U64_MAX
from kit.drivers.mlx5.mr.dereg import mlx5r_deref_odp_mkey
from kit.drivers.mlx5.objects import MKEY_IMPLICIT_CHILD, Mlx5IbMkey
from kit.drivers.mlx5.odp.fault import count, pagefault_mr
from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_page_fault_resume
from kit.drivers.mlx5.odp.segment import find_odp_mkey
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr

__all__ = ["mlx5_ib_mr_memory_pfault_handler"]

LAST = 1 << 7  # MLX5_MEMORY_PAGE_FAULT_FLAGS_LAST


@waiting_step
def mlx5_ib_mr_memory_pfault_handler(pfault: Pagefault, thread: Thread) -> Wait:
    """Fault the pages and their neighbours; if that fails, the pages alone (odp.c @ 7.0).

    Success is resumed only by the last of an operation's events, failure always.
    """
    dev = pfault.dev
    thread.note(va=pfault.va, bytes=pfault.fault_byte_count, value=pfault.mkey)
    mmkey = find_odp_mkey(dev, thread, pfault.mkey)
    if isinstance(mmkey, Errno):
        thread.note(status="unknown key")
        yield from mlx5_ib_page_fault_resume(pfault, thread, 1)
        return
    mr = region_of(mmkey)
    held = dev.options.memory_fault_holds_parent and mr.mmkey is not mmkey
    if held and not mr.mmkey.usecount:
        mlx5r_deref_odp_mkey(mmkey, thread)
        yield from mlx5_ib_page_fault_resume(pfault, thread, 1)
        return
    mr.mmkey.usecount += held
    before, after = pfault.prefetch_before_byte_count, pfault.prefetch_after_byte_count
    size = before + pfault.fault_byte_count + after
    ret = yield from pagefault_mr(mr, thread, pfault.va - before & U64_MAX, size, None, 0, True)
    if ret < 0:
        ret = yield from pagefault_mr(mr, thread, pfault.va, pfault.fault_byte_count, None, 0, True)
    if ret >= 0:
        count(mr, thread, "faults", ret)
    mlx5r_deref_odp_mkey(mmkey, thread)
    if held:
        mlx5r_deref_odp_mkey(mr.mmkey, thread)
    if ret < 0:
        yield from mlx5_ib_page_fault_resume(pfault, thread, 1)
    elif pfault.flags & LAST:
        yield from mlx5_ib_page_fault_resume(pfault, thread, 0)


def region_of(mmkey: Mlx5IbMkey) -> Mlx5IbMr:
    """Return the region that counts: the parent, for an implicit region's child or null key."""
    mr = mmkey.mr
    assert mr is not None
    if mmkey.type == MKEY_IMPLICIT_CHILD:
        assert mr.parent is not None
        return mr.parent
    return mr
