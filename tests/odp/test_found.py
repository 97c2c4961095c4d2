"""What the schedules and the documented cases have found, each on its own."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.odp_rig import ODP, Rig
from drivers.mlx5.two_hosts import World

from kit.drivers.mlx5.core.dma import DmaDevice
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.enums import PAGE, Era, WcStatus, WrOpcode
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH, ib_uverbs_advise_mr
from kit.memory.physical.pages import PhysicalMemory
from kit.sim.engine import Engine


def test_a_page_may_be_mapped_many_times_at_once() -> None:
    dma = DmaDevice(PhysicalMemory(Engine(), 16, payload_bytes=8))
    first = dma.map_pages(np.array([0, 3, 0, 0]))
    second = dma.map_pages(np.array([0, 3]))
    assert first is not None and second is not None
    assert dma.mapped[[0, 3]].tolist() == [4, 2] and dma.live == 6
    dma.unmap_pages(first[[0, 2]])
    assert not dma.resolve(first)[1][[2, 3]].any() and not dma.resolve(second)[1].any()
    dma.unmap_pages(first[[1, 3]])
    assert dma.resolve(first)[1].all() and not dma.resolve(second)[1].any()
    dma.unmap_pages(first[:1])
    assert (dma.errors, dma.live) == (1, 2)
    dma.unmap_pages(second)
    assert (dma.errors, dma.live) == (1, 0) and not dma.mapped.any()


@pytest.mark.parametrize("era", list(Era))
def test_a_region_of_zero_pages(era: Era) -> None:
    """A read-only prefetch of memory that nobody has touched maps the zero page for every entry."""
    rig = Rig(era)
    start = rig.mmap(16)
    mr = rig.reg(start, 16 * PAGE, ODP)
    assert (
        rig.run(ib_uverbs_advise_mr(rig.pd, rig.thread, PREFETCH, ADVISE_FLUSH, [Sge(start, 16 * PAGE, mr.lkey)])) == 0
    )
    assert rig.hca.dma.live == rig.hca.dma.mapped.max() == 16
    rig.check(mr)
    rig.dontneed(start, 4)
    assert not rig.fault(mr.rkey, start + 8 * PAGE, 8 * PAGE)
    rig.check(mr)
    assert rig.dereg(mr) == 0 and rig.hca.dma.live == 0 and rig.hca.dma.errors == 0


def test_a_read_that_is_asked_for_again_raises_one_fault() -> None:
    """The requester lacked a page for the answer; while it faulted, the responder's went too."""
    world = World(cmd_resume=400.0)
    client, server = world.client, world.server
    client.setup("explicit", 1), server.setup("explicit", 1)
    server.write(np.full(PAGE, 7, dtype=np.uint8))
    left, right = client.qp(), server.qp()
    from kit.drivers.mlx5.verbs import connect

    assert client.do(connect(client.thread, left, right, min_rnr_timer=1)) == 0
    client.send(left, WrOpcode.RDMA_WRITE, client.sge(), remote_addr=server.buf, rkey=server.mr.rkey)
    assert client.wait(left)[0].status == WcStatus.SUCCESS
    server.write(np.full(PAGE, 7, dtype=np.uint8))
    client.dontneed()
    before = server.hca.counters.page_faults
    client.send(left, WrOpcode.RDMA_READ, client.sge(), remote_addr=server.buf, rkey=server.mr.rkey)
    while not client.hca.outstanding_faults:
        world.engine.run(world.engine.env.timeout(1.0))
    server.dontneed()
    assert client.wait(left)[0].status == WcStatus.SUCCESS
    assert server.hca.counters.page_faults - before == 1 and server.hca.counters.rnr_naks > 5
    assert not client.read().any()  # what was given up reads as zeros
    world.settle()
    world.check()
