"""What the hardware does with a UMR work request: checks, then writes."""

from __future__ import annotations

from functools import cache

from kit.drivers.mlx5.adapter.mkey import HwMkey
from kit.drivers.mlx5.descriptors import UmrWqe
from kit.drivers.mlx5.enums import MkeyMask, UmrFlags

__all__ = ["apply_umr", "umr_refused"]

_MUST_BE_USED, _MUST_BE_FREE = int(UmrFlags.CHECK_FREE), int(UmrFlags.CHECK_NOT_FREE)  # "fail if free", ...
# Bit of the UMR mask: field of the mkey context that it writes (mlx5_ifc_mkc_bits).
_FIELDS = {
    MkeyMask.LEN: ("len", "length64"),
    MkeyMask.PAGE_SIZE: ("log_page_size",),
    MkeyMask.START_ADDR: ("start_addr",),
    MkeyMask.PD: ("pd",),
    MkeyMask.KEY: ("mkey_7_0",),
    MkeyMask.QPN: ("qpn",),
    MkeyMask.LR: ("lr",),
    MkeyMask.LW: ("lw",),
    MkeyMask.RR: ("rr",),
    MkeyMask.RW: ("rw",),
    MkeyMask.A: ("a",),
    MkeyMask.RELAXED_ORDERING_WRITE: ("relaxed_ordering_write",),
    MkeyMask.RELAXED_ORDERING_READ: ("relaxed_ordering_read",),
    MkeyMask.FREE: ("free",),
}


def umr_refused(mkey: HwMkey | None, wqe: UmrWqe) -> str:
    """Return why the hardware refuses a UMR work request, or an empty string."""
    if mkey is None or not mkey.mkc.umr_en:
        return "no such key, or UMR may not change it"
    checks = int(wqe.flags) & (_MUST_BE_USED | _MUST_BE_FREE)
    if checks == _MUST_BE_USED and mkey.mkc.free:
        return "the key is free"
    if checks == _MUST_BE_FREE and not mkey.mkc.free:
        return "the key is not free"
    if wqe.xlt is None:
        return ""
    if wqe.xlt.nbytes % 64 or wqe.xlt_octowords * 16 > wqe.xlt.nbytes or wqe.xlt_offset % 4:
        return "translation entries are written in units of 64 bytes"
    if wqe.xlt.dtype != mkey.entries.dtype:
        return "entries of another kind"
    if (wqe.xlt_offset + wqe.xlt_octowords) * 16 > mkey.entries.nbytes:
        return "entries past the end of the key's table"
    return ""


def apply_umr(mkey: HwMkey, wqe: UmrWqe) -> None:
    """Write translations and the masked fields of the context."""
    if wqe.xlt is not None:
        size = mkey.entries.itemsize
        first, count = wqe.xlt_offset * 16 // size, wqe.xlt_octowords * 16 // size
        if wqe.zeros:
            mkey.clear(first, count)
        else:
            mkey.write(first, wqe.xlt[:count])
    if wqe.mkc is not None:
        for name in _names(int(wqe.mkey_mask)):
            setattr(mkey.mkc, name, getattr(wqe.mkc, name))


@cache
def _names(mask: int) -> tuple[str, ...]:
    """Return the fields of the context that a mask selects."""
    return tuple(name for bit, names in _FIELDS.items() if mask & bit for name in names)
