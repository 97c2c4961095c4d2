"""What a session's pictures show beside the trace: copies of the page tables, phases of migrations, commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_WRITE,
    HmmDmirrorCmd,
)
from kit.memory.device.migrate_vma import MigrateVma
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.types import PAGE, Bit, Kind

if TYPE_CHECKING:
    from kit.drivers.dmirror import Dmirror
    from kit.drivers.dmirror_limited import LimitedDevice
    from kit.flows.hmm_mirror.evictions import Evictions
    from kit.memory.space.mm import Mm

__all__ = ["COMMANDS", "Command", "Phases", "Record", "Tables"]

COMMANDS = {
    HMM_DMIRROR_READ: "HMM_DMIRROR_READ",
    HMM_DMIRROR_WRITE: "HMM_DMIRROR_WRITE",
    HMM_DMIRROR_MIGRATE_TO_DEV: "HMM_DMIRROR_MIGRATE_TO_DEV",
    HMM_DMIRROR_MIGRATE_TO_SYS: "HMM_DMIRROR_MIGRATE_TO_SYS",
}
_ROWS = 4096  # pages of which a copy of the page tables keeps the entries; of larger ones every n-th
_KEPT = 400  # migrations whose arrays are kept
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Command:
    """One command to the device: what was asked, what came back, as ``strace`` would show it."""

    name: str
    address: int
    npages: int
    cpages: int
    faults: int
    result: str


@dataclass
class Phases:
    """The arrays of one migration after each phase.

    Attributes
    ----------
    start : int
        First byte.
    cause : str
        ``to device``, ``to system`` or ``CPU fault``.
    time : float
        When it was set up.
    src, dst : dict of str to ndarray of uint64
        By phase: setup, driver, pages.
    """

    start: int
    cause: str
    time: float
    src: dict[str, Words] = field(default_factory=dict)
    dst: dict[str, Words] = field(default_factory=dict)


@dataclass(frozen=True)
class Tables:
    """Both page tables at the end of a stage, for every `step`-th page.

    Attributes
    ----------
    stage : str
    cpu : ndarray of uint8
        Kind of each entry (`Kind`); 8 for the zero page, 9 for a device page that the CPU can reach.
    writable : ndarray of bool
        Whether the CPU's entry allows writing.
    device : ndarray of uint8
        Rights in the device's table: 0 none, 1 read, 2 write, 3 atomic.
    near : ndarray of bool
        Whether what the device's entry names is in device memory.
    kept : ndarray of bool
        Whether the driver keeps the content of a device page in a system page.
    """

    stage: str
    cpu: NDArray[np.uint8]
    writable: NDArray[np.bool_]
    device: NDArray[np.uint8]
    near: NDArray[np.bool_]
    kept: NDArray[np.bool_]


class Record:
    """Collects what a session's pictures show beside the trace.

    Attributes
    ----------
    near, far : int
        The device's visits by where the node was.
    device_writes, cpu_writes : int
        Writes to nodes after the structure was built, the parent's alone.
    compared, differed : int
        Words that somebody read, and those that were not what was last written.
    explicit : str
        What became of the walk without HMM: ``done``, ``does not fit`` or nothing.
    rewritten : int
        Pointers translated for it.
    """

    def __init__(self, mm: Mm, device: LimitedDevice, evictions: Evictions) -> None:
        self.mm, self.memory, self.device, self.evictions = mm, mm.memory, device, evictions
        self.device_writes = self.cpu_writes = 0
        self.near = self.far = self.compared = self.differed = self.rewritten = 0
        self.explicit = ""
        self.tables: list[Tables] = []
        self.commands: list[Command] = []
        self.migrations: list[Phases] = []
        self.counts = dict.fromkeys(("asked", "collected", "moved", "failed"), 0)
        self.per_page = 1
        self._open: dict[int, Phases] = {}
        self.memory.observer = self.observe

    def compare(self, seen: Words, expected: Words) -> None:
        """Count words that are not what they should be."""
        self.compared += len(seen)
        self.differed += int((seen != expected).sum())

    def command(self, command: int, result: int, cmd: HmmDmirrorCmd) -> None:
        """Note a command to the device."""
        self.commands.append(
            Command(COMMANDS[command], cmd.addr, cmd.npages, cmd.cpages, cmd.faults, repr(result) if result else "0")
        )

    def observe(self, phase: str, args: MigrateVma) -> None:
        """Take copies of a migration's arrays after a phase."""
        src, dst = args.src[: args.npages].copy(), args.dst[: args.npages].copy()
        if phase == "setup":
            system = args.flags & 1
            cause = "to device" if system else "CPU fault" if args.fault_page is not None else "to system"
            self._open[id(args)] = Phases(args.start, cause, args.began)
            self.evictions.take_back(args.start >> 12, src, args.began)
            self.counts["asked"] += args.npages
            self.counts["collected"] += args.cpages
        phases = self._open.get(id(args))
        if phases is None:
            return
        phases.src[phase], phases.dst[phase] = src, dst
        if phase == "pages":
            del self._open[id(args)]
            given = dst & np.uint64(1) != 0
            self.counts["moved"] += int((given & (src & np.uint64(2) != 0)).sum())
            self.counts["failed"] += int((given & (src & np.uint64(2) == 0)).sum())
            if len(self.migrations) < _KEPT:
                self.migrations.append(phases)

    def snapshot(self, stage: str, base: int, pages: int, mirror: Dmirror | None) -> None:
        """Copy both page tables."""
        mm, device = self.mm, self.device
        self.per_page = max(-(-pages // _ROWS), 1)
        some = base // PAGE + np.arange(0, pages, self.per_page)
        slots = mm.table.slots_of(some)
        kind, bits = mm.table.kind[slots].copy(), mm.table.bits[slots]
        frame = mm.table.frame[slots].astype(np.int64)
        present = kind == Kind.PRESENT
        kind[present & (frame == ZERO_PFN)] = 8
        kind[present & (frame >= device.first)] = 9
        rights = np.zeros(len(some), dtype=np.uint8)
        near = np.zeros(len(some), dtype=np.bool_)
        kept = near.copy()
        on_device = kind == Kind.DEVICE_PRIVATE
        kept[on_device] = device.backing(frame[on_device]) < device.first
        if mirror is not None:
            at = mirror.pt.slots_of(some)
            rights = mirror.pt.rights[at].copy()
            near = (rights > 0) & (device.backing(mirror.pt.frame[at]) >= device.first)
        self.tables.append(Tables(stage, kind, bits & Bit.WRITABLE != 0, rights, near, kept))

    def views(self) -> dict[str, Any]:
        """Return everything, for `Run.views`."""
        return {
            "tables": list(self.tables), "commands": list(self.commands), "migrations": list(self.migrations),
            "per_page": self.per_page,
        }  # fmt: skip
