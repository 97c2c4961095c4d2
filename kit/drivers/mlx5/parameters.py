"""What the adapter does that no source documents, as parameters; and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from kit.drivers.mlx5.enums import WcStatus

__all__ = ["HcaCounters", "HcaParameters"]


@dataclass(frozen=True)
class HcaParameters:
    """What the adapter does that no source documents, or that differs between models.

    Attributes
    ----------
    mtu : int
        Path MTU, bytes.
    window : int
        Messages of a queue pair on the wire that are not acknowledged.
    umr_error : WcStatus
        Completion of a UMR work request that fails its checks ("reg umr failed (6)" in kernel logs; assumed for all).
    requester_fault_error, recv_fault_error, send_fault_error, rdma_fault_error : WcStatus
        Completions after a page fault was resumed with an error: of the requester's own work request, of the
        responder's receive, of the sender whose receiver that was, and of the requester of a one-sided operation.
        UNVERIFIED: hardware decides; the defaults are what the InfiniBand specification says of such errors.
    rdma_op_len_known : bool
        The event of a one-sided fault carries the length of the operation.
    rnr_scale : float
        Real waits are longer than the RNR timer's code says by this factor. UNVERIFIED; 1 is the specification.
    timeout_floor : float
        Smallest transport timeout, microseconds. UNVERIFIED: reported as 500 ms on ConnectX-4, 30 ms on ConnectX-5.
    packet_damming : bool
        A message that is posted while an earlier one of its queue pair waits for a page is lost, so that only the
        transport's time-out, or the gap before a later message, shows that it is missing. That packets get lost then
        is published (Fukuoka, Sato, Taura, ISPASS 2021); which of them is UNVERIFIED.
    packet_flood : bool
        While the page for a READ's answer is missing, the request is sent again every ``resend_interval``, and is
        answered each time. That this happens, with many queue pairs, is published (ibid.); the interval is
        UNVERIFIED.
    prefetch_before, prefetch_after : int
        Memory scheme: pages around the missing ones that the event asks for.
    cmd_slots : int
        Commands that the firmware takes at a time.
    """

    mtu: int = 4096
    window: int = 128
    umr_error: WcStatus = WcStatus.MW_BIND_ERR
    requester_fault_error: WcStatus = WcStatus.LOC_PROT_ERR
    recv_fault_error: WcStatus = WcStatus.LOC_PROT_ERR
    send_fault_error: WcStatus = WcStatus.REM_OP_ERR
    rdma_fault_error: WcStatus = WcStatus.REM_ACCESS_ERR
    rdma_op_len_known: bool = True
    rnr_scale: float = 1.0
    timeout_floor: float = 0.0
    packet_damming: bool = False
    packet_flood: bool = False
    prefetch_before: int = 0
    prefetch_after: int = 0
    cmd_slots: int = 31


@dataclass
class HcaCounters:
    """What the adapter counts."""

    page_faults: int = 0
    resumes: int = 0
    resumes_in_error: int = 0
    rnr_naks: int = 0
    dropped: int = 0
    dammed: int = 0
    flooded: int = 0
    umr_wqes: int = 0
    umr_bytes: int = 0
    unknown_resumes: int = 0
    messages: int = 0
    bytes: int = 0
