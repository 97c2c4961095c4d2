"""rc_pingpong: two sides that send each other one buffer to and fro (rc_pingpong.c @ rdma-core 65)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kit.drivers.mlx5.caps import OdpGeneral, OdpTransport
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge, Wc
from kit.drivers.mlx5.enums import U64_MAX, Access, QpState, SendFlags, WcStatus, WrOpcode
from kit.errors import DriverError, Errno, raise_for
from kit.flows.rc_pingpong.libibverbs import (
    Pingpong,
    ibv_advise_mr,
    ibv_alloc_buf,
    ibv_alloc_pd,
    ibv_create_cq,
    ibv_create_qp,
    ibv_dealloc_pd,
    ibv_dereg_mr,
    ibv_destroy_cq,
    ibv_destroy_qp,
    ibv_free_buf,
    ibv_get_device_list,
    ibv_modify_qp,
    ibv_open_device,
    ibv_poll_cq,
    ibv_post_recv,
    ibv_post_send,
    ibv_query_device_ex,
    ibv_query_qp,
    ibv_reg_buf_mr,
    ibv_reg_mr,
)  # fmt: skip
from kit.flows.rdma.content import Area
from kit.memory.faults.load_store import store, write_bytes
from kit.memory.types import PAGE
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = ["RECV", "SEND", "main", "parse_single_wc", "pp_init_ctx"]

RECV, SEND = 1, 2  # PINGPONG_RECV_WRID, PINGPONG_SEND_WRID
PREFETCH_WRITE, FLUSH = 1, 1  # IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, IB_UVERBS_ADVISE_MR_FLAG_FLUSH
FILL = 0x7B


@waiting_step
def pp_init_ctx(ctx: Pingpong, thread: Thread) -> Wait:
    """Open the device, allocate and fill the buffer, register it, make the queue pair."""
    o, access = ctx.options, int(Access.LOCAL_WRITE)
    ibv_open_device(ctx, thread)
    yield from ibv_alloc_pd(ctx, thread)
    if o.odp or o.iodp:
        check_odp((yield from ibv_query_device_ex(ctx, thread)).odp_caps, o.iodp)
        access |= Access.ON_DEMAND
    va = raise_for((yield from ibv_alloc_buf(ctx, thread, o.size)))
    ctx.area = Area("buf", va, -(-o.size // PAGE), ctx.host.memory.words)
    yield from memset(ctx, thread)
    if o.iodp:
        ctx.mr = yield from ibv_reg_mr(ctx, thread, 0, U64_MAX, access)
    else:
        ctx.mr = yield from ibv_reg_buf_mr(ctx, thread, va, o.size, access)
    if isinstance(ctx.mr, Errno):
        raise_for(ctx.mr)
    ctx.host.mrs.append(("server" if ctx.server else "client", ctx.mr))
    if o.prefetch:
        ret = yield from ibv_advise_mr(ctx, thread, PREFETCH_WRITE, FLUSH, [Sge(va, o.size, ctx.mr.lkey)])
        if ret:
            ctx.printed.append(f"Couldn't prefetch MR({-ret}). Continue anyway")
    yield from ibv_create_cq(ctx, thread, o.rx_depth + 1)
    yield from ibv_create_qp(ctx, thread, o.rx_depth, o.max_inline_data)
    ctx.inline = ibv_query_qp(ctx, thread) >= o.size
    raise_for((yield from ibv_modify_qp(ctx, thread, QpState.INIT)))


def check_odp(caps: Any, implicit: bool) -> None:
    """Refuse a device that cannot page, in the program's words."""
    wanted = OdpTransport.SEND | OdpTransport.RECV
    if not caps.general_caps & OdpGeneral.SUPPORT or caps.rc_odp_caps & wanted != wanted:
        why = "The device isn't ODP capable or does not support RC send and receive with ODP"
        raise DriverError(95, "EOPNOTSUPP", "pp_init_ctx", why)
    if implicit and not caps.general_caps & OdpGeneral.IMPLICIT:
        raise DriverError(95, "EOPNOTSUPP", "pp_init_ctx", "The device doesn't support implicit ODP")


def memset(ctx: Pingpong, thread: Thread) -> Wait:
    """Fill the buffer with 0x7b: every page is resident afterwards. The last page is filled up to its end."""
    area, mm = ctx.area, ctx.host.mm
    assert area is not None
    area.model[:] = np.frombuffer(bytes([FILL]) * 8, dtype=np.uint64)[0]
    if mm.memory.payload_bytes == PAGE:
        yield from aside(ctx, thread, write_bytes, area.va, area.model.reshape(-1).view(np.uint8))
    else:
        yield from aside(ctx, thread, store, area.va // PAGE + np.arange(area.pages), area.model[:, 0])


def aside(ctx: Pingpong, thread: Thread, work: Any, *arguments: Any) -> Wait:
    """Let the CPU access memory: a page fault interrupts the program, so it is no step that the program calls."""
    cpu = ctx.host.engine.thread("cpu")
    cpu.now = thread.now
    yield from work(ctx.host.mm, cpu, *arguments)
    thread.now = cpu.now


@waiting_step
def pp_post_recv(ctx: Pingpong, thread: Thread, n: int) -> Wait:
    """Post up to `n` receives of the whole buffer; returns how many."""
    request = RecvWr(RECV, (Sge(ctx.buf, ctx.options.size, ctx.mr.lkey),))
    for at in range(n):
        if (yield from ibv_post_recv(ctx, thread, request)):
            return at
    return n


@waiting_step
def pp_post_send(ctx: Pingpong, thread: Thread) -> Wait:
    """Send the whole buffer; a small one goes in the work request itself."""
    o = ctx.options
    data, sges = None, (Sge(ctx.buf, o.size, ctx.mr.lkey),)
    flags = SendFlags.SIGNALED
    if ctx.inline:
        assert ctx.area is not None
        flags, data = flags | SendFlags.INLINE, ctx.area.read(ctx.buf, o.size)
    raise_for((yield from ibv_post_send(ctx, thread, SendWr(SEND, WrOpcode.SEND, sges, flags, inline_data=data))))
    ctx.sent += 1


@waiting_step
def pp_connect_ctx(ctx: Pingpong, thread: Thread) -> Wait:
    """Bring the queue pair to RTS, connected to the other side's."""
    o = ctx.options
    to_rtr = {"dest_qp_num": ctx.other.qp.qpn, "min_rnr_timer": o.min_rnr_timer}
    raise_for((yield from ibv_modify_qp(ctx, thread, QpState.RTR, **to_rtr)))
    to_rts = {"timeout": o.timeout, "retry_cnt": o.retry_cnt, "rnr_retry": o.rnr_retry}
    raise_for((yield from ibv_modify_qp(ctx, thread, QpState.RTS, **to_rts)))


@waiting_step
def pp_server_exch_dest(ctx: Pingpong, thread: Thread) -> Wait:
    """Wait for the client's address, connect, and answer with the own one."""
    yield from thread.wait(ctx.other.here)
    yield from pp_connect_ctx(ctx, thread)
    yield from thread.sync()
    ctx.connected.succeed()


@waiting_step
def pp_client_exch_dest(ctx: Pingpong, thread: Thread) -> Wait:
    """Send the own address and wait for the server's."""
    yield from thread.sync()
    ctx.here.succeed()
    yield from thread.wait(ctx.other.connected)


@waiting_step
def parse_single_wc(ctx: Pingpong, thread: Thread, wc: Wc) -> Wait:
    """Count a completion, keep receives posted, and send when both halves of a round trip are done."""
    o = ctx.options
    if wc.status != WcStatus.SUCCESS:
        why = f"Failed status {wc.status.name} ({int(wc.status)}) for wr_id {wc.wr_id}"
        raise DriverError(5, wc.status.name, "parse_single_wc", why)
    if wc.wr_id == SEND:
        ctx.scnt += 1
    else:
        ctx.routs -= 1
        if ctx.routs <= 1:
            ctx.routs += yield from pp_post_recv(ctx, thread, o.rx_depth - ctx.routs)
        ctx.rcnt += 1
    ctx.pending &= ~wc.wr_id
    if ctx.scnt < o.iters and not ctx.pending:
        yield from pp_post_send(ctx, thread)
        ctx.pending = RECV | SEND


def received(ctx: Pingpong) -> None:
    """The buffer now holds what the other side's does."""
    assert ctx.area is not None and ctx.other.area is not None
    ctx.area.write(ctx.buf, ctx.other.area.read(ctx.other.buf, ctx.options.size))


@waiting_step
def main(ctx: Pingpong, thread: Thread) -> Wait:
    """One side from start to end; it stops at the gates `messages` and `end` until the session lets it on."""
    ibv_get_device_list(ctx, thread)
    yield from pp_init_ctx(ctx, thread)
    ctx.routs = yield from pp_post_recv(ctx, thread, ctx.options.rx_depth)
    if ctx.server:
        yield from pp_server_exch_dest(ctx, thread)
    else:
        yield from pp_client_exch_dest(ctx, thread)
        yield from pp_connect_ctx(ctx, thread)
    yield from ctx.gate("messages", thread)
    ctx.pending, ctx.start = RECV, thread.now
    if not ctx.server:
        yield from mark_pages(ctx, thread)
        yield from pp_post_send(ctx, thread)
        ctx.pending |= SEND
    while ctx.rcnt < ctx.options.iters or ctx.scnt < ctx.options.iters:
        for wc in (yield from ibv_poll_cq(ctx, thread, 2)):
            if wc.wr_id == RECV and wc.status == WcStatus.SUCCESS:
                received(ctx)
                yield from ctx.between(ctx, thread)
            yield from parse_single_wc(ctx, thread, wc)
    ctx.end = thread.now
    yield from ctx.gate("end", thread)
    yield from pp_close_ctx(ctx, thread)


def mark_pages(ctx: Pingpong, thread: Thread) -> Wait:
    """With -c the client marks every page before the first message, as the program does."""
    area = ctx.area
    assert area is not None
    if not ctx.options.chk:
        return
    numbers = np.arange(area.pages, dtype=np.uint64) % np.uint64(1)  # i / page_size % sizeof(char)
    area.model[:, 0] = (area.model[:, 0] & ~np.uint64(0xFF)) | numbers
    yield from aside(ctx, thread, store, area.va // PAGE + np.arange(area.pages), area.model[:, 0])


@waiting_step
def pp_close_ctx(ctx: Pingpong, thread: Thread) -> Wait:
    """Give everything back."""
    yield from ibv_destroy_qp(ctx, thread)
    ibv_destroy_cq(ctx, thread)
    raise_for((yield from ibv_dereg_mr(ctx, thread)))
    ibv_free_buf(ctx, thread)
    ibv_dealloc_pd(ctx, thread)
