"""Flags, opcodes and states of InfiniBand verbs and of mlx5 hardware.

Numbers are those of the real headers, so that a value printed by the kit can be looked up there.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

__all__ = [
    "EQ_SPARE",
    "INVALID_LKEY",
    "KLM",
    "MTT_PRESENT",
    "MTT_READ",
    "MTT_WRITE",
    "PAGE",
    "PAGE_SHIFT",
    "U64_MAX",
    "UMR_ALIGNMENT",
    "Access",
    "AccessMode",
    "EqeType",
    "Era",
    "MkeyMask",
    "PageFaultSubtype",
    "PageFaultType",
    "PageRequest",
    "QpState",
    "QpType",
    "SendFlags",
    "UmrFlags",
    "WcOpcode",
    "WcStatus",
    "WrOpcode",
    "base_mkey",
    "mkey_variant",
]

PAGE, PAGE_SHIFT = 4096, 12
U64_MAX = (1 << 64) - 1
# MLX5_IB_MTT_*: low bits of a translation entry (mlx5_ib.h @ 7.0)
MTT_READ, MTT_WRITE = 1, 2
MTT_PRESENT = MTT_READ | MTT_WRITE
# MLX5_UMR_FLEX_ALIGNMENT (include/linux/mlx5/device.h @ 7.0): a UMR WQE writes 8 MTTs or 4 KSMs at least.
UMR_ALIGNMENT = 64
# MLX5_NUM_SPARE_EQE (drivers/net/ethernet/mellanox/mlx5/core/lib/eq.h @ 7.0)
EQ_SPARE = 0x80
# MLX5_INVALID_LKEY (include/linux/mlx5/qp.h @ 7.0), the terminator of a receive list that does not
# fill its WQE; devices with the capability `terminate_scatter_list_mkey` use their own.
INVALID_LKEY = 0x100
# struct mlx5_klm / mlx5_ksm: one 16-byte entry of an indirect mkey. A KSM entry leaves bcount at 0.
KLM = np.dtype([("bcount", np.uint32), ("key", np.uint32), ("va", np.uint64)])


class Era(IntEnum):
    """Which kernel the driver is modelled on: 4.20-5.4, 6.1-6.11 (the default), 7.0."""

    OLD = 0
    MID = 1
    NEW = 2


class Access(IntFlag):
    """Enum ib_access_flags (include/rdma/ib_verbs.h @ 7.0)."""

    LOCAL_WRITE = 1 << 0
    REMOTE_WRITE = 1 << 1
    REMOTE_READ = 1 << 2
    REMOTE_ATOMIC = 1 << 3
    MW_BIND = 1 << 4
    ZERO_BASED = 1 << 5
    ON_DEMAND = 1 << 6
    HUGETLB = 1 << 7
    FLUSH_GLOBAL = 1 << 8
    FLUSH_PERSISTENT = 1 << 9
    RELAXED_ORDERING = 1 << 20


class WrOpcode(IntEnum):
    """Enum ibv_wr_opcode (libibverbs/verbs.h)."""

    RDMA_WRITE = 0
    RDMA_WRITE_WITH_IMM = 1
    SEND = 2
    SEND_WITH_IMM = 3
    RDMA_READ = 4
    ATOMIC_CMP_AND_SWP = 5
    ATOMIC_FETCH_AND_ADD = 6
    FLUSH = 14
    ATOMIC_WRITE = 15


class WcOpcode(IntEnum):
    """Enum ibv_wc_opcode (libibverbs/verbs.h)."""

    SEND = 0
    RDMA_WRITE = 1
    RDMA_READ = 2
    COMP_SWAP = 3
    FETCH_ADD = 4
    FLUSH = 8
    ATOMIC_WRITE = 9
    RECV = 1 << 7
    RECV_RDMA_WITH_IMM = (1 << 7) + 1


class WcStatus(IntEnum):
    """Enum ibv_wc_status (libibverbs/verbs.h)."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_EEC_OP_ERR = 3
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    LOC_RDD_VIOL_ERR = 14
    REM_INV_RD_REQ_ERR = 15
    REM_ABORT_ERR = 16
    INV_EECN_ERR = 17
    INV_EEC_STATE_ERR = 18
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21


class SendFlags(IntFlag):
    """Enum ibv_send_flags (libibverbs/verbs.h)."""

    FENCE = 1
    SIGNALED = 2
    SOLICITED = 4
    INLINE = 8


class QpType(IntEnum):
    """Enum ibv_qp_type (libibverbs/verbs.h); DC is one of mlx5's driver types."""

    RC = 2
    UC = 3
    UD = 4
    XRC_SEND = 9
    XRC_RECV = 10
    DC = 0xFF


class QpState(IntEnum):
    """Enum ibv_qp_state (libibverbs/verbs.h)."""

    RESET = 0
    INIT = 1
    RTR = 2
    RTS = 3
    SQD = 4
    SQE = 5
    ERR = 6


class EqeType(IntEnum):
    """Enum mlx5_event (include/linux/mlx5/device.h @ 7.0), as far as it is modelled."""

    PAGE_FAULT = 0x0C


class PageFaultSubtype(IntEnum):
    """MLX5_PFAULT_SUBTYPE_*: what a page-fault event is about."""

    WQE = 0
    RDMA = 1
    MEMORY = 2


class PageFaultType(IntFlag):
    """MLX5_PFAULT_REQUESTOR, WRITE, RDMA: bits of a page fault's type."""

    REQUESTOR = 1
    WRITE = 2
    RDMA = 4


class PageRequest(IntEnum):
    """MLX5_WQE_PF_TYPE_*: the type of a WQE page fault."""

    RMP = 0
    REQ_SEND_OR_WRITE = 1
    RESP = 2
    REQ_READ_OR_ATOMIC = 3


class AccessMode(IntEnum):
    """MLX5_MKC_ACCESS_MODE_*, and NULL for the device's reserved null mkey."""

    PA = 0
    MTT = 1
    KLM = 2
    KSM = 3
    NULL = 255


class UmrFlags(IntFlag):
    """MLX5_UMR_* control flags (include/linux/mlx5/device.h @ 7.0)."""

    TRANSLATION_OFFSET_EN = 1 << 4
    CHECK_NOT_FREE = 1 << 5
    CHECK_FREE = 2 << 5
    INLINE = 1 << 7


class MkeyMask(IntFlag):
    """MLX5_MKEY_MASK_*: which fields of the mkey context a UMR WQE writes."""

    LEN = 1 << 0
    PAGE_SIZE = 1 << 1
    START_ADDR = 1 << 6
    PD = 1 << 7
    KEY = 1 << 13
    QPN = 1 << 14
    LR = 1 << 17
    LW = 1 << 18
    RR = 1 << 19
    RW = 1 << 20
    A = 1 << 21
    RELAXED_ORDERING_WRITE = 1 << 25
    FREE = 1 << 29
    PAGE_SIZE_5 = 1 << 42
    RELAXED_ORDERING_READ = 1 << 47


def base_mkey(key: int) -> int:
    """Return a key without its variant (mlx5_base_mkey)."""
    return key & 0xFFFFFF00


def mkey_variant(key: int) -> int:
    """Return the low 8 bits of a key, which tell successive users of one index apart."""
    return key & 0xFF
