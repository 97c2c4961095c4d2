"""What a device can do: the capabilities that its firmware reports, and those of paging that verbs report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from kit.drivers.mlx5.enums import INVALID_LKEY

__all__ = ["ALL_TRANSPORT", "NO_GENERAL", "NO_TRANSPORT", "HcaCaps", "OdpCaps", "OdpGeneral", "OdpTransport"]


class OdpGeneral(IntFlag):
    """Enum ibv_odp_general_caps."""

    SUPPORT = 1
    IMPLICIT = 2


class OdpTransport(IntFlag):
    """Enum ibv_odp_transport_cap_bits."""

    SEND = 1 << 0
    RECV = 1 << 1
    WRITE = 1 << 2
    READ = 1 << 3
    ATOMIC = 1 << 4
    SRQ_RECV = 1 << 5
    FLUSH = 1 << 6
    ATOMIC_WRITE = 1 << 7


NO_GENERAL = OdpGeneral(0)
NO_TRANSPORT = OdpTransport(0)
ALL_TRANSPORT = OdpTransport(0xFF)


@dataclass
class OdpCaps:
    """Struct ib_odp_caps: what query_device_ex reports."""

    general_caps: OdpGeneral = NO_GENERAL
    rc_odp_caps: OdpTransport = NO_TRANSPORT
    ud_odp_caps: OdpTransport = NO_TRANSPORT
    xrc_odp_caps: OdpTransport = NO_TRANSPORT
    dc_odp_caps: OdpTransport = NO_TRANSPORT


@dataclass
class HcaCaps:
    """Device capabilities that the driver asks for (MLX5_CAP_GEN, MLX5_CAP_ODP), by their firmware names.

    The defaults are those of a ConnectX-5 or later with current firmware: every capability that implicit
    ODP needs. Per-transport bits are what the firmware offers; the driver derives `OdpCaps` from them.
    """

    pg: bool = True
    atomic: bool = True
    fixed_buffer_size: bool = True
    null_mkey: bool = True
    umr_extended_translation_offset: bool = True
    umr_modify_entity_size_disabled: bool = False
    umr_modify_atomic_disabled: bool = False
    umr_indirect_mkey_disabled: bool = False
    umr_log_entity_size_5: bool = True
    relaxed_ordering_write: bool = True
    relaxed_ordering_read: bool = True
    relaxed_ordering_write_umr: bool = True
    relaxed_ordering_read_umr: bool = True
    mem_page_fault: bool = False
    page_prefetch: bool = False  # memory_page_fault_scheme_cap.page_prefetch
    max_indirection: int = 4
    log_max_klm_list_size: int = 16
    terminate_scatter_list_mkey: int = INVALID_LKEY
    rc_odp: OdpTransport = ALL_TRANSPORT
    ud_odp: OdpTransport = OdpTransport.SEND
    xrc_odp: OdpTransport = ALL_TRANSPORT
    dc_odp: OdpTransport = ALL_TRANSPORT
