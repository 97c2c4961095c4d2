"""Two hosts with the mlx5 driver over real address spaces, on one wire: what test programs run on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.fabric import Fabric
from kit.drivers.mlx5.adapter.hca import Hca, HcaParameters
from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.adapter.queues import Srq
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.costs import COSTS, make_costs
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge, Wc
from kit.drivers.mlx5.device import Mlx5IbDev, OdpOptions
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era, QpType, WrOpcode
from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init, warm_cache
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.drivers.mlx5.verbs import alloc_pd, connect, create_cq, create_qp, open_device, reg_mr
from kit.drivers.mlx5.verbs_post import post_recv, post_send, wait_cq
from kit.memory.costs import COSTS as MM_COSTS
from kit.memory.costs import make_costs as make_mm_costs
from kit.memory.faults.load_store import read_bytes, write_bytes
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.types import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE
from kit.sim.engine import Engine, Wait

RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC
TIMES = {
    **dict.fromkeys(COSTS, 0.05), "wire_latency": 1.0, "wire_bandwidth": 12500.0, "hw_fault_detect": 100.0, "irq": 5.0,
    "cmd_resume": 50.0, "umr_wqe": 3.0, "wqe_fetch": 0.5, "cmd_create_mkey": 20.0, "resend_interval": 0.0,
}  # fmt: skip


class Side:
    """One host: program, address space, device, and a buffer registered as asked for."""

    def __init__(
        self, world: World, name: str, frames: int, era: Era, caps: HcaCaps, params: HcaParameters, device_frames: int
    ) -> None:
        engine = world.engine
        self.world = world
        self.memory = PhysicalMemory(engine, frames, device_frames, payload_bytes=PAGE, swap_slots=frames)
        self.mm = Mm(self.memory, engine, make_mm_costs(dict.fromkeys(MM_COSTS, 0.05)), name)
        self.hca = Hca(engine, self.memory, world.costs, caps, params, f"{name} hca")
        world.fabric.attach(self.hca)
        self.dev = Mlx5IbDev(self.hca, world.costs, era, world.options)
        self.thread = engine.thread(f"{name} program")
        self.context = open_device(self.dev, self.mm)
        self.do(mlx5_mkey_cache_init(self.dev, self.thread))
        warm_cache(self.dev)
        self.pd = self.do(alloc_pd(self.context, self.thread))
        self.buf = self.size = 0
        self.mr: Any = None

    def do(self, process: Wait) -> Any:
        self.thread.now = max(self.thread.now, float(self.world.engine.now))
        return self.world.engine.run(self.world.engine.start(process))

    def setup(self, kind: str, pages: int, rights: int = RIGHTS) -> None:
        """Map a fresh buffer and register it: pinned, explicit or implicit."""
        self.size = pages * PAGE
        self.buf = self.do(mmap(self.mm, self.thread, self.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
        assert self.buf > 0
        self.mr = self.register(kind, rights)

    def register(self, kind: str, rights: int = RIGHTS) -> Mlx5IbMr:
        at, length = (0, U64_MAX) if kind == "implicit" else (self.buf, self.size)
        access = rights | (Access.ON_DEMAND if kind != "pinned" else 0)
        mr = self.do(reg_mr(self.pd, self.thread, at, length, access))
        assert isinstance(mr, Mlx5IbMr), mr
        return mr

    def qp(self, kind: QpType = QpType.RC, srq: Srq | None = None, depth: int = 256) -> Qp:
        cqs = [self.do(create_cq(self.context, self.thread, 4096)) for _ in range(2)]
        made: Qp = self.do(create_qp(self.pd, self.thread, kind, *cqs, srq, depth, depth, max_inline_data=256))
        return made

    def sge(self, offset: int = 0, length: int | None = None, mr: Mlx5IbMr | None = None) -> Sge:
        return Sge(self.buf + offset, self.size - offset if length is None else length, (mr or self.mr).lkey)

    def write(self, data: NDArray[np.uint8], offset: int = 0) -> None:
        self.do(write_bytes(self.mm, self.thread, self.buf + offset, data))

    def read(self, length: int | None = None, offset: int = 0) -> NDArray[np.uint8]:
        data: NDArray[np.uint8] = self.do(
            read_bytes(self.mm, self.thread, self.buf + offset, length or self.size - offset)
        )
        return data

    def dontneed(self, first: int = 0, pages: int | None = None) -> None:
        length = self.size - first * PAGE if pages is None else pages * PAGE
        assert self.do(madvise(self.mm, self.thread, self.buf + first * PAGE, length, MADV_DONTNEED)) == 0

    def munmap(self) -> None:
        assert self.do(munmap(self.mm, self.thread, self.buf, self.size)) == 0

    def recv(self, qp: Qp, *sges: Sge, wr_id: int = 0) -> None:
        assert self.do(post_recv(qp, self.thread, RecvWr(wr_id, sges))) == 0

    def send(self, qp: Qp, opcode: WrOpcode, *sges: Sge, **fields: Any) -> None:
        assert self.do(post_send(qp, self.thread, SendWr(0, opcode, sges, **fields))) == 0

    def wait(self, qp: Qp, receive: bool = False, n: int = 1) -> list[Wc]:
        found: list[Wc] = self.do(wait_cq(qp.recv_cq if receive else qp.send_cq, self.thread, n))
        return found


class World:
    """Client and server."""

    def __init__(
        self, era: Era = Era.MID, frames: int = 1 << 13, seed: int = 0, jitter: float = 0.0, caps: HcaCaps | None = None,
        params: HcaParameters | None = None, options: OdpOptions | None = None, device_frames: int = 0, **costs: float,
    ) -> None:  # fmt: skip
        self.options = options or OdpOptions()
        self.engine = Engine(seed, jitter)
        self.costs = make_costs({**TIMES, **costs})
        self.fabric = Fabric()
        more = (frames, era, caps or HcaCaps(), params or HcaParameters(), device_frames)
        self.client, self.server = Side(self, "client", *more), Side(self, "server", *more)

    def rc(self, **attributes: int) -> tuple[Qp, Qp]:
        left, right = self.client.qp(), self.server.qp()
        assert self.client.do(connect(self.client.thread, left, right, **attributes)) == 0
        return left, right

    def settle(self) -> None:
        """Let everything under way end (timers of the mkey cache apart)."""
        self.engine.run(self.engine.env.timeout(1e5))

    def check(self) -> None:
        """No stale DMA, no page fault left over, no pins but those of pinned regions."""
        for side in (self.client, self.server):
            assert not side.hca.dma.stale and not side.hca.dma.errors
            assert not side.hca.outstanding_faults and not side.hca.counters.unknown_resumes
