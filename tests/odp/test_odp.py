"""All 23 cases of rdma-core's tests/test_odp.py, and the on-demand cases of its other tests, under their names.

Section by section as there: 100 iterations each, both directions, every payload validated. Send/receive, READ and
WRITE force page faults by MADV_DONTNEED of both buffers in every iteration; atomics, ATOMIC_WRITE, FLUSH and XRC only
fault on first touch; FLUSH and the two cases named ``huge_traffic`` let the library allocate the buffer. The
counts that are asserted follow from that.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
from odp.players import GRH_SIZE, HUGE_PAGE_SIZE, ITERS, MSG_SIZE, ODP, Player, Players

from kit.drivers.mlx5.caps import OdpTransport
from kit.drivers.mlx5.core.cmd import mlx5_core_create_mkey
from kit.drivers.mlx5.descriptors import Mkc, RecvWr, Sge, UmrWqe
from kit.drivers.mlx5.enums import KLM, PAGE, Access, AccessMode, Era, MkeyMask, QpType, WcStatus, WrOpcode, base_mkey
from kit.drivers.mlx5.objects import MKEY_INDIRECT_DEVX, Mlx5IbMkey
from kit.drivers.mlx5.odp.advise import PREFETCH, PREFETCH_NO_FAULT, PREFETCH_WRITE
from kit.drivers.mlx5.verbs import Dmah, create_srq, reg_mr_ex
from kit.drivers.mlx5.verbs_post import post_recv

ERAS = (Era.MID, Era.NEW)
ADVICE = (PREFETCH, PREFETCH_WRITE)
both_eras = pytest.mark.parametrize("era", ERAS)


def faults(players: Players) -> tuple[int, int]:
    return players.client.faults, players.server.faults


@both_eras
def test_odp_rc_traffic(era: Era) -> None:
    players = Players(era).create()
    players.traffic()
    assert faults(players) == (ITERS, ITERS)  # the answer finds both pages mapped


@both_eras
def test_odp_rc_mixed_mr(era: Era) -> None:
    players = Players(era).create(mixed=True)
    players.traffic()
    assert faults(players) == (ITERS, ITERS)


@both_eras
def test_odp_qp_ex_rc_atomic_write(era: Era) -> None:
    players = Players(era).create(OdpTransport.ATOMIC_WRITE, msg_size=8)
    players.rdma_traffic(WrOpcode.ATOMIC_WRITE, forced=False)
    assert faults(players) == (1, 1)  # first touch; what is written comes from the work request itself


@both_eras
def test_odp_qp_ex_rc_flush(era: Era) -> None:
    players = flush_players(era, mr_ex=False)
    assert faults(players) == (0, 0)  # the library has touched the buffers before they were registered


def flush_players(era: Era, mr_ex: bool) -> Players:
    access = ODP | Access.FLUSH_GLOBAL | Access.REMOTE_WRITE
    players = Players(era).create(OdpTransport.FLUSH, access=access, allocate=True, mr_ex=mr_ex)
    rng = np.random.default_rng(1)
    players.flush_traffic(whole_mr=False, rng=rng)
    players.flush_traffic(whole_mr=True, rng=rng)
    return players


@both_eras
def test_odp_rc_atomic_cmp_and_swp(era: Era) -> None:
    players = Players(era).create(OdpTransport.ATOMIC, msg_size=8)
    players.atomic_traffic(WrOpcode.ATOMIC_CMP_AND_SWP)
    players.atomic_traffic(WrOpcode.ATOMIC_CMP_AND_SWP, receiver_val=1, sender_val=1)
    assert faults(players) == (1, 1)


@both_eras
def test_odp_rc_atomic_fetch_and_add(era: Era) -> None:
    players = Players(era).create(OdpTransport.ATOMIC, msg_size=8)
    players.atomic_traffic(WrOpcode.ATOMIC_FETCH_AND_ADD)
    assert faults(players) == (1, 1)


@both_eras
def test_odp_rc_rdma_read(era: Era) -> None:
    players = Players(era).create(OdpTransport.READ)
    players.rdma_traffic(WrOpcode.RDMA_READ)
    assert faults(players) == (ITERS, ITERS)


@both_eras
def test_odp_rc_rdma_write(era: Era) -> None:
    players = Players(era).create(OdpTransport.WRITE)
    players.rdma_traffic(WrOpcode.RDMA_WRITE)
    assert faults(players) == (ITERS, ITERS)


@both_eras
def test_odp_implicit_rc_traffic(era: Era) -> None:
    players = Players(era).create(implicit=True)
    players.traffic()
    assert min(faults(players)) >= ITERS  # more when an access meets a child that is going


@both_eras
def test_odp_ud_traffic(era: Era) -> None:
    players = Players(era)
    client, server = players.both
    client.requires("ud", OdpTransport.SEND)
    for player in players.both:  # a send region on demand, a receive region pinned, both with room for the header
        player.buf = player.mmap(MSG_SIZE + GRH_SIZE)
        player.mr = player.reg(player.buf, MSG_SIZE + GRH_SIZE, ODP)
        player.mixed_buf = player.mmap(MSG_SIZE + GRH_SIZE)
        player.non_odp_mr = player.reg(player.mixed_buf, MSG_SIZE + GRH_SIZE, Access.LOCAL_WRITE)
        player.create_qp(QpType.UD)
    players.connect()
    into = RecvWr(0, (Sge(server.mixed_buf, MSG_SIZE + GRH_SIZE, server.non_odp_mr.lkey),))
    for _ in range(ITERS):
        client.madvise()
        assert server.side.do(post_recv(server.qp, server.side.thread, into)) == 0
        client.send(WrOpcode.SEND, (Sge(client.buf + GRH_SIZE, MSG_SIZE, client.mr.lkey),), ah_qp=server.qp.qpn)
        client.poll()
        assert server.poll().byte_len == MSG_SIZE + GRH_SIZE
        assert not server.read(MSG_SIZE, server.mixed_buf + GRH_SIZE).any()  # pages that nobody wrote are zero
    players.finish()
    assert faults(players) == (ITERS, 0)


@both_eras
def test_odp_xrc_traffic(era: Era) -> None:
    players = Players(era)
    players.create_xrc()
    players.xrc_traffic(ITERS)
    assert faults(players) == (1, 1)


@both_eras
def test_odp_rc_huge_traffic(era: Era) -> None:
    huge_traffic(era, mr_ex=False)


def huge_traffic(era: Era, mr_ex: bool) -> None:
    players = Players(era).create(huge=True, allocate=True, mr_ex=mr_ex)
    players.traffic(forced=False)
    assert faults(players) == (0, 0)
    assert all(player.mr.page_shift == 21 and player.mr.umem.npages == 1 for player in players.both)


@both_eras
@pytest.mark.parametrize("advised", [MSG_SIZE, HUGE_PAGE_SIZE])
def test_odp_rc_huge_user_addr_traffic(era: Era, advised: int) -> None:
    """The helper's MADV_DONTNEED of 1024 bytes is rounded down to no huge page at all; of 2 MiB it forces faults."""
    players = Players(era).create(huge=True)
    players.traffic(iters=ITERS if advised == MSG_SIZE else ITERS // 10, advised=advised)
    assert faults(players) == ((1, 1) if advised == MSG_SIZE else (ITERS // 10, ITERS // 10))


def prefetch_traffic(era: Era, how: str, advice: int, implicit: bool = False) -> Players:
    players = Players(era)
    for player in players.both:
        player.use_mr_prefetch, player.prefetch_advice = how, advice
    players.create(implicit=implicit)
    players.traffic()
    return players


@both_eras
@pytest.mark.parametrize("advice", ADVICE)
def test_odp_sync_prefetch_rc_traffic(era: Era, advice: int) -> None:
    players = prefetch_traffic(era, "sync", advice)
    # What was fetched for reading has to fault again for the answer to be written to it.
    again = ITERS if advice == PREFETCH else 0
    assert faults(players) == (again, ITERS)
    assert players.client.mr.odp_stats.prefetch == players.server.mr.odp_stats.prefetch == ITERS


@both_eras
@pytest.mark.parametrize("advice", ADVICE)
def test_odp_async_prefetch_rc_traffic(era: Era, advice: int) -> None:
    players = prefetch_traffic(era, "async", advice)
    assert players.server.faults >= ITERS
    assert players.client.mr.odp_stats.prefetch == players.server.mr.odp_stats.prefetch == ITERS


@both_eras
def test_odp_implicit_sync_prefetch_rc_traffic(era: Era) -> None:
    players = prefetch_traffic(era, "sync", PREFETCH_WRITE, implicit=True)
    assert players.client.faults == 0 and players.server.faults >= ITERS


@both_eras
def test_odp_implicit_async_prefetch_rc_traffic(era: Era) -> None:
    players = prefetch_traffic(era, "async", PREFETCH_WRITE, implicit=True)
    assert players.server.faults >= ITERS
    assert players.client.mr.odp_stats.prefetch == ITERS


@both_eras
def test_odp_prefetch_sync_no_page_fault_rc_traffic(era: Era) -> None:
    players = prefetch_traffic(era, "sync", PREFETCH_NO_FAULT)
    assert faults(players) == (0, ITERS)  # the CPU has just written what is sent, so that it is resident


@both_eras
def test_odp_prefetch_async_no_page_fault_rc_traffic(era: Era) -> None:
    players = prefetch_traffic(era, "async", PREFETCH_NO_FAULT)
    assert players.server.faults >= ITERS


@both_eras
def test_mrex_odp_rc_traffic(era: Era) -> None:
    players = Players(era).create(mr_ex=True)
    players.traffic()
    assert faults(players) == (ITERS, ITERS)


@both_eras
def test_mrex_odp_rc_huge_traffic(era: Era) -> None:
    huge_traffic(era, mr_ex=True)


@both_eras
def test_mrex_odp_implicit_rc_traffic(era: Era) -> None:
    players = Players(era).create(implicit=True, mr_ex=True)
    players.traffic()
    assert min(faults(players)) >= ITERS


@both_eras
def test_mrex_odp_qp_ex_rc_flush(era: Era) -> None:
    assert faults(flush_players(era, mr_ex=True)) == (0, 0)


# -- the related cases ---------------------------------------------------------------------------------------------


@both_eras
def test_odp_dc_traffic(era: Era) -> None:
    """test_mlx5_dc.py: 10 iterations over two DC pairs that receive through a shared queue.

    Applies whole; the documented case forces nothing, so the buffers fault on first touch only.
    """
    players = Players(era)
    for player in players.both:
        player.requires("dc", OdpTransport.SEND | OdpTransport.SRQ_RECV)
        player.create_mr(ODP)
        side = player.side
        player.srq = side.do(create_srq(side.pd, side.thread, 4096))
        player.create_qp(QpType.DC, player.srq), player.create_qp(QpType.DC, player.srq)
    players.connect()
    players.traffic(10, forced=False)
    assert faults(players) == (1, 1)


def test_devx_rc_qp_odp_traffic() -> None:
    """test_mlx5_devx.py: SEND with immediate over on-demand regions, pages given up before every message.

    Raw DevX queue pairs differ from verbs ones in who builds the work requests, which the kernel can then not parse;
    that is why the case needs the memory scheme. Here the same messages run through the verbs, on a device that
    reports MEMORY events, so that the driver never reads a work request either.
    """
    players = Players(Era.NEW, memory_scheme=True)
    players.create(access=ODP | Access.REMOTE_READ)
    client, server = players.both
    client.fill()
    for i in range(ITERS):
        for player in players.both:  # invalidate_mr_pages swaps them out or drops what is zero
            if player is server:
                player.madvise()
        client.madvise()
        client.fill()
        server.post_recv()
        client.send(WrOpcode.SEND_WITH_IMM, client.sges(), imm_data=0x1000 + i)
        client.poll()
        assert server.poll().imm_data == 0x1000 + i
        server.validate(client.letter)
        server.fill()
    players.finish()
    assert faults(players) == (ITERS, ITERS)
    names = players.world.engine.trace.steps.words
    assert "mlx5_ib_mr_memory_pfault_handler" in names and "mlx5_ib_mr_wqe_pfault_handler" not in names


@both_eras
def test_odp_mkey_list_new_api(era: Era) -> None:
    """test_mlx5_mkey.py: an indirect key over 8 bytes at 0 and 8 bytes at 64 of an on-demand region.

    The key is made as DevX makes it and known to the driver as an indirect one (MKEY_INDIRECT_DEVX); its list is
    written at creation, where the documented case configures it by a work request of its own queue pair, and
    it is freed at the end by a UMR request in place of LOCAL_INV. 10 iterations; the buffers stay mapped after the first.
    """
    players = Players(era).create(access=ODP)
    client, server = players.both
    for player in players.both:
        player.write(np.zeros(128, dtype=np.uint8))
        player.madvise()
    keys = [indirect_key(player) for player in players.both]
    for _ in range(10):
        client.fill(100), server.fill(100)
        assert server.side.do(post_recv(server.qp, server.side.thread, RecvWr(0, (Sge(0, 16, keys[1]),)))) == 0
        client.send(WrOpcode.SEND, (Sge(0, 16, keys[0]),))
        client.poll(), server.poll()
        expected = (("c" * 8 + "s" * 56) * 2)[:100]
        assert server.read(100).tobytes().decode() == expected
    assert faults(players) == (1, 1)  # one event for each list, whatever its pieces
    for player, key in zip(players.both, keys, strict=True):
        side, wqe = player.side, UmrWqe(key, 0, MkeyMask.FREE, Mkc(free=True))
        assert side.do(side.hca.execute_umr(side.thread, wqe)) == WcStatus.SUCCESS
    assert server.side.do(post_recv(server.qp, server.side.thread, RecvWr(0, (Sge(0, 16, keys[1]),)))) == 0
    client.send(WrOpcode.SEND, (Sge(0, 16, keys[0]),))
    (wc,) = client.side.wait(client.qp)
    assert wc.status == WcStatus.LOC_PROT_ERR


def indirect_key(player: Player) -> int:
    side, lkey = player.side, player.mr.lkey
    klms = np.array([(8, lkey, player.buf), (8, lkey, player.buf + 64)], dtype=KLM)
    mkc = Mkc(
        access_mode=AccessMode.KLM, lw=True, lr=True, umr_en=True, pd=side.pd.pdn, len=16, translations_octword_size=4
    )
    key: int = side.do(mlx5_core_create_mkey(side.hca, side.thread, mkc, True, klms))
    side.dev.odp_mkeys[base_mkey(key)] = Mlx5IbMkey(key, MKEY_INDIRECT_DEVX, 2, 1)
    return key


@pytest.mark.parametrize("era", list(Era))
def test_dmah_mrex_odp_bad_flow(era: Era) -> None:
    """test_dmah.py: an on-demand region with a DMA handle is refused. Applies whole.

    Older kernels cannot be asked at all: the library has no call to pass the handle in.
    """
    players = Players(era)
    player = players.client
    player.buf = player.mmap(PAGE)
    side = player.side
    ret = side.do(reg_mr_ex(side.pd, side.thread, player.buf, PAGE, ODP, dmah=Dmah()))
    assert ret == -errno.EOPNOTSUPP
    assert ret.step == ("mlx5_ib_reg_user_mr" if era == Era.NEW else "ibv_cmd_reg_mr_ex")
    pinned = side.do(reg_mr_ex(side.pd, side.thread, player.buf, PAGE, Access.LOCAL_WRITE, dmah=Dmah()))
    assert (pinned == -errno.EOPNOTSUPP) == (era < Era.NEW)
