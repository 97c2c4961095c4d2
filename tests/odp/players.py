"""The two players of an ODP test and the traffic between them, as rdma-core's tests/utils.py runs it.

Every iteration validates its payload. Where the documented helper forces page faults, it gives both buffers up first
(MADV_DONTNEED) and lets the CPU write again what the direction needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from drivers.mlx5.two_hosts import Side, World
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.caps import HcaCaps, OdpGeneral, OdpTransport
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge, Wc
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era, QpType, SendFlags, WcStatus, WrOpcode
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH_WRITE
from kit.drivers.mlx5.verbs import (
    advise_mr,
    connect,
    create_cq,
    create_qp,
    create_srq,
    query_device_ex,
    reg_mr,
    reg_mr_ex,
)
from kit.drivers.mlx5.verbs_post import post_recv, post_send, post_srq_recv, wait_cq
from kit.memory.faults.load_store import read_bytes, write_bytes
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
)

ITERS, MSG_SIZE, GRH_SIZE, HUGE_PAGE_SIZE = 100, 1024, 40, 0x200000
ODP = Access.LOCAL_WRITE | Access.ON_DEMAND
OdpRC = ODP | Access.REMOTE_ATOMIC | Access.REMOTE_READ | Access.REMOTE_WRITE
SEND_RECV = OdpTransport.SEND | OdpTransport.RECV


class Player:
    """One side: its buffer, its regions, its queue pair."""

    def __init__(self, side: Side, letter: str) -> None:
        self.side, self.letter = side, ord(letter)
        self.msg_size, self.buf = MSG_SIZE, 0
        self.mr: Any = None
        self.non_odp_mr: Any = None
        self.mixed_buf = 0
        self.qps: list[Qp] = []
        self.use_mr_prefetch: str | None = None
        self.prefetch_advice = PREFETCH_WRITE
        self.cq: Any = None
        self.srq: Any = None

    # -- resources -----------------------------------------------------------------------------------------------

    def requires(self, transport: str, caps: OdpTransport, implicit: bool = False) -> None:
        """The program looks before it registers (requires_odp, odp_supported, odp_implicit_supported)."""
        attr = self.side.do(query_device_ex(self.side.context, self.side.thread))
        assert attr.odp_caps.general_caps & OdpGeneral.SUPPORT
        assert not implicit or attr.odp_caps.general_caps & OdpGeneral.IMPLICIT
        assert getattr(attr.odp_caps, f"{transport}_odp_caps") & caps == caps

    def mmap(self, length: int, huge: bool = False) -> int:
        side, flags = self.side, MAP_PRIVATE | MAP_ANONYMOUS | (MAP_HUGETLB if huge else 0)
        if huge:
            side.memory.set_hugetlb_pool(9, 2)
        at: int = side.do(mmap(side.mm, side.thread, max(length, PAGE), PROT_READ | PROT_WRITE, flags))
        assert at > 0, at
        return at

    def reg(self, addr: int, length: int, access: int, mr_ex: bool = False) -> Any:
        verb = reg_mr_ex if mr_ex else reg_mr
        mr = self.side.do(verb(self.side.pd, self.side.thread, addr, length, access))
        assert not isinstance(mr, int), mr
        return mr

    def create_mr(
        self, access: int = OdpRC, *, implicit: bool = False, huge: bool = False, mixed: bool = False,
        mr_ex: bool = False, allocate: bool = False,
    ) -> None:  # fmt: skip
        """Map the buffer and register it. `allocate`: the library allocates, which touches the buffer first."""
        self.buf = self.mmap(HUGE_PAGE_SIZE if huge else self.msg_size, huge)
        if allocate:
            self.write(np.zeros(self.msg_size, dtype=np.uint8))
        access |= Access.HUGETLB if huge else 0
        at, length = (0, U64_MAX) if implicit else (self.buf, HUGE_PAGE_SIZE if huge else self.msg_size)
        self.mr = self.reg(at, length, access, mr_ex)
        if mixed:
            self.mixed_buf = self.mmap(self.msg_size)
            self.non_odp_mr = self.reg(self.mixed_buf, self.msg_size, Access.LOCAL_WRITE, mr_ex)

    def create_qp(self, kind: QpType = QpType.RC, srq: Any = None) -> Qp:
        side = self.side
        if self.cq is None:
            self.cq = side.do(create_cq(side.context, side.thread, 4096))
        made: Qp = side.do(create_qp(side.pd, side.thread, kind, self.cq, self.cq, srq, 1000, 1000, 16, 64))
        self.qps.append(made)
        return made

    @property
    def qp(self) -> Qp:
        return self.qps[0]

    # -- memory ---------------------------------------------------------------------------------------------------

    def write(self, data: NDArray[np.uint8], at: int | None = None) -> None:
        self.side.do(write_bytes(self.side.mm, self.side.thread, self.buf if at is None else at, data))

    def read(self, length: int, at: int | None = None) -> NDArray[np.uint8]:
        start = self.buf if at is None else at
        data: NDArray[np.uint8] = self.side.do(read_bytes(self.side.mm, self.side.thread, start, length))
        return data

    def fill(self, length: int | None = None) -> None:
        """Write the player's own letter (mem_write)."""
        self.write(np.full(length or self.msg_size, self.letter, dtype=np.uint8))

    def madvise(self, length: int | None = None) -> None:
        """MADV_DONTNEED over the message, as the helper does."""
        length = length or self.msg_size
        assert self.side.do(madvise(self.side.mm, self.side.thread, self.buf, length, MADV_DONTNEED)) == 0

    # -- verbs ----------------------------------------------------------------------------------------------------

    def sges(self) -> tuple[Sge, ...]:
        first = Sge(self.buf, self.msg_size, self.mr.lkey)
        if self.non_odp_mr is None:
            return (first,)
        return first, Sge(self.mixed_buf, self.msg_size, self.non_odp_mr.lkey)

    def send_elements(self) -> tuple[Sge, ...]:
        """Write the message into every region and return the list (get_send_elements)."""
        self.fill()
        if self.non_odp_mr is not None:
            self.write(np.full(self.msg_size, self.letter, dtype=np.uint8), self.mixed_buf)
        return self.sges()

    def prefetch(self, sges: tuple[Sge, ...]) -> None:
        """advise_mr before a send, if the case asks for it (prefetch_mrs)."""
        if self.use_mr_prefetch is not None:
            flags = ADVISE_FLUSH if self.use_mr_prefetch == "sync" else 0
            side = self.side
            assert side.do(advise_mr(side.pd, side.thread, self.prefetch_advice, flags, sges)) == 0

    def post_recv(self, index: int = 0) -> None:
        side, wr = self.side, RecvWr(0, self.sges())
        verb = (
            post_recv(self.qps[index], side.thread, wr)
            if self.srq is None
            else post_srq_recv(self.srq, side.thread, wr)
        )
        assert side.do(verb) == 0

    def send(self, opcode: WrOpcode = WrOpcode.SEND, sges: tuple[Sge, ...] = (), index: int = 0, **fields: Any) -> None:
        wr = SendWr(0, opcode, sges, **fields)
        assert self.side.do(post_send(self.qps[index], self.side.thread, wr)) == 0

    def poll(self, cq: Any = None) -> Wc:
        """Wait for one completion, which has to be a success (poll_cq)."""
        (wc,) = self.side.do(wait_cq(cq or self.cq, self.side.thread))
        assert wc.status == WcStatus.SUCCESS, wc
        return wc

    def validate(self, letter: int, length: int | None = None) -> None:
        """What has been received is the other player's letter, byte for byte."""
        length = length or self.msg_size
        where = [self.buf] if self.non_odp_mr is None else [self.buf, self.mixed_buf]
        for at in where:
            assert np.array_equal(self.read(length, at), np.full(length, letter, dtype=np.uint8))

    @property
    def faults(self) -> int:
        """Page-fault events that the adapter has reported."""
        return self.side.hca.counters.page_faults


class Players:
    """Client and server of a case."""

    def __init__(self, era: Era = Era.MID, memory_scheme: bool = False, **more: Any) -> None:
        caps = HcaCaps(mem_page_fault=True, page_prefetch=True) if memory_scheme else HcaCaps()
        self.world = World(era, frames=1 << 12, caps=caps, **more)
        self.client, self.server = Player(self.world.client, "c"), Player(self.world.server, "s")
        self.both = (self.client, self.server)

    def create(self, caps: OdpTransport = SEND_RECV, msg_size: int = MSG_SIZE, **mr: Any) -> Players:
        """Region and connected RC queue pair on both sides (create_players)."""
        for player in self.both:
            player.requires("rc", caps, mr.get("implicit", False))
            player.msg_size = msg_size
            player.create_mr(**mr)
            player.create_qp()
        self.connect()
        return self

    def connect(self) -> None:
        thread = self.client.side.thread
        for left, right in zip(self.client.qps, self.server.qps, strict=True):
            assert self.client.side.do(connect(thread, left, right, min_rnr_timer=12, timeout=14)) == 0

    # -- traffic --------------------------------------------------------------------------------------------------

    def traffic(self, iters: int = ITERS, forced: bool = True, advised: int | None = None) -> None:
        """Send from the client and back, validating both (utils.traffic)."""
        client, server = self.both
        for index in range(len(client.qps)):
            client.post_recv(index), server.post_recv(index)
        for _ in range(iters):
            for index in range(len(client.qps)):
                if forced:
                    client.madvise(advised), server.madvise(advised)
                for sender, receiver in ((client, server), (server, client)):
                    sges = sender.send_elements()
                    sender.prefetch(sges)
                    sender.send(WrOpcode.SEND, sges, index, ah_qp=receiver.qps[index].qpn)
                    sender.poll()
                    assert receiver.poll().byte_len == sum(s.length for s in sges)
                    receiver.post_recv(index)
                    receiver.validate(sender.letter)
        self.finish()

    def rdma_traffic(self, opcode: WrOpcode, iters: int = ITERS, forced: bool = True) -> None:
        """RDMA READ or WRITE from the client, then from the server (utils.rdma_traffic)."""
        client, server = self.both
        for _ in range(iters):
            if forced:
                client.madvise(), server.madvise()
            for sender, other in ((client, server), (server, client)):
                client.fill(), server.fill()
                where = {"remote_addr": other.buf, "rkey": other.mr.rkey}
                if opcode == WrOpcode.ATOMIC_WRITE:
                    data = np.full(8, sender.letter, dtype=np.uint8)
                    sender.send(opcode, send_flags=SendFlags.INLINE | SendFlags.SIGNALED, inline_data=data, **where)
                else:
                    sender.send(opcode, sender.sges(), **where)
                sender.poll()
                (sender if opcode == WrOpcode.RDMA_READ else other).validate(
                    other.letter if opcode == WrOpcode.RDMA_READ else sender.letter
                )
        self.finish()

    def atomic_traffic(self, opcode: WrOpcode, receiver_val: int = 1, sender_val: int = 2, swap: int = 0) -> None:
        """Compare-and-swap or fetch-and-add both ways, on bytes of one value each (utils.atomic_traffic)."""
        client, server = self.both
        word = 0x0101010101010101
        for _ in range(ITERS):
            for sender, other in ((client, server), (server, client)):
                sender.write(np.full(8, sender_val, dtype=np.uint8))
                other.write(np.full(8, receiver_val, dtype=np.uint8))
                before, operand = receiver_val * word, sender_val * word
                where = {"remote_addr": other.buf, "rkey": other.mr.rkey}
                sender.send(opcode, sender.sges(), compare_add=operand, swap=swap * word, **where)
                sender.poll()
                if opcode == WrOpcode.ATOMIC_FETCH_AND_ADD:
                    after = before + operand
                else:
                    after = swap * word if before == operand else before
                assert int(sender.read(8).view(np.uint64)[0]) == before
                assert int(other.read(8).view(np.uint64)[0]) == after
        self.finish()

    def flush_traffic(self, whole_mr: bool, rng: np.random.Generator) -> None:
        """RDMA WRITEs, then as many FLUSHes of the range, or of the whole region (utils.flush_traffic)."""
        self.rdma_traffic(WrOpcode.RDMA_WRITE, forced=False)
        client, server = self.both
        for i in range(ITERS):
            length = client.msg_size
            if whole_mr:  # the level says which region; a length is not looked at, so it is not passed on
                rng.integers(0, 12345678)
                length = 0
            client.send(WrOpcode.FLUSH, remote_addr=server.buf, rkey=server.mr.rkey, length=length)
            assert client.poll().status == WcStatus.SUCCESS, i
        self.finish()

    def xrc_traffic(self, iters: int) -> None:
        """Messages that name the other side's shared queue, over two queue pairs (utils.xrc_traffic)."""
        client, server = self.both
        for player in self.both:
            for _ in range(2 * iters):
                player.post_recv()
        for _ in range(iters):
            for index in range(2):
                for sender, receiver, qp in ((client, server, 2 * index), (server, client, 2 * index + 1)):
                    sges = sender.send_elements()
                    sender.send(WrOpcode.SEND, sges, qp, ah_qp=receiver.srq.srqn)
                    sender.poll(), receiver.poll()
                    receiver.validate(sender.letter)
        self.finish()

    def finish(self) -> None:
        """Nothing under way, no stale DMA, no pin."""
        self.world.settle()
        self.world.check()
        for player in self.both:
            pinned = player.non_odp_mr is not None
            assert player.side.mm.pinned_vm == (1 if pinned else 0)

    def create_xrc(self) -> None:
        """Two XRC pairs a direction over one shared queue a side."""
        for player in self.both:
            player.requires("xrc", OdpTransport.SEND | OdpTransport.SRQ_RECV)
            player.create_mr(ODP)
            side = player.side
            player.cq = side.do(create_cq(side.context, side.thread, 4096))
            player.srq = side.do(create_srq(side.pd, side.thread, 4096, xrc_cq=player.cq))
        for _ in range(2):
            self.client.create_qp(QpType.XRC_SEND), self.server.create_qp(QpType.XRC_RECV)
            self.client.create_qp(QpType.XRC_RECV), self.server.create_qp(QpType.XRC_SEND)
        self.connect()
