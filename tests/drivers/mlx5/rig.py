"""Adapters without a kernel: keys made by hand, and a few lines in the driver's place that bring missing pages."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.fabric import Fabric
from kit.drivers.mlx5.adapter.hca import Hca, HcaParameters
from kit.drivers.mlx5.adapter.mkey import HwMkey
from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.adapter.queues import Cq, Srq
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.core.eq import (
    EqParam,
    mlx5_eq_create_generic,
    mlx5_eq_enable,
    mlx5_eq_get_eqe,
    mlx5_eq_update_cc,
    mlx5_eq_update_ci,
)
from kit.drivers.mlx5.costs import COSTS, make_costs
from kit.drivers.mlx5.descriptors import Mkc, PageFaultEqe
from kit.drivers.mlx5.enums import MTT_PRESENT, PAGE, Access, Era, PageFaultSubtype, QpType
from kit.drivers.mlx5.verbs import connect
from kit.memory.physical.pages import PhysicalMemory
from kit.sim.engine import Engine, Thread, Wait

ALL = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC
PD = 7
TIMES = {
    **dict.fromkeys(COSTS, 0.0), "wire_latency": 1.0, "wire_bandwidth": 12500.0, "hw_fault_detect": 100.0, "irq": 5.0,
    "cmd_resume": 50.0, "umr_wqe": 3.0, "wqe_fetch": 0.5, "cmd_create_mkey": 20.0, "cmd_create_eq": 30.0,
}  # fmt: skip


class Region:
    """A key over consecutive virtual pages of one host; `missing` pages have no entry yet."""

    def __init__(self, host: Host, pages: int, va: int, access: int, missing: bool, pg: bool) -> None:
        mkc = Mkc(pd=PD, start_addr=va, len=pages * PAGE, umr_en=True, translations_octword_size=(pages + 1) // 2)
        mkc.set_access(access)
        self.host, self.va, self.pages = host, va, pages
        self.mkey: HwMkey = host.hca.mkeys.create(mkc, pg_access=pg)
        self.key = self.mkey.key
        self.pfns = host.take(pages)
        if not missing:
            self.map(0, pages)

    def map(self, first: int, count: int) -> None:
        addresses = self.host.hca.dma.map_pages(self.pfns[first : first + count])
        assert addresses is not None
        self.mkey.xlt[first : first + count] = addresses | np.uint64(MTT_PRESENT)

    def unmap(self, first: int, count: int, zap: bool = True) -> None:
        self.host.hca.dma.unmap_pages(self.mkey.xlt[first : first + count] & ~np.uint64(MTT_PRESENT))
        if zap:
            self.mkey.xlt[first : first + count] = 0

    @property
    def bytes(self) -> NDArray[np.uint8]:
        return self.host.hca.memory.payload[self.pfns].view(np.uint8).reshape(-1)

    def fill(self, data: NDArray[np.uint8]) -> None:
        self.host.hca.memory.payload[self.pfns] = data.view(np.uint64).reshape(self.pages, -1)


class Host:
    """One adapter and what stands in for its driver: every fault is answered by `serve`, then resumed."""

    def __init__(self, pair: Pair, name: str, params: HcaParameters, caps: HcaCaps) -> None:
        self.engine = pair.engine
        self.memory = PhysicalMemory(pair.engine, pair.frames, payload_bytes=pair.payload)
        self.hca = Hca(pair.engine, self.memory, pair.costs, caps, params, name)
        pair.fabric.attach(self.hca)
        self.next_pfn = 16
        self.regions: list[Region] = []
        self.events: list[PageFaultEqe] = []
        self.error = False
        self.on_fault: Callable[[PageFaultEqe], None] | None = None
        self.dev = SimpleNamespace(hca=self.hca, costs=pair.costs, era=Era.MID)
        self.eq: Any = None

    def take(self, n: int) -> NDArray[np.int64]:
        pfns = np.arange(self.next_pfn, self.next_pfn + n)
        self.next_pfn += n
        return np.random.default_rng(self.next_pfn).permutation(pfns)

    def region(
        self, pages: int, va: int = 0x10000, access: int = ALL, missing: bool = False, pg: bool = True
    ) -> Region:
        made = Region(self, pages, va, access, missing, pg)
        self.regions.append(made)
        return made

    def enable(self, thread: Thread) -> Wait:
        self.eq = yield from mlx5_eq_create_generic(self.hca, thread, EqParam())
        mlx5_eq_enable(self.hca, thread, self.eq, self.interrupt)

    def interrupt(self, thread: Thread) -> Wait:
        cc = 0
        while (eqe := mlx5_eq_get_eqe(self.eq, thread, cc)) is not None:
            self.events.append(eqe)
            cc = mlx5_eq_update_cc(self.eq, thread, cc + 1)
            self.engine.start(self.handle(eqe))
        mlx5_eq_update_ci(self.eq, thread, cc, True)
        yield from thread.sync()

    def handle(self, eqe: PageFaultEqe) -> Wait:
        """Bring what the event asks for: the whole rest of the operation, as the driver does."""
        thread = self.engine.thread(f"{self.hca.name} worker")
        if self.on_fault is not None:
            self.on_fault(eqe)
        if not self.error:
            for key, va, size in self.wanted(eqe):
                self.bring(key, va, size)
        token = eqe.token or eqe.pftype_token & 0xFFFFFF or eqe.token31_0
        ret = yield from self.hca.page_fault_resume(thread, 0, token, eqe.pftype_wq & 0xFFFFFF, self.error)
        assert ret == 0

    def wanted(self, eqe: PageFaultEqe) -> list[tuple[int, int, int]]:
        if eqe.sub_type == PageFaultSubtype.MEMORY:
            return [(eqe.mkey, eqe.va, (eqe.demand_fault_pages >> 12) * PAGE)]
        if eqe.sub_type == PageFaultSubtype.RDMA:
            length = eqe.rdma_op_len or eqe.packet_length + eqe.bytes_committed
            return [(eqe.r_key, eqe.rdma_va + eqe.bytes_committed, length - eqe.bytes_committed)]
        image = self.hca.read_wqe(eqe.pftype_wq & 0xFFFFFF, eqe.wqe_index, bool(eqe.pftype_wq >> 24 & 1))
        if image is None:
            return []  # the queue pair was reset meanwhile
        return [(s.lkey, s.addr, s.byte_count) for s in image.segments if s.kind == "data" and s.byte_count]

    def bring(self, key: int, va: int, size: int) -> None:
        for region in self.regions:
            if region.key == key:
                first, last = (va - region.va) // PAGE, min((va + size - 1 - region.va) // PAGE, region.pages - 1)
                for page in range(first, last + 1):
                    if not region.mkey.xlt[page]:
                        region.map(page, 1)


class Pair:
    """Two adapters on a fabric, and queue pairs between them."""

    def __init__(
        self, times: bool = True, frames: int = 4096, payload: int = PAGE, params: HcaParameters | None = None,
        caps: HcaCaps | None = None, seed: int = 0, jitter: float = 0.0, **costs: float,
    ) -> None:  # fmt: skip
        self.engine = Engine(seed, jitter)
        self.costs = make_costs({**TIMES, **costs} if times else None)
        self.frames, self.payload = frames, payload
        self.fabric = Fabric()
        self.thread = self.engine.thread("program")
        self.left, self.right = (
            Host(self, name, params or HcaParameters(), caps or HcaCaps())
            for name in ("requester hca", "responder hca")
        )
        self.run(self.left.enable(self.thread))
        self.run(self.right.enable(self.thread))

    def run(self, process: Wait) -> Any:
        self.thread.now = max(self.thread.now, self.engine.now)
        return self.engine.run(self.engine.start(process))

    def cq(self) -> Cq:
        return Cq(1, 1 << 16)

    def qp(self, host: Host, kind: QpType = QpType.RC, srq: Srq | None = None, depth: int = 1024) -> Qp:
        cq = self.cq()
        made = Qp(host.hca, self.fabric.number(host.hca), kind, PD, cq, self.cq(), srq, depth, depth)
        host.hca.qps[made.qpn] = made
        return made

    def rc(
        self, kinds: tuple[QpType, QpType] = (QpType.RC, QpType.RC), srq: Srq | None = None, **attributes: int
    ) -> tuple[Qp, Qp]:
        left, right = self.qp(self.left, kinds[0]), self.qp(self.right, kinds[1], srq)
        assert self.run(connect(self.thread, left, right, **attributes)) == 0
        return left, right


def noise(pages: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, pages * PAGE, dtype=np.uint8)
