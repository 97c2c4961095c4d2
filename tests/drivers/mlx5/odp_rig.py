"""One host with the mlx5 driver over the real memory system; the wire's part is played by hand-made events."""

from __future__ import annotations

from errno import EOPNOTSUPP
from typing import Any

import numpy as np

from kit.drivers.mlx5.adapter.hca import Hca, HcaParameters
from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import Translation, Verdict
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.costs import COSTS, make_costs
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.device import Mlx5IbDev, OdpOptions
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era, PageFaultSubtype
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr
from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init
from kit.drivers.mlx5.mr.reg import ib_uverbs_reg_mr
from kit.drivers.mlx5.objects import IbPd, Mlx5IbMr
from kit.drivers.mlx5.umem.odp import IbUmemOdp
from kit.errors import Errno
from kit.memory.costs import make_costs as make_mm_costs
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.syscalls.populate import populate
from kit.memory.types import MADV_DONTNEED, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE
from kit.sim.engine import Engine, Wait

ODP = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.ON_DEMAND
PINNED = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
GIB = 1 << 30


class Rig:
    """A host whose driver is under test.

    `fault` plays the hardware: it reports a missing translation and returns whether the driver resumed with an error.
    """

    def __init__(
        self, era: Era = Era.MID, frames: int = 1 << 14, caps: HcaCaps | None = None, payload: int = 8, seed: int = 0,
        jitter: float = 0.0, cache: bool = True, params: HcaParameters | None = None, cost: float = 0.0,
        device_frames: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.engine = Engine(seed, jitter)
        self.memory = PhysicalMemory(self.engine, frames, device_frames, payload_bytes=payload)
        self.costs = make_costs({**dict.fromkeys(COSTS, cost), "wire_bandwidth": 12500.0})
        self.hca = Hca(self.engine, self.memory, self.costs, caps, params)
        self.dev = Mlx5IbDev(self.hca, self.costs, era, OdpOptions(**options))
        self.mm = Mm(self.memory, self.engine, make_mm_costs(None))
        self.pd = IbPd(self.dev, 7, self.mm)
        self.thread = self.engine.thread("program")
        if cache:
            self.run(mlx5_mkey_cache_init(self.dev, self.thread))
            self.settle()

    def run(self, process: Wait) -> Any:
        self.thread.now = max(self.thread.now, float(self.engine.now))
        return self.engine.run(self.engine.start(process))

    def settle(self, us: float = 1e6) -> None:
        """Let everything that is under way, and every timer that is due soon, come to its end."""
        self.engine.run(self.engine.env.timeout(us))
        self.thread.now = max(self.thread.now, float(self.engine.now))

    def mmap(
        self, pages: int, at: int | None = None, resident: bool = False, prot: int = PROT_READ | PROT_WRITE
    ) -> int:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | (MAP_FIXED if at is not None else 0)
        va: int = self.run(mmap(self.mm, self.thread, pages * PAGE, prot, flags, addr=at))
        assert va >= 0
        if resident:
            self.populate(va, pages)
        return va

    def populate(self, va: int, pages: int) -> None:
        self.run(populate(self.mm, self.thread, va // PAGE, pages))

    def dontneed(self, va: int, pages: int) -> None:
        from kit.memory.syscalls.madvise import madvise

        assert self.run(madvise(self.mm, self.thread, va, pages * PAGE, MADV_DONTNEED)) == 0

    def munmap(self, va: int, pages: int) -> None:
        assert self.run(munmap(self.mm, self.thread, va, pages * PAGE)) == 0

    def reg(self, va: int, length: int, access: int = ODP, iova: int | None = None) -> Any:
        return self.run(
            ib_uverbs_reg_mr(self.dev, self.thread, self.pd, va, length, va if iova is None else iova, access)
        )

    def implicit(self, access: int = ODP) -> Any:
        return self.reg(0, U64_MAX, access)

    def dereg(self, mr: Mlx5IbMr) -> Any:
        return self.run(mlx5_ib_dereg_mr(mr, self.thread))

    def rdma_event(self, key: int, va: int, length: int, packet: int = 4096, committed: int = 0) -> PageFaultEqe:
        return PageFaultEqe(
            PageFaultSubtype.RDMA, bytes_committed=committed, packet_length=packet, r_key=key, rdma_op_len=length,
            rdma_va=va, pftype_token=6 << 24,
        )  # fmt: skip

    def post(self, eqe: PageFaultEqe, lost: Translation | None = None) -> Any:
        """Report a fault; the returned event succeeds with the resume's error flag."""
        done = self.engine.env.event()
        lost = lost or Translation(Verdict.FAULT, np.zeros(0, np.uint64), 0, 0)
        assert self.hca.raise_fault("responder", eqe.rdma_va, eqe, lost, done.succeed)
        return done

    def fault(self, key: int, va: int, length: int, **more: int) -> bool:
        error = self.engine.run(self.post(self.rdma_event(key, va, length, **more)))
        self.settle(10.0)
        return bool(error)

    def walk(self, key: int, va: int, length: int, need: Need = Need.REMOTE_WRITE) -> Translation:
        return self.hca.mkeys.translate(key, va, length, need, self.pd.pdn)

    def umrs(self) -> int:
        return self.hca.counters.umr_wqes

    def check(self, *mrs: Mlx5IbMr) -> None:
        """The invariants: no stale DMA, hardware entries only where the driver has a mapping, counts that add up."""
        assert not self.hca.dma.stale
        assert self.hca.dma.errors == 0
        for mr in mrs:
            odp = mr.umem
            assert isinstance(odp, IbUmemOdp)
            hw = self.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt[: odp.num_pages()]
            soft = odp.mapped(0, odp.num_pages())
            assert not (((hw & np.uint64(3)) != 0) & ~soft).any()
            if self.dev.era < Era.NEW:
                assert odp.npages == int(soft.sum())


def failed(ret: Any) -> tuple[str, str]:
    """Name of an errno, as the kernel has it, and the function in which it arose."""
    assert isinstance(ret, Errno), ret
    return "EOPNOTSUPP" if -ret == EOPNOTSUPP else ret.name, ret.step


def steps(rig: Rig, since: int = 0) -> list[str]:
    """Names of the executed steps, in the order in which they were entered."""
    names = rig.engine.trace.steps.words
    return [names[int(step)] for step in rig.engine.trace.spans.column("step")[since:]]
