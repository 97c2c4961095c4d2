"""Parameters of the HMM mirror flow."""

from __future__ import annotations

from typing import ClassVar

from kit.errors import ParameterError
from kit.flows.parameters import Parameters, parameter

__all__ = ["HmmParameters"]

MIB = 1 << 20
HUGE = 2 * MIB


class HmmParameters(Parameters):
    """Everything that a scenario of this flow may set."""

    flow: ClassVar[str] = "hmm_mirror"
    system: ClassVar[str] = "hmm"

    # the program
    structure: str = parameter(
        "list", "the data structure: a chain, a tree of parent pointers, or a graph with one edge a node",
        choices=("list", "tree", "graph"),
    )  # fmt: skip
    bytes: int = parameter(4 * MIB, "size of the structure, one node a page", unit="B", ge=4096, le=1 << 40)
    order: str = parameter(
        "random",
        "how the nodes lie in memory, against the order of the walk",
        choices=("sequential", "strided", "random"),
    )
    visits: int = parameter(0, "nodes that the device visits in a walk, 0: as many as there are", ge=0, le=1 << 30)
    write_fraction: float = parameter(0.25, "share of the device's visits that write", ge=0, le=1)
    explicit_copies: bool = parameter(
        True, "first do the walk without HMM: separate memory, copies, pointers rewritten"
    )
    placement: str = parameter(
        "migrate", "what a device fault does in the migration stage: moves pages to the device, or only mirrors them",
        choices=("migrate", "mirror"),
    )  # fmt: skip
    cpu_fraction: float = parameter(0.25, "share of the pages that the CPU touches after a walk", ge=0, le=1)
    cpu_write_fraction: float = parameter(0.5, "share of the CPU's touches that write", ge=0, le=1)
    rounds: int = parameter(1, "times that a device walk and the CPU's touches take turns", ge=1, le=1000)
    children: int = parameter(1, "processes that are forked while pages are on the device", ge=0, le=16)
    child_fraction: float = parameter(
        0.125, "share of the pages that each child touches, half of them to write", ge=0, le=1
    )
    # the machine and its memory
    machine: str = parameter("linux_pcie4", "machine profile", group="Machine")
    device_type: str = parameter(
        "private", "whether the CPU can reach device memory: private: no, coherent: yes", group="Memory",
        choices=("private", "coherent"),
    )  # fmt: skip
    thp: bool = parameter(False, "ask for huge pages (MADV_HUGEPAGE)", group="Memory")
    device_memory_bytes: int = parameter(
        0, "device memory, 0: the machine's", unit="B", group="Memory", ge=0, le=1 << 40
    )
    oversubscription: float = parameter(0.0, "structure over device memory, 0: not set", group="Memory", ge=0, le=64)
    left_fraction: float = parameter(
        0.5, "device memory that another program leaves in the last but one stage, as a share of the structure",
        group="Memory", ge=0, le=64,
    )  # fmt: skip
    pageout_fraction: float = parameter(
        0.0, "share of the pages that are swapped out before the device comes", group="Memory", ge=0, le=1
    )
    pinned_pages: int = parameter(
        0, "pages that somebody has pinned, and that cannot move", group="Memory", ge=0, le=1 << 20
    )
    payload_bytes: int = parameter(
        8, "bytes carried for each page: 8 (the node's pointer) to 4096 (all of it)", unit="B", group="Memory",
        choices=(8, 64, 512, 4096),
    )  # fmt: skip
    # the driver
    fault_pages: int = parameter(
        512, "pages around a device fault that are served with it, a power of two", group="Driver policy", ge=1, le=512
    )
    evict_pages: int = parameter(
        512,
        "device pages that are evicted together when device memory is full",
        group="Driver policy",
        ge=1,
        le=1 << 16,
    )
    eviction: str = parameter(
        "hand_over",
        "what eviction leaves: hand_over: the entry stays, and a CPU fault gets the system page that the driver kept; "
        "migrate: the page moves home at once",
        group="Driver policy", choices=("hand_over", "migrate"),
    )  # fmt: skip
    # what else goes on
    noise: str = parameter(
        "none", "what another thread does to the structure while the device works",
        group="Run", choices=("none", "protect", "pageout", "unrelated"),
    )  # fmt: skip
    noise_interval: float = parameter(
        200.0, "pause between two changes by that thread", unit="us", group="Run", gt=0, le=1e9
    )
    seed: int = parameter(0, "seed of orders, noise and jitter", group="Run", ge=0)
    jitter: float = parameter(0.0, "latency jitter, as a share", group="Run", ge=0, le=10)

    @property
    def pages(self) -> int:
        """Pages of the structure."""
        return -(-self.bytes // 4096)

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        if self.oversubscription and self.device_memory_bytes:
            raise ParameterError(
                "oversubscription", self.oversubscription, "0 when device_memory_bytes is given (one decides the other)"
            )
        if self.fault_pages & (self.fault_pages - 1):
            raise ParameterError("fault_pages", self.fault_pages, "a power of two from 1 to 512")
        if self.pinned_pages > self.pages:
            raise ParameterError("pinned_pages", self.pinned_pages, f"at most the structure's {self.pages} pages")
        if self.placement == "mirror" and (self.oversubscription or self.device_memory_bytes):
            name = "oversubscription" if self.oversubscription else "device_memory_bytes"
            raise ParameterError(name, getattr(self, name), "0 with placement = mirror: nothing goes to device memory")
