"""Regions over a dma-buf: what registering checks, what a move does, and that no byte goes to where the buffer was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers.mlx5.dmabuf_rig import IOVA, RIGHTS, Gpu
from drivers.mlx5.odp_rig import Rig, failed, steps
from drivers.mlx5.rig import noise
from drivers.mlx5.two_hosts import Side, World

from kit.drivers.dma_buf_exporter import GTT, VRAM
from kit.drivers.mlx5 import verbs, verbs_post
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.descriptors import SendWr, Sge
from kit.drivers.mlx5.enums import PAGE, Access, Era, WcOpcode, WcStatus, WrOpcode
from kit.drivers.mlx5.mr.restrack import fill_stat_mr_entry
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH, ib_uverbs_advise_mr
from kit.drivers.mlx5.umem.dmabuf import IbUmemDmabuf, ib_umem_dmabuf_get, ib_umem_dmabuf_get_pinned
from kit.errors import Errno
from kit.memory.device.dma_buf import DmaBufAttachOps, close_fd

ERAS = (Era.MID, Era.NEW)


def host(era: Era = Era.MID, odp: bool = True, **more: Any) -> Rig:
    """A host with room for a GPU's memory; `odp`: it has an on-demand region, so that page faults are heard of."""
    rig = Rig(era, device_frames=1 << 12, **more)
    if odp:
        assert isinstance(rig.reg(rig.mmap(1), PAGE), Mlx5IbMr)
    return rig


def registered(rig: Rig, gpu: Gpu, **more: int) -> Mlx5IbMr:
    mr = rig.run(gpu.register(**more))
    assert isinstance(mr, Mlx5IbMr), mr
    return mr


def reaches(rig: Rig, mr: Mlx5IbMr, gpu: Gpu) -> bool:
    """Whether the hardware translates the whole region, to just the pages that the buffer has."""
    found = rig.walk(mr.rkey, mr.iova, mr.length)
    pfns, stale = rig.hca.dma.resolve(found.addresses)
    first = mr.umem.address // PAGE if mr.umem is not None else 0
    return found.good == mr.length and not stale.any() and (pfns == gpu.bo.pfns[first : first + len(pfns)]).all()


# -- registering


@pytest.mark.parametrize("era", ERAS)
def test_registration_maps_the_whole_buffer_at_once(era: Era) -> None:
    rig = host(era)
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    assert mr.is_dmabuf and not mr.is_odp and reaches(rig, mr, gpu)
    assert rig.hca.dma.live == gpu.pages and gpu.buf.references == 2
    assert rig.dev.odp_mkeys[mr.lkey & ~0xFF] is mr.mmkey and rig.dev.reg_pages == gpu.pages
    assert fill_stat_mr_entry(mr) == {}, "rdma stat shows only regions that asked for ON_DEMAND"
    assert mr.page_shift == (12 if era == Era.MID else 18), "7.0: the largest page that the mapping allows"


@pytest.mark.parametrize("era", ERAS)
def test_part_of_a_buffer(era: Era) -> None:
    rig = host(era)
    gpu = Gpu(rig)
    mr = registered(rig, gpu, offset=3 * PAGE + 100, length=9000, iova=IOVA + 100)
    found = rig.walk(mr.rkey, IOVA + 100, 9000)
    pfns, _ = rig.hca.dma.resolve(found.addresses)
    assert found.good == 9000 and pfns.tolist() == gpu.bo.pfns[3:6].tolist()
    assert rig.hca.dma.live == gpu.pages, "the exporter always maps all of it"


def bad(rig: Rig, gpu: Gpu, **more: Any) -> Any:
    got = rig.run(gpu.register(**more))
    assert isinstance(got, Errno)
    assert rig.hca.dma.live == 0 and gpu.buf.references == 1 and not gpu.buf.attachments
    return failed(got)


def test_what_the_system_call_refuses() -> None:
    rig = host(odp=False)
    gpu = Gpu(rig)
    method = "UVERBS_METHOD_REG_DMABUF_MR"
    assert bad(rig, gpu, offset=8, iova=IOVA) == ("EINVAL", method)
    assert bad(rig, gpu, access=RIGHTS | Access.ON_DEMAND) == ("EINVAL", method)
    assert bad(rig, gpu, access=RIGHTS | Access.HUGETLB) == ("EINVAL", method)
    assert bad(rig, gpu, access=int(Access.REMOTE_WRITE)) == ("EINVAL", "ib_check_mr_access")


def test_what_the_importer_refuses() -> None:
    rig = host(odp=False)
    gpu, name = Gpu(rig), "ib_umem_dmabuf_get"
    assert bad(rig, gpu, length=gpu.pages * PAGE + 1) == ("EINVAL", name)
    assert bad(rig, gpu, offset=PAGE, length=gpu.pages * PAGE, iova=IOVA + PAGE) == ("EINVAL", name)
    assert bad(rig, gpu, length=0) == ("EINVAL", name)
    assert bad(rig, gpu, offset=(1 << 64) - PAGE, length=2 * PAGE) == ("EINVAL", name)
    got = rig.run(ib_umem_dmabuf_get(rig.dev, rig.thread, rig.mm, 0, PAGE, gpu.fd, 1, DmaBufAttachOps(None)))
    assert failed(got) == ("EINVAL", name)
    gpu.fd = 99
    assert bad(rig, gpu) == ("EBADF", "dma_buf_get")
    rig.mm.files[99] = "a text file"
    assert bad(rig, gpu) == ("EINVAL", "dma_buf_get")


def test_what_the_driver_refuses() -> None:
    name = "mlx5_ib_reg_user_mr_dmabuf"
    rig = host(odp=False, config_odp=False)
    assert bad(rig, Gpu(rig)) == ("EOPNOTSUPP", name)
    rig = host(odp=False, caps=HcaCaps(umr_modify_entity_size_disabled=True))
    assert bad(rig, Gpu(rig)) == ("EINVAL", name)
    rig = host(Era.OLD, odp=False)
    assert bad(rig, Gpu(rig)) == ("EPROTONOSUPPORT", "ib_uverbs_cmd_verbs")


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("site", "name", "step"),
    [
        ("odp_mkeys", "ENOMEM", "mlx5r_store_odp_mkey"),
        ("xlt_dma_map", "ENOMEM", "mlx5r_umr_create_xlt"),
        ("umr", "EFAULT", "mlx5r_umr_post_send_wait"),
        ("mr", "ENOMEM", "_mlx5_mr_cache_alloc"),
    ],
)
def test_a_registration_that_fails_leaves_nothing(era: Era, site: str, name: str, step: str) -> None:
    rig = host(era, odp=False)
    gpu = Gpu(rig)
    rig.dev.inject.fail(site)
    assert bad(rig, gpu) == (name, step)
    assert not rig.dev.odp_mkeys and rig.dev.reg_pages == 0
    assert reaches(rig, registered(rig, gpu), gpu), "and the next one succeeds"


def test_the_exporters_errors_come_through() -> None:
    rig = host(odp=False)
    gpu = Gpu(rig)
    rig.hca.dma.fail_after = 0
    assert bad(rig, gpu) == ("EBUSY", "amdgpu_dma_buf_map")
    gpu = Gpu(rig, p2p=False, pages=200, memory_pages=1024)
    assert rig.memory.alloc_pages(rig.memory.free_pages - 100) is not None
    assert bad(rig, gpu) == ("ENOMEM", "ttm_bo_validate")


# -- following a move


@pytest.mark.parametrize("era", ERAS)
def test_a_move_is_zap_then_unmap_then_copy_and_the_next_fault_maps_all_again(era: Era) -> None:
    rig = host(era)
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    since = len(rig.engine.trace.spans)
    assert rig.run(gpu.validate(GTT)) == 0
    assert rig.hca.dma.live == 0 and not rig.walk(mr.rkey, IOVA, PAGE).good
    entered = steps(rig, since)
    order = ["dma_buf_move_notify", "mlx5_ib_dmabuf_invalidate_cb", "umr", "amdgpu_dma_buf_unmap", "dma_resv_add_fence"]
    assert [entered.index(name) for name in order] == sorted(entered.index(name) for name in order)
    assert mr.odp_stats.faults == 0
    assert rig.fault(mr.rkey, IOVA + 5 * PAGE, 8) is False
    assert reaches(rig, mr, gpu) and mr.odp_stats.faults == gpu.pages, "8 bytes were missing, all pages are counted"
    assert gpu.bo.domain == GTT and gpu.adev.free.sum() == len(gpu.adev.free)


def fragment(rig: Rig) -> None:
    """Leave free only host pages that do not lie side by side, as far as a test needs them."""
    taken = rig.memory.alloc_pages(rig.memory.free_pages)
    assert taken is not None
    rig.memory.put(np.sort(taken)[::2])


@pytest.mark.parametrize("era", ERAS)
def test_umr_requests_of_a_move(era: Era) -> None:
    """Closed form: 1 to zap, 1 to map. In 7.0 the page size changes too, from 256 KiB in one piece to 4 KiB and back:

    5 instead of 1 to the smaller size (8 entries empty, size, the others, size, the 8), 3 to the larger (all, size, 1).
    """
    rig = host(era)
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    fragment(rig)
    for domain, later in ((GTT, 5), (VRAM, 3)):
        before = rig.umrs()
        assert rig.run(gpu.validate(domain)) == 0
        assert rig.umrs() - before == 1
        assert rig.fault(mr.rkey, IOVA, PAGE) is False and reaches(rig, mr, gpu)
        assert rig.umrs() - before == 1 + (1 if era == Era.MID else later)
        assert mr.page_shift == (18 if era == Era.NEW and domain == VRAM else 12)


@pytest.mark.parametrize("pages", [1, 2, 7, 8, 9, 64, 65, 200, 512, 513, 1000])
def test_every_size_finds_its_pages_after_every_change_of_the_page_size(pages: int) -> None:
    rig = host(Era.NEW)
    fragment(rig)
    gpu = Gpu(rig, pages, memory_pages=2048)
    mr = registered(rig, gpu)
    for _ in range(4):
        assert reaches(rig, mr, gpu)
        assert rig.run(gpu.there_and_back()) == 0
        assert not rig.walk(mr.rkey, IOVA, PAGE).good and not rig.walk(mr.rkey, IOVA + (pages - 1) * PAGE, 8).good
        assert rig.fault(mr.rkey, IOVA, PAGE) is False
    assert rig.dereg(mr) == 0 and rig.hca.dma.live == rig.hca.dma.errors == 0


def test_the_fault_waits_for_the_exporters_copy() -> None:
    """The buffer is in its new place at once, its content comes 1 us a page later: the mapping waits for it."""
    rig = host()
    gpu = Gpu(rig, 500)
    rig.memory.payload[gpu.bo.pfns, 0] = np.arange(500, dtype=np.uint64) + 1
    mr = registered(rig, gpu)
    assert rig.run(gpu.validate(GTT)) == 0
    moved = rig.engine.now
    assert not rig.memory.payload[gpu.bo.pfns, 0].any(), "nothing has come yet"
    done = rig.post(rig.rdma_event(mr.rkey, IOVA, PAGE))
    assert rig.engine.run(done) is False and rig.engine.now >= moved + 500.0
    assert (rig.memory.payload[gpu.bo.pfns, 0] == np.arange(500) + 1).all() and reaches(rig, mr, gpu)


def test_without_peer_to_peer_a_mapping_brings_the_buffer_to_host_memory() -> None:
    rig = host()
    gpu = Gpu(rig, p2p=False)
    assert gpu.bo.domain == VRAM
    mr = registered(rig, gpu)
    assert gpu.bo.domain == GTT and gpu.bo.moves == 1 and reaches(rig, mr, gpu)
    assert rig.run(gpu.validate(VRAM)) == 0 and gpu.bo.domain == VRAM
    assert rig.fault(mr.rkey, IOVA, 8) is False and gpu.bo.domain == GTT and gpu.bo.moves == 3 and reaches(rig, mr, gpu)


def test_a_kernel_without_move_notify_pins_in_host_memory() -> None:
    rig = host()
    gpu = Gpu(rig)
    gpu.buf.config_move_notify = False
    mr = registered(rig, gpu)
    assert gpu.bo.domain == GTT and gpu.bo.pin_count == 1
    assert failed(rig.run(gpu.validate(VRAM))) == ("EINVAL", "ttm_bo_validate")
    assert reaches(rig, mr, gpu)
    assert rig.dereg(mr) == 0 and gpu.bo.pin_count == 0 and rig.run(gpu.validate(VRAM)) == 0


def test_memory_for_devx_is_pinned_and_a_move_is_refused() -> None:
    rig = host(odp=False)
    gpu = Gpu(rig)
    umem = rig.run(ib_umem_dmabuf_get_pinned(rig.dev, rig.thread, rig.mm, 0, PAGE, gpu.fd, RIGHTS))
    assert isinstance(umem, IbUmemDmabuf) and umem.pinned and gpu.bo.pin_count == 1 and gpu.bo.domain == GTT
    assert failed(rig.run(gpu.validate(VRAM))) == ("EINVAL", "ttm_bo_validate")


def test_a_fault_that_cannot_map_is_resumed_with_an_error() -> None:
    rig = host()
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    assert rig.run(gpu.validate(GTT)) == 0
    rig.hca.dma.fail_after = 0
    assert rig.fault(mr.rkey, IOVA, PAGE) is True
    assert rig.fault(mr.rkey, IOVA, PAGE) is False and reaches(rig, mr, gpu), "the next one can"
    assert rig.fault(mr.rkey, IOVA - PAGE, PAGE) is True, "below the region"


def test_prefetch_maps_it_too() -> None:
    rig = host()
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    assert rig.run(gpu.validate(GTT)) == 0
    sge = Sge(IOVA, PAGE, mr.lkey)
    assert rig.run(ib_uverbs_advise_mr(rig.pd, rig.thread, PREFETCH, ADVISE_FLUSH, [sge])) == 0
    assert reaches(rig, mr, gpu) and mr.odp_stats.prefetch == gpu.pages and mr.odp_stats.faults == 0


# -- the end


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("mapped", [True, False])
def test_deregistering_detaches(era: Era, mapped: bool) -> None:
    rig = host(era)
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    if not mapped:
        assert rig.run(gpu.validate(GTT)) == 0
    assert rig.dereg(mr) == 0 and mr.dead
    assert rig.hca.dma.live == rig.hca.dma.errors == rig.dev.reg_pages == 0
    assert not gpu.buf.attachments and gpu.buf.references == 1
    assert "mlx5r_umr_recover" not in steps(rig)
    close_fd(rig.mm, gpu.fd)
    assert gpu.bo.dma_buf is None and gpu.bo.references == 1 and len(gpu.bo.pfns) == gpu.pages


def racing(rig: Rig) -> tuple[Gpu, Mlx5IbMr, int]:
    """Deregister while the exporter moves the buffer; return what the recovery of the UMR queue came to."""
    gpu = Gpu(rig)
    mr = registered(rig, gpu)
    end = rig.engine.start(verbs.dereg_mr(mr, rig.thread))
    rig.engine.start(gpu.validate(GTT))
    assert rig.engine.run(end) == 0
    rig.settle()
    return gpu, mr, steps(rig).count("mlx5r_umr_recover")


@pytest.mark.parametrize("fixed", [True, False])
def test_a_move_between_revoking_and_unmapping_zaps_a_free_key_unless_the_region_is_detached_first(fixed: bool) -> None:
    """As on demand: 7.0 revokes under the reservation and takes the region away; 6.9 breaks the UMR queue."""
    rig = host(revoke_under_lock=fixed, cost=1.0)
    _, _, recoveries = racing(rig)
    assert (recoveries > 0) == (not fixed)
    assert rig.hca.dma.live == rig.hca.dma.errors == 0 and not rig.hca.dma.stale


def test_without_an_on_demand_region_nobody_hears_of_the_fault_after_a_move() -> None:
    """Only `create_user_odp_mr` makes the page-fault queue, in 6.9 and in 7.0."""
    for era in ERAS:
        rig = host(era, odp=False)
        gpu = Gpu(rig)
        mr = registered(rig, gpu)
        assert rig.dev.odp_pf_eq is None
        assert rig.run(gpu.validate(GTT)) == 0 and not rig.walk(mr.rkey, IOVA, PAGE).good


# -- with a peer on the wire


class Pair(World):
    """Two hosts; the server's memory is a GPU's, which its driver exports."""

    def __init__(self, pages: int = 16, odp: bool = True, **more: Any) -> None:
        super().__init__(device_frames=1024, **more)
        self.client.setup("pinned", pages)
        self.gpu = Gpu(self.server, pages, memory_pages=512)
        if odp:
            self.server.setup("explicit", 1)
        self.mr = self.server.do(self.gpu.register())
        assert isinstance(self.mr, Mlx5IbMr)

    def rdma(self, qp: Any, opcode: WrOpcode, offset: int = 0, length: int | None = None) -> None:
        size = self.client.size - offset if length is None else length
        self.client.send(qp, opcode, self.client.sge(offset, size), remote_addr=IOVA + offset, rkey=self.mr.rkey)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("p2p", [True, False])
def test_bytes_follow_the_buffer_there_and_back(era: Era, p2p: bool) -> None:
    pair = Pair(era=era)
    pair.gpu.adev.p2p_distance = 0 if p2p else -1
    qp, _ = pair.rc()
    for turn in range(4):
        data = noise(16, turn)
        pair.client.write(data)
        pair.rdma(qp, WrOpcode.RDMA_WRITE)
        assert pair.client.wait(qp)[0].status == WcStatus.SUCCESS
        pair.settle()
        assert (pair.gpu.bytes == data).all()
        assert pair.server.do(pair.gpu.there_and_back()) == 0
        pair.client.write(noise(16, 99))
        pair.rdma(qp, WrOpcode.RDMA_READ)
        wc = pair.client.wait(qp)[0]
        assert (wc.status, wc.opcode) == (WcStatus.SUCCESS, WcOpcode.RDMA_READ)
        assert (pair.client.read() == data).all(), "what came is what had been moved"
    pair.settle()
    pair.check()


def test_a_responder_without_a_page_fault_queue_fails_the_operation_after_a_move() -> None:
    pair = Pair(odp=False)
    qp, _ = pair.rc()
    assert pair.server.do(pair.gpu.validate(GTT)) == 0
    pair.rdma(qp, WrOpcode.RDMA_WRITE)
    assert pair.client.wait(qp)[0].status == WcStatus.REM_ACCESS_ERR


def test_an_exporter_that_tells_nobody_loses_what_is_written() -> None:
    """The check on the checks: with the old translation the bytes go to pages that the buffer has left."""
    pair = Pair()
    pair.gpu.adev.notify = False
    qp, _ = pair.rc()
    assert pair.server.do(pair.gpu.validate(GTT)) == 0
    data = noise(16, 5)
    pair.client.write(data)
    pair.rdma(qp, WrOpcode.RDMA_WRITE)
    assert pair.client.wait(qp)[0].status == WcStatus.SUCCESS
    assert not (pair.gpu.bytes == data).any() or (pair.gpu.bytes != data).sum() > len(data) // 2


def test_the_requesters_own_memory_may_be_a_dma_buf() -> None:
    world = World(device_frames=1024)
    side: Side = world.client
    gpu = Gpu(side, 16, memory_pages=512)
    side.setup("explicit", 1)
    mr = side.do(gpu.register())
    world.server.setup("pinned", 16)
    data = noise(16, 8)
    gpu.fill(data)
    qp, _ = world.rc()
    assert side.do(gpu.validate(GTT)) == 0
    wr = SendWr(0, WrOpcode.RDMA_WRITE, (Sge(IOVA, 16 * PAGE, mr.lkey),), remote_addr=world.server.buf,
                rkey=world.server.mr.rkey)  # fmt: skip
    assert side.do(verbs_post.post_send(qp, side.thread, wr)) == 0
    assert side.wait(qp)[0].status == WcStatus.SUCCESS and (world.server.read() == data).all()
    assert mr.odp_stats.faults == 16
