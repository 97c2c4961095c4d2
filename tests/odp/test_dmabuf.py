"""Seeded schedules over a dma-buf: messages, prefetches and a GPU that moves the buffer, all at once.

``FARFAULT_ODP_SCHEDULES`` says how many seeds are run, as for `test_schedules`; of these a tenth here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import simpy
from drivers.mlx5.dmabuf_rig import IOVA, Gpu
from drivers.mlx5.two_hosts import World
from odp.checks import need, refused_steps

from kit.drivers.dma_buf_exporter import GTT, VRAM
from kit.drivers.mlx5 import verbs, verbs_post
from kit.drivers.mlx5.descriptors import SendWr, Sge
from kit.drivers.mlx5.device import OdpOptions
from kit.drivers.mlx5.enums import PAGE, Era, WcStatus, WrOpcode
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH, PREFETCH_WRITE
from kit.sim.engine import Wait

SEEDS = max(int(os.environ.get("FARFAULT_ODP_SCHEDULES", "2000")) // 10, 20)
BLOCK = 20
LOW_BITS = np.uint64(3)


class Schedule:
    """Two to four queue pairs, each with pages of its own to write and read back, against a restless exporter."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.era = Era.NEW if seed % 2 else Era.MID
        self.lanes, self.each = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        pages = self.lanes * self.each
        memory_scheme = self.era == Era.NEW and rng.random() < 0.5
        world = self.world = World(
            self.era, seed=seed, jitter=float(rng.choice([0.0, 0.5, 3.0])), device_frames=1024,
            options=OdpOptions(revoke_under_lock=True),
        )  # fmt: skip
        if memory_scheme:
            for side in (world.client, world.server):
                side.hca.caps.mem_page_fault = side.hca.caps.page_prefetch = True
                side.hca.memory_scheme = side.dev.mem_page_fault()
        world.client.setup("pinned", pages)
        self.gpu = Gpu(world.server, pages, bool(rng.random() < 0.6), VRAM, 512, float(rng.choice([0.01, 1.0, 20.0])))
        world.server.setup("explicit", 1)
        self.mr = world.server.do(self.gpu.register())
        self.model = np.zeros(pages * PAGE, dtype=np.uint8)
        self.qps = [world.rc(min_rnr_timer=int(rng.choice([1, 12])))[0] for _ in range(self.lanes)]
        self.env, self.busy = world.engine.env, True

    def run(self) -> None:
        lanes = [self.env.process(self.lane(at)) for at in range(self.lanes)]
        others = [self.env.process(each) for each in (self.mover(), self.prefetcher(), self.watcher())]
        self.world.engine.run(simpy.AllOf(self.env, lanes))
        self.busy = False
        self.world.engine.run(simpy.AllOf(self.env, others))
        end = self.env.process(verbs.dereg_mr(self.mr, self.thread("program")))
        if self.rng.random() < 0.5:
            self.env.process(self.gpu.there_and_back())
        need(self.world.engine.run(end) == 0, "dereg_mr failed")
        self.world.settle()
        self.check_end()

    def thread(self, name: str) -> Any:
        made = self.world.engine.thread(name)
        made.now = self.world.engine.now
        return made

    def pause(self) -> simpy.Event:
        return self.env.timeout(float(self.rng.exponential(self.rng.choice([5.0, 100.0, 1000.0]))))

    def lane(self, at: int) -> Wait:
        """Write and read random pieces of this queue pair's pages, one after the other, and compare."""
        world, rng, thread = self.world, self.rng, self.thread(f"lane {at}")
        qp, start, size = self.qps[at], at * self.each * PAGE, self.each * PAGE
        memory = world.client.memory.payload
        from kit.flows.rdma.content import frames_of

        pfns = frames_of(world.client.mm, world.client.buf // PAGE, self.lanes * self.each)
        for _ in range(int(rng.integers(3, 12))):
            first = int(rng.integers(0, size - 8))
            offset, length = start + first, int(rng.integers(1, size - first + 1))
            read = rng.random() < 0.5
            local = memory[pfns].view(np.uint8).reshape(-1)
            local[offset : offset + length] = 0 if read else rng.integers(0, 256, length, dtype=np.uint8)
            wanted = local[offset : offset + length].copy()
            memory[pfns[at * self.each : (at + 1) * self.each]] = (
                local[start : start + size].view(np.uint64).reshape(self.each, -1)
            )
            opcode = WrOpcode.RDMA_READ if read else WrOpcode.RDMA_WRITE
            wr = SendWr(0, opcode, (world.client.sge(offset, length),), remote_addr=IOVA + offset, rkey=self.mr.rkey)
            need((yield from verbs_post.post_send(qp, thread, wr)) == 0, "post_send failed")
            wc = (yield from verbs_post.wait_cq(qp.send_cq, thread))[0]
            need(wc.status == WcStatus.SUCCESS, f"a message failed: {wc.status.name}")
            if read:
                came = memory[pfns].view(np.uint8).reshape(-1)[offset : offset + length]
                need((came == self.model[offset : offset + length]).all(), "a READ brought other bytes")
            else:
                self.model[offset : offset + length] = wanted
            yield self.pause()

    def mover(self) -> Wait:
        while self.busy:
            yield self.pause()
            need((yield from self.gpu.validate(int(self.rng.choice([GTT, VRAM])))) == 0, "the buffer did not move")

    def prefetcher(self) -> Wait:
        while self.busy:
            yield self.pause()
            yield self.pause()
            thread, advice = self.thread("prefetcher"), int(self.rng.choice([PREFETCH, PREFETCH_WRITE]))
            sge = [Sge(IOVA, PAGE, self.mr.lkey)]
            ret = yield from verbs.advise_mr(self.world.server.pd, thread, advice, ADVISE_FLUSH, sge)
            need(ret == 0, "advise_mr failed")

    def watcher(self) -> Wait:
        while self.busy:
            yield self.env.timeout(float(self.rng.exponential(30.0)))
            self.check()

    def check(self) -> None:
        """Hardware entry => mapped; and when nobody moves the buffer, => the page that it has there."""
        hca, gpu, mr = self.world.server.hca, self.gpu, self.mr
        need(not hca.dma.stale and not hca.dma.errors, "stale DMA")
        key = hca.mkeys.get(mr.mmkey.key)
        assert key is not None
        if mr.dead or key.mkc.free:
            return
        found = hca.mkeys.translate(mr.rkey, IOVA, mr.length, 0, self.world.server.pd.pdn)
        pfns, stale = hca.dma.resolve(found.addresses)
        need(not stale.any(), "an entry names an address that is not mapped")
        if gpu.bo.resv.holder is None and len(pfns):
            need((pfns == gpu.bo.pfns[: len(pfns)]).all(), "an entry names a page that the buffer has left")

    def check_end(self) -> None:
        world, gpu = self.world, self.gpu
        hca = world.server.hca
        need((gpu.bytes == self.model).all(), "bytes of the buffer were lost")
        need(not hca.outstanding_faults and hca.counters.resumes == hca.counters.page_faults, "a fault was not resumed")
        need(not hca.dma.stale and not hca.dma.errors and hca.dma.live == 0, "pages are still mapped for DMA")
        need("umr" not in refused_steps(world.engine), "a UMR request was refused")
        need(gpu.buf.references == 1 and not gpu.buf.attachments, "the importer has not let go")
        need(not gpu.bo.resv.fences or not gpu.bo.resv.busy(9), "a copy never ended")
        held = gpu.pages if gpu.bo.domain == VRAM else 0
        need(int((~gpu.adev.free).sum()) == held, "device pages are lost")
        need(self.mr.dead and self.mr.mmkey.usecount == 0, "uses are left")


@pytest.mark.parametrize("block", range(-(-SEEDS // BLOCK)))
def test_schedules_with_a_restless_exporter(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            Schedule(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
