"""What every flow over the mlx5 driver lets a scenario set: machine, kernel era, queue pairs, failures."""

from __future__ import annotations

from typing import ClassVar

from kit.drivers.mlx5.device import Injection
from kit.errors import ParameterError
from kit.flows.parameters import Parameters, parameter

__all__ = ["ERAS", "KIB", "MIB", "PAGE_OUTS", "PATTERNS", "RdmaParameters"]

ERAS = ("old", "mid", "new")
KIB, MIB = 1 << 10, 1 << 20
PAGE_OUTS = ("none", "madvise", "rewrite", "reclaim", "munmap")
PATTERNS = ("sequential", "strided", "random")


class RdmaParameters(Parameters):
    """Base of the parameter models of the flows over mlx5."""

    system: ClassVar[str] = "mlx5"

    machine: str = parameter("connectx5", "machine profile", group="Machine")
    era: str = parameter(
        "mid", "kernel: old (before use counts), mid (5.19 to 6.11, the seed's), new (7.0)", group="Machine",
        choices=ERAS,
    )  # fmt: skip
    # memory
    host_memory_bytes: int = parameter(
        0, "memory of each host, 0: the machine's", unit="B", group="Memory", ge=0, le=1 << 44
    )
    payload_bytes: int = parameter(
        8, "bytes carried for each page: 8 (a stamp) or 4096 (all of it)", unit="B", group="Memory",
        choices=(8, 4096),
    )  # fmt: skip
    # transport
    min_rnr_timer: int = parameter(
        12, "what a responder that is not ready tells the requester to wait; 12: 0.64 ms", group="Transport",
        documented="min_rnr_timer", ge=0, le=31,
    )  # fmt: skip
    rnr_retry: int = parameter(
        7, "how often a requester that was told to wait tries again, 7: for ever", group="Transport",
        documented="rnr_retry", ge=0, le=7,
    )  # fmt: skip
    timeout: int = parameter(
        14, "ACK timeout, 4.096 us times 2 to this power", group="Transport", documented="timeout", ge=0, le=31
    )
    retry_cnt: int = parameter(
        7, "how often a requester without an answer tries again", group="Transport", documented="retry_cnt", ge=0,
        le=7,
    )  # fmt: skip
    mtu: int = parameter(
        1024, "path MTU", unit="B", group="Transport", documented="path_mtu", choices=(256, 512, 1024, 2048, 4096)
    )
    rnr_scale: float = parameter(
        1.0, "real waits after an RNR NAK over what the timer's code says; papers report several",
        group="Transport",
        ge=1, le=100,
    )  # fmt: skip
    timeout_floor_ms: float = parameter(
        0.0, "smallest ACK timeout of the adapter; reported: 500 on ConnectX-4, 30 on ConnectX-5", unit="ms",
        group="Transport", ge=0, le=10_000,
    )  # fmt: skip
    packet_damming: bool = parameter(
        False, "messages posted while an earlier one of their queue pair waits for a page get lost, seen at the ACK "
        "timeout (published; which ones: estimate)", group="Transport",
    )  # fmt: skip
    op_len_known: bool = parameter(
        True, "page-fault events of one-sided operations carry the operation's length", group="Transport",
        documented="rdma_op_len",
    )  # fmt: skip
    memory_scheme: bool = parameter(
        False, "the firmware reports page faults by address and key (needs era = new)", group="Transport",
        documented="mem_page_fault",
    )  # fmt: skip
    # driver policy
    workers: int = parameter(
        32, "page-fault work items that run at a time", group="Driver policy", documented="MLX5_NUM_CMD_EQE", ge=1,
        le=64,
    )  # fmt: skip
    fault_reserve: int = parameter(
        64, "page-fault objects kept in reserve", group="Driver policy", documented="MLX5_IB_NUM_PF_DRAIN", ge=1,
        le=4096,
    )  # fmt: skip
    count_invalidations: str = parameter(
        "era", "how page_invalidations counts: once a page, with the bug of 5.19 to 6.14, or as the era does",
        group="Driver policy", choices=("era", "fixed", "bug"),
    )  # fmt: skip
    # failures
    fail: str = parameter(
        "none", "what is made to fail while the program runs", group="Failures",
        choices=("none", "dead_owner", "device", *Injection.SITES),
    )  # fmt: skip
    fail_after: int = parameter(0, "how often it works before", group="Failures", ge=0)
    fail_times: int = parameter(1, "how often it fails", group="Failures", ge=1)
    # run
    seed: int = parameter(0, "seed of random orders and of the jitter", group="Run", ge=0)
    jitter: float = parameter(0.0, "latency jitter, as a share", group="Run", ge=0, le=10)

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        if self.memory_scheme and self.era != "new":
            raise ParameterError("memory_scheme", True, "False with era = old or mid: their driver does not know it")
        if self.host_memory_bytes and self.host_memory_bytes < MIB:
            raise ParameterError("host_memory_bytes", self.host_memory_bytes, f"0, or at least {MIB}")
