"""Page faults from event to resumption: handlers, segments, indirect keys, look-ahead, workers, back-pressure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers.mlx5.odp_rig import ODP, PINNED, Rig, steps

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.adapter.queues import Cq, Srq
from kit.drivers.mlx5.descriptors import Mkc, PageFaultEqe, Seg, WqeImage
from kit.drivers.mlx5.enums import KLM, PAGE, Access, AccessMode, Era, PageFaultSubtype, QpType, WrOpcode
from kit.drivers.mlx5.objects import MKEY_INDIRECT_DEVX, MKEY_MW, Mlx5IbMkey
from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_pfault
from kit.drivers.mlx5.odp.segment import pages_in_range

ERAS = [Era.OLD, Era.MID, Era.NEW]
REQUESTER, RESPONDER = 1, 2


def handle(rig: Rig, **fields: Any) -> Pagefault:
    """Give one decoded event to the handlers."""
    pfault = Pagefault(rig.dev, **fields)
    rig.run(mlx5_ib_pfault(pfault, rig.thread))
    return pfault


def errors(rig: Rig) -> list[str]:
    """Causes of the resumptions so far."""
    trace = rig.engine.trace
    step, cause = trace.spans.column("step"), trace.spans.column("cause")
    wanted = trace.steps("mlx5_ib_page_fault_resume")
    return [trace.causes.words[int(c)] for s, c in zip(step, cause, strict=True) if s == wanted]


def region(rig: Rig, pages: int, access: int = ODP, resident: bool = False) -> Any:
    va = rig.mmap(pages, resident=resident)
    return rig.reg(va, pages * PAGE, access)


# -- one-sided operations at the responder -----------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_the_whole_rest_of_the_operation_is_faulted(era):
    rig = Rig(era)
    mr = region(rig, 64)
    handle(rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=32 * PAGE, bytes_committed=8 * PAGE,
           packet_size=PAGE)  # fmt: skip
    assert errors(rig) == ["replay"] and mr.odp_stats.faults == 24
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt
    assert np.flatnonzero(hw[:64]).tolist() == list(range(8, 32))


@pytest.mark.parametrize("era", ERAS)
def test_without_a_length_one_packet_then_as_far_as_the_message_had_come(era):
    rig = Rig(era)
    mr = region(rig, 64)
    since = len(rig.engine.trace.spans)
    handle(
        rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=0, bytes_committed=16 * PAGE, packet_size=PAGE
    )
    entered = steps(rig, since)
    assert entered.count("pagefault_single_data_segment") == 2
    first, second = (i for i, s in enumerate(entered) if s == "pagefault_single_data_segment")
    assert first < entered.index("mlx5_ib_page_fault_resume") < second
    assert mr.odp_stats.faults == 1 + 16  # the look-ahead starts at the packet, and counts as faults
    assert mr.odp_stats.faults_handled == (2 if era == Era.NEW else 0)


def test_look_ahead_is_4_mib_at_most():
    rig = Rig(frames=1 << 14)
    mr = region(rig, 4096)
    handle(
        rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=0, bytes_committed=8 << 20, packet_size=PAGE
    )
    assert mr.odp_stats.faults == 1 + 1024


@pytest.mark.parametrize(("offset", "pages"), [(0, 1), (8, 2)])
def test_look_ahead_of_nothing(offset, pages):
    """With nothing committed the pass has no length: an aligned address maps nothing, any other its page once more."""
    rig = Rig()
    mr = region(rig, 8)
    handle(rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova + offset, rdma_op_len=0, packet_size=64)
    assert errors(rig) == ["replay"] and mr.odp_stats.faults == pages


def test_look_ahead_that_leaves_the_region_maps_nothing():
    rig = Rig()
    mr = region(rig, 8)
    handle(
        rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=0, bytes_committed=5 * PAGE, packet_size=PAGE
    )
    assert errors(rig) == ["replay"] and mr.odp_stats.faults == 1


@pytest.mark.parametrize(("era", "cause"), [(Era.MID, "error"), (Era.NEW, "replay")])
def test_a_remote_key_that_is_not_on_demand(era, cause):
    rig = Rig(era)
    mr = region(rig, 4, PINNED)
    rig.reg(rig.mmap(1), PAGE)
    handle(rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=64)
    assert errors(rig) == [cause]


@pytest.mark.parametrize("era", ERAS)
def test_what_is_resumed_with_an_error(era):
    rig = Rig(era)
    mr = region(rig, 4)
    for key, va, length in [
        (mr.rkey ^ 1, mr.iova, 64),  # another variant
        (mr.rkey, mr.iova - PAGE, 64),
        (mr.rkey, mr.iova + 3 * PAGE, 2 * PAGE),
    ]:
        handle(rig, event_subtype=1, r_key=key, rdma_va=va, rdma_op_len=length)
    assert errors(rig) == ["error"] * 3 and mr.mmkey.usecount == 1 and mr.umem.npages == 0
    handle(rig, event_subtype=7)
    assert errors(rig)[-1] == "error"


@pytest.mark.parametrize("era", ERAS)
def test_whether_a_page_is_made_writable_is_the_regions_business(era):
    rig = Rig(era)
    mr = region(rig, 4)
    handle(rig, event_subtype=1, r_key=mr.rkey, rdma_va=mr.iova, rdma_op_len=64)  # were it only a READ
    assert rig.walk(mr.rkey, mr.iova, 64, Need.REMOTE_WRITE).verdict == Verdict.OK
    assert rig.memory.refcount[0] == 1  # no zero page
    readable = region(rig, 4, Access.ON_DEMAND | Access.REMOTE_READ)
    handle(rig, event_subtype=1, r_key=readable.rkey, rdma_va=readable.iova, rdma_op_len=64)
    hw = rig.hca.mkeys.mkeys[readable.mmkey.key >> 8].xlt
    assert int(hw[0]) & 3 == 1


def test_122071_faults_for_500_000_000_bytes():
    assert pages_in_range(0x7F0000000000, 500_000_000) == 122_071
    rig = Rig(frames=1 << 17)
    mr = region(rig, 122_071)
    assert not rig.fault(mr.rkey, mr.iova, 500_000_000)
    assert mr.odp_stats.faults == 122_071 and mr.umem.npages == 122_071


def test_one_fault_of_512_pages_is_512_and_1():
    rig = Rig(Era.NEW)
    mr = region(rig, 512)
    assert not rig.fault(mr.rkey, mr.iova, 512 * PAGE)
    assert (mr.odp_stats.faults, mr.odp_stats.faults_handled) == (512, 1)


def test_dead_owner():
    from kit.memory.syscalls.exit import mmput

    rig = Rig()
    mr = region(rig, 4)
    rig.run(mmput(rig.mm, rig.thread))
    assert rig.fault(mr.rkey, mr.iova, 64)
    assert rig.dereg(mr) == 0


def test_a_fault_that_holds_the_last_reference_tears_the_address_space_down():
    rig = Rig()
    mr = region(rig, 4)
    other = region(rig, 4, resident=True)
    rig.mm.mm_users = 1
    done = rig.post(rig.rdma_event(mr.rkey, mr.iova, 64))
    rig.mm.mm_users += 1  # a second user, who leaves while the fault runs
    rig.engine.run(done)
    rig.mm.mm_users -= 1
    from kit.drivers.mlx5.umem.odp_map import mmput_async

    mmput_async(rig.mm, rig.thread, rig.dev)
    rig.settle(10.0)
    assert other.umem.npages == 0 and rig.hca.dma.live == 0


# -- work requests ---------------------------------------------------------------------------------------------------


class Wqe:
    """A queue pair whose work requests are written by hand."""

    def __init__(self, rig: Rig, kind: QpType = QpType.RC) -> None:
        cq = Cq(1, 16)
        self.rig, self.kind, self.qp = rig, kind, Qp(rig.hca, 77, kind, rig.pd.pdn, cq, cq)
        rig.hca.qps[77] = self.qp

    def fault(
        self, segments: list[Seg], opcode: int | None = WrOpcode.SEND, type_: int = REQUESTER, wq: int = 77, **more: Any
    ) -> str:
        octowords = sum(s.octowords for s in segments)
        facts: dict[str, Any] = {
            "opcode": opcode, "qp_type": self.kind, "ds": octowords, "bytes_read": 16 * octowords, "segments": segments
        }  # fmt: skip
        committed = more.pop("committed", 0)
        image = WqeImage(**{**facts, **more})
        self.rig.hca.read_wqe = lambda *_: image
        before = len(errors(self.rig))
        handle(self.rig, event_subtype=0, wq_num=wq, type=type_, bytes_committed=committed)
        return (errors(self.rig)[before:] or ["none"])[0]


def data(mr: Any, page: int, length: int) -> Seg:
    return Seg("data", 1, length, mr.lkey, mr.iova + page * PAGE)


CTRL, RADDR, ATOMIC, AV, XRC = Seg("ctrl", 1), Seg("raddr", 1), Seg("atomic", 1), Seg("av", 3), Seg("xrc", 1)


@pytest.mark.parametrize(
    ("kind", "opcode", "headers"),
    [
        (QpType.RC, WrOpcode.SEND, [CTRL]),
        (QpType.RC, WrOpcode.RDMA_WRITE, [CTRL, RADDR]),
        (QpType.RC, WrOpcode.RDMA_READ, [CTRL, RADDR]),
        (QpType.RC, WrOpcode.ATOMIC_CMP_AND_SWP, [CTRL, RADDR, ATOMIC]),
        (QpType.UD, WrOpcode.SEND, [CTRL, AV]),
        (QpType.DC, WrOpcode.RDMA_WRITE, [CTRL, AV, RADDR]),
        (QpType.XRC_SEND, WrOpcode.RDMA_READ, [CTRL, XRC, RADDR]),
    ],
)
def test_all_segments_of_a_request_are_faulted_at_once(kind, opcode, headers):
    rig = Rig(Era.NEW)
    a, b = region(rig, 16), region(rig, 16)
    w = Wqe(rig, kind)
    assert w.fault([*headers, data(a, 1, 3 * PAGE), data(b, 2, 64)], opcode) == "replay"
    assert (a.odp_stats.faults, b.odp_stats.faults) == (3, 1)
    assert a.odp_stats.faults_handled == b.odp_stats.faults_handled == 1  # one a segment


def test_requests_that_cannot_be_parsed():
    rig = Rig()
    mr = region(rig, 4)
    w = Wqe(rig)
    assert w.fault([CTRL, data(mr, 0, 64)], ds=0) == "error"
    assert w.fault([CTRL, data(mr, 0, 64)], ds=300) == "error"
    assert w.fault([CTRL]) == "error"  # nothing after the headers
    assert w.fault([data(mr, 0, 64)], opcode=None, type_=RESPONDER, signature=True) == "error"
    assert mr.odp_stats.faults == 0
    assert w.fault([CTRL, data(mr, 0, 64)], wq=78) == "none"  # no such queue: nobody to resume
    assert w.fault([CTRL, data(mr, 0, 64)], type_=9) == "none"
    rig.dev.inject.fail("wqe_page")
    assert w.fault([CTRL, data(mr, 0, 64)]) == "error"
    rig.dev.inject.fail("read_wqe")
    assert w.fault([CTRL, data(mr, 0, 64)]) == "error"
    assert w.fault([CTRL, data(mr, 0, 64)]) == "replay"


def test_a_receive_ends_at_its_terminator():
    rig = Rig()
    mr = region(rig, 8)
    w = Wqe(rig)
    end = Seg("data", 1, 0, rig.hca.caps.terminate_scatter_list_mkey, 0)
    stale = data(mr, 5, PAGE)
    assert w.fault([data(mr, 0, 64), end, stale], opcode=None, type_=RESPONDER) == "replay"
    assert mr.odp_stats.faults == 1


def test_a_shared_receive_queue():
    rig = Rig()
    mr = region(rig, 8)
    w = Wqe(rig)
    rig.hca.srqs[90] = Srq(90, rig.pd.pdn, 4, 16, None)
    assert w.fault([Seg("srq_next", 1), data(mr, 0, 2 * PAGE)], opcode=None, type_=0, wq=90) == "replay"
    assert mr.odp_stats.faults == 2


def test_a_length_of_zero_means_2_gib():
    rig = Rig()
    mr = region(rig, 8)
    w = Wqe(rig)
    assert w.fault([CTRL, data(mr, 0, 0)]) == "error"  # 2 GiB leave the region
    assert w.fault([CTRL, Seg("data", 1, 0, 0x123400, 64)]) == "replay"  # another key: counted as mapped


def test_lists_may_mix_both_kinds_of_memory():
    rig = Rig()
    odp, pinned = region(rig, 8), region(rig, 8, PINNED)
    assert Wqe(rig).fault([CTRL, data(pinned, 0, 8 * PAGE), data(odp, 0, 64), Seg("inline", 2, 20)]) == "replay"
    assert odp.odp_stats.faults == 1


def test_what_is_committed_is_skipped():
    rig = Rig()
    mr = region(rig, 16)
    w = Wqe(rig)
    assert w.fault([CTRL, data(mr, 0, 2 * PAGE), data(mr, 4, 4 * PAGE)], committed=3 * PAGE) == "replay"
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt
    assert np.flatnonzero(hw[:16]).tolist() == [5, 6, 7]


def test_the_first_segment_that_fails_ends_it():
    rig = Rig()
    a, b = region(rig, 4), region(rig, 4)
    assert Wqe(rig).fault([CTRL, data(a, 0, 64), data(a, 9, 64), data(b, 0, 64)]) == "error"
    assert (a.odp_stats.faults, b.odp_stats.faults) == (1, 0)


# -- indirect keys ---------------------------------------------------------------------------------------------------


def indirect(
    rig: Rig, entries: list[tuple[int, int, int]], kind: int = MKEY_INDIRECT_DEVX, start: int = 0
) -> Mlx5IbMkey:
    table = np.array([(size, key, va) for key, va, size in entries], dtype=KLM)
    mkc = Mkc(access_mode=AccessMode.KLM, pd=7, start_addr=start, length64=True, translations_octword_size=len(table))
    mkey = Mlx5IbMkey(rig.hca.mkeys.create(mkc, True, table).key, kind, len(table), 1)
    rig.dev.odp_mkeys[mkey.key & ~0xFF] = mkey
    return mkey


@pytest.mark.parametrize("kind", [MKEY_MW, MKEY_INDIRECT_DEVX])
def test_an_indirect_key_is_walked(kind):
    rig = Rig()
    a, b = region(rig, 8), region(rig, 8)
    key = indirect(rig, [(a.lkey, a.iova, 4 * PAGE), (b.lkey, b.iova + PAGE, 4 * PAGE)], kind, start=0x1000)
    handle(rig, event_subtype=1, r_key=key.key + 3, rdma_va=0x1000 + 3 * PAGE, rdma_op_len=2 * PAGE)  # any variant
    assert errors(rig) == ["replay"] and (a.odp_stats.faults, b.odp_stats.faults) == (1, 1)
    assert key.usecount == a.mmkey.usecount == 1
    hw = rig.hca.mkeys.mkeys[b.mmkey.key >> 8].xlt
    assert np.flatnonzero(hw[:8]).tolist() == [1]


def test_levels_of_indirection_are_limited():
    rig = Rig()
    mr = region(rig, 4)
    key = indirect(rig, [(mr.lkey, mr.iova, 4 * PAGE)])
    for _ in range(3):
        key = indirect(rig, [(key.key, 0, 4 * PAGE)])
    handle(rig, event_subtype=1, r_key=key.key, rdma_va=0, rdma_op_len=64)
    assert errors(rig) == ["replay"]
    key = indirect(rig, [(key.key, 0, 4 * PAGE)])
    handle(rig, event_subtype=1, r_key=key.key, rdma_va=0, rdma_op_len=64)
    assert errors(rig)[-1] == "error"
    rig.dev.inject.fail("pf_frame")
    handle(rig, event_subtype=1, r_key=key.key, rdma_va=0, rdma_op_len=64)
    assert errors(rig)[-1] == "error"


def test_other_kinds_of_keys_fail():
    rig = Rig()
    mkey = indirect(rig, [(1, 0, PAGE)], kind=9)
    handle(rig, event_subtype=1, r_key=mkey.key, rdma_va=0, rdma_op_len=64)
    assert errors(rig) == ["error"] and mkey.usecount == 1


# -- queue, workers, reserve -----------------------------------------------------------------------------------------


def test_32_faults_are_served_at_a_time():
    rig = Rig(cost=1.0)
    rig.costs.umr_wqe = 1000.0
    mr = region(rig, 1024)
    events = [rig.post(rig.rdma_event(mr.rkey, mr.iova + i * 8 * PAGE, 64)) for i in range(100)]
    for event in events:
        rig.engine.run(event)
    assert rig.dev.odp_pf_eq.wq.most_active == 32 and mr.odp_stats.faults == 100
    rig.check(mr)


def test_a_shortage_of_memory_leaves_events_in_the_queue():
    rig = Rig(cost=1.0)
    mr = region(rig, 1024)
    eq = rig.dev.odp_pf_eq
    rig.dev.inject.fail("pf_kmalloc", times=80)
    events = [rig.post(rig.rdma_event(mr.rkey, mr.iova + i * PAGE, 64)) for i in range(100)]
    for event in events:
        rig.engine.run(event)
    rig.settle(1e5)
    assert rig.dev.inject.hits["pf_kmalloc"] == 80
    assert "mlx5_ib_eq_pf_action" in steps(rig) and "mempool_refill" in steps(rig)
    assert eq.pool.curr_nr == 64 and eq.pool.out == 0 and eq.core.depth == 0
    assert mr.odp_stats.faults == 100


def test_the_reserve_is_not_a_cap():
    rig = Rig(cost=1.0, pf_max_active=200)
    rig.costs.umr_wqe = 1000.0
    mr = region(rig, 4096)
    for i in range(150):
        rig.post(rig.rdma_event(mr.rkey, mr.iova + i * 8 * PAGE, 64))
    rig.settle(2000.0)
    assert rig.dev.odp_pf_eq.pool.out > 64 and rig.dev.odp_pf_eq.pool.curr_nr == 64
    rig.settle(1e6)
    assert rig.dev.odp_pf_eq.pool.out == 0


def test_every_event_is_resumed_once():
    rig = Rig()
    mr = region(rig, 64)
    for i in range(20):
        rig.post(rig.rdma_event(mr.rkey, mr.iova + i * PAGE, 64))
    rig.settle(1000.0)
    c = rig.hca.counters
    assert (c.page_faults, c.resumes, c.unknown_resumes, len(rig.hca.outstanding_faults)) == (20, 20, 0, 0)


def test_unknown_events_are_resumed_with_an_error():
    rig = Rig()
    region(rig, 1)
    error = rig.engine.run(rig.post(PageFaultEqe(9)))
    assert error and PageFaultSubtype.MEMORY == 2


def test_the_queue_goes_with_the_device():
    from kit.drivers.mlx5.odp.pf_eq import mlx5_ib_odp_destroy_eq

    rig = Rig()
    region(rig, 1)
    assert rig.run(mlx5_ib_odp_destroy_eq(rig.dev, rig.thread)) == 0
    assert rig.hca.pf_eq is None and rig.dev.odp_pf_eq is None
