"""What software and hardware hand each other: mkey contexts, work requests, WQEs, completions, page-fault events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE_SHIFT, Access, AccessMode, EqeType, SendFlags, WcOpcode, WcStatus, WrOpcode

__all__ = ["Mkc", "PageFaultEqe", "RecvWr", "Seg", "SendWr", "Sge", "UmrWqe", "Wc", "WqeImage"]


# Plain integers: set_access runs for every UMR request, and operators of flags are slow.
_ATOMIC, _REMOTE_WRITE, _REMOTE_READ = int(Access.REMOTE_ATOMIC), int(Access.REMOTE_WRITE), int(Access.REMOTE_READ)
_LOCAL_WRITE, _RELAXED = int(Access.LOCAL_WRITE), int(Access.RELAXED_ORDERING)


@dataclass(slots=True)
class Mkc:
    """The mkey context (mlx5_ifc_mkc_bits): what CREATE_MKEY, QUERY_MKEY and UMR carry.

    Attributes
    ----------
    free : bool
        Disabled: any access but a UMR fails.
    access_mode : AccessMode
    a, rw, rr, lw, lr : bool
        Remote atomic, remote write, remote read, local write, local read.
    umr_en : bool
        UMR may change it.
    qpn, mkey_7_0, pd : int
    start_addr, len : int
        Bytes; with `length64` the key spans 2**64 bytes.
    log_page_size : int
        log2 of what one entry spans.
    translations_octword_size : int
        Size of the translation table in 16-byte units.
    """

    free: bool = False
    access_mode: int = AccessMode.MTT
    a: bool = False
    rw: bool = False
    rr: bool = False
    lw: bool = False
    lr: bool = False
    umr_en: bool = False
    relaxed_ordering_write: bool = False
    relaxed_ordering_read: bool = False
    qpn: int = 0xFFFFFF
    mkey_7_0: int = 0
    pd: int = 0
    start_addr: int = 0
    len: int = 0
    length64: bool = False
    log_page_size: int = PAGE_SHIFT
    translations_octword_size: int = 0

    def set_access(self, access: int) -> None:
        """Set the access bits as set_mkc_access_pd_addr_fields and mlx5r_umr_set_access_flags do."""
        access = int(access)
        self.a = bool(access & _ATOMIC)
        self.rw = bool(access & _REMOTE_WRITE)
        self.rr = bool(access & _REMOTE_READ)
        self.lw = bool(access & _LOCAL_WRITE)
        self.lr = True
        self.relaxed_ordering_write = self.relaxed_ordering_read = bool(access & _RELAXED)

    def copy(self) -> Mkc:
        """Return a copy that can be changed on its own."""
        made = object.__new__(Mkc)
        for name in Mkc.__slots__:
            setattr(made, name, getattr(self, name))
        return made


@dataclass(slots=True)
class UmrWqe:
    """A UMR work request: control, mkey and data segment (mlx5r_umr_wqe, umr.c @ 7.0).

    Attributes
    ----------
    mkey : int
        The key that is changed (ctrl segment umr_mkey).
    flags : UmrFlags
    mkey_mask : MkeyMask
        Fields of `mkc` that are written.
    mkc : Mkc or None
    xlt_offset, xlt_octowords : int
        Where the translation entries go and how many, in 16-byte units.
    xlt : ndarray of uint64 (MTT) or of `KLM` records (KSM, KLM), or None without a data segment
    zeros : bool
        All of `xlt` is zero, so that it need not be looked at.
    """

    mkey: int
    flags: int = 0
    mkey_mask: int = 0
    mkc: Mkc | None = None
    xlt_offset: int = 0
    xlt_octowords: int = 0
    xlt: NDArray[Any] | None = None
    zeros: bool = False


class Sge(NamedTuple):
    """Struct ibv_sge: bytes of a registered region."""

    addr: int
    length: int
    lkey: int


@dataclass(slots=True)
class SendWr:
    """Struct ibv_send_wr.

    Attributes
    ----------
    inline_data : ndarray of uint8 or None
        With `SendFlags.INLINE`: the payload itself, copied when posted; `sg_list` is not used.
    compare_add, swap : int
        Atomics.
    length : int
        FLUSH: bytes; ATOMIC_WRITE takes its 8 bytes from `inline_data` or the SGE.
    ah_qp : int
        UD, DC: the number of the addressed QP at the connected host; XRC: the SRQ's number.
    """

    wr_id: int = 0
    opcode: int = WrOpcode.SEND
    sg_list: tuple[Sge, ...] | list[Sge] = ()
    send_flags: int = SendFlags.SIGNALED
    imm_data: int = 0
    remote_addr: int = 0
    rkey: int = 0
    compare_add: int = 0
    swap: int = 0
    length: int = 0
    ah_qp: int = -1
    inline_data: NDArray[np.uint8] | None = None


@dataclass(slots=True)
class RecvWr:
    """Struct ibv_recv_wr."""

    wr_id: int = 0
    sg_list: tuple[Sge, ...] | list[Sge] = ()


class Wc(NamedTuple):
    """Struct ibv_wc: one work completion."""

    wr_id: int
    status: WcStatus
    opcode: WcOpcode
    qp_num: int
    byte_len: int = 0
    imm_data: int = -1
    src_qp: int = 0
    vendor_err: int = 0


class Seg(NamedTuple):
    """One segment of a WQE as the driver reads it from the user's queue.

    `kind` is ctrl, xrc, av, raddr, atomic, data or inline; `octowords` its size in 16-byte units.
    Only data segments have `addr` and `lkey`.
    """

    kind: str
    octowords: int
    byte_count: int = 0
    lkey: int = 0
    addr: int = 0


@dataclass(slots=True)
class WqeImage:
    """What a read of a user's work queue yields.

    Attributes
    ----------
    opcode : WrOpcode or None
        None in a receive queue.
    qp_type : QpType
    ds : int
        Size that the control segment states, in 16-byte units.
    bytes_read : int
        Bytes that could be copied (at most a page).
    segments : list of Seg
    signature : bool
        The queue has WQE signatures.
    """

    opcode: int | None
    qp_type: int
    ds: int
    bytes_read: int
    segments: list[Seg]
    signature: bool = False


@dataclass(slots=True)
class PageFaultEqe:
    """Struct mlx5_eqe_page_fault (include/linux/mlx5/device.h @ 7.0): a union, told apart by `sub_type`.

    Attributes
    ----------
    bytes_committed, packet_length : int
        WQE and RDMA.
    wqe_index, token, pftype_wq : int
        WQE; ``pftype_wq`` is type << 24 | number of the work queue.
    r_key, rdma_op_len, rdma_va, pftype_token : int
        RDMA; ``pftype_token`` is type << 24 | token.
    flags, pre_demand_fault_pages, post_demand_fault_pages, demand_fault_pages, token47_32, token31_0, mkey, va : int
        MEMORY; `flags` bit 7 is LAST; ``demand_fault_pages`` has its pages in bits 31:12.
    """

    sub_type: int
    bytes_committed: int = 0
    packet_length: int = 0
    wqe_index: int = 0
    token: int = 0
    pftype_wq: int = 0
    r_key: int = 0
    rdma_op_len: int = 0
    rdma_va: int = 0
    pftype_token: int = 0
    flags: int = 0
    pre_demand_fault_pages: int = 0
    post_demand_fault_pages: int = 0
    demand_fault_pages: int = 0
    token47_32: int = 0
    token31_0: int = 0
    mkey: int = 0
    va: int = 0
    type: int = EqeType.PAGE_FAULT
    time: float = 0.0  # when the hardware wrote it, microseconds
