"""libibverbs as the program sees it: each call is a step, made of the kit's verbs (rdma-core 65)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.drivers.mlx5 import verbs, verbs_post
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge
from kit.drivers.mlx5.enums import QpState, QpType
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.flows.rdma.content import Area
    from kit.flows.rdma.hosts import Host
    from kit.sim.engine import Thread, Wait

__all__ = [
    "Pingpong", "ibv_advise_mr", "ibv_alloc_buf", "ibv_alloc_pd", "ibv_create_cq", "ibv_create_qp", "ibv_dealloc_pd",
    "ibv_dereg_mr", "ibv_destroy_cq", "ibv_destroy_qp", "ibv_free_buf", "ibv_get_device_list", "ibv_modify_qp",
    "ibv_open_device", "ibv_poll_cq", "ibv_post_recv", "ibv_post_send", "ibv_query_device_ex", "ibv_query_qp",
    "ibv_reg_buf_mr", "ibv_reg_mr",
]  # fmt: skip


@dataclass(eq=False)
class Pingpong:
    """Struct pingpong_context of one side, and what its ``main`` keeps in local variables.

    Attributes
    ----------
    server : bool
    other : Pingpong
        The other side: what the program's own TCP connection carries between them.
    here : Event
        This side's address has been sent.
    connected : Event
        The server's queue pair can receive.
    gates, reached : dict of str to Event
        Where the session stops the program between two stages, and that it has come there.
    between : callable
        What happens to the host's memory after each received message.
    printed : list of str
        What the program prints.
    """

    host: Host
    server: bool
    options: Any
    other: Pingpong = field(init=False, repr=False)
    here: Any = None
    connected: Any = None
    gates: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, Any] = field(default_factory=dict)
    between: Any = None
    context: Any = None
    pd: Any = None
    mr: Any = None
    cq: Any = None
    qp: Any = None
    area: Area | None = None
    inline: bool = False
    pending: int = 0
    rcnt: int = 0
    scnt: int = 0
    routs: int = 0
    sent: int = 0
    start: float = 0.0
    end: float = 0.0
    bad_pages: int = 0
    printed: list[str] = field(default_factory=list)

    def gate(self, name: str, thread: Thread) -> Wait:
        """Say that the program has come to `name`, and wait until it may go on."""
        yield from thread.sync()
        if not self.reached[name].triggered:  # else the other side has given up, and nobody waits for this one
            self.reached[name].succeed()
        yield from thread.wait(self.gates[name])

    @property
    def buf(self) -> int:
        """Address of the buffer."""
        assert self.area is not None
        return self.area.va


@step
def ibv_get_device_list(ctx: Pingpong, thread: Thread) -> None:
    """List the devices: there is one."""
    thread.charge(ctx.host.mm.costs.syscall)


@step
def ibv_open_device(ctx: Pingpong, thread: Thread) -> None:
    """Open the device."""
    thread.charge(ctx.host.dev.costs.verb)
    ctx.context = verbs.open_device(ctx.host.dev, ctx.host.mm)


@waiting_step
def ibv_alloc_pd(ctx: Pingpong, thread: Thread) -> Wait:
    """Allocate a protection domain."""
    ctx.pd = ctx.host.pd = yield from verbs.alloc_pd(ctx.context, thread)


@waiting_step
def ibv_query_device_ex(ctx: Pingpong, thread: Thread) -> Wait:
    """Return what the device can page."""
    return (yield from verbs.query_device_ex(ctx.context, thread))


@waiting_step
def ibv_alloc_buf(ctx: Pingpong, thread: Thread, size: int) -> Wait:
    """Allocate the buffer; returns its address or an errno."""
    from kit.memory.syscalls.mmap import mmap
    from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

    kernel = ctx.host.engine.thread("cpu")  # the C library's own system call
    kernel.now = thread.now
    prot, flags = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
    va = yield from mmap(ctx.host.mm, kernel, size, prot, flags, name="buf")
    thread.now = kernel.now
    return va


@waiting_step
def ibv_reg_mr(ctx: Pingpong, thread: Thread, addr: int, length: int, access: int) -> Wait:
    """Register memory."""
    return (yield from verbs.reg_mr(ctx.pd, thread, addr, length, access))


@waiting_step
def ibv_reg_buf_mr(ctx: Pingpong, thread: Thread, addr: int, length: int, access: int) -> Wait:
    """Register what `ibv_alloc_buf` allocated."""
    return (yield from verbs.reg_mr(ctx.pd, thread, addr, length, access))


@waiting_step
def ibv_advise_mr(ctx: Pingpong, thread: Thread, advice: int, flags: int, sges: list[Sge]) -> Wait:
    """Ask for pages ahead."""
    return (yield from verbs.advise_mr(ctx.pd, thread, advice, flags, sges))


@waiting_step
def ibv_create_cq(ctx: Pingpong, thread: Thread, cqe: int) -> Wait:
    """Create the completion queue."""
    ctx.cq = yield from verbs.create_cq(ctx.context, thread, cqe)


@waiting_step
def ibv_create_qp(ctx: Pingpong, thread: Thread, rx_depth: int, max_inline_data: int) -> Wait:
    """Create the queue pair: one send, `rx_depth` receives."""
    ctx.qp = yield from verbs.create_qp(
        ctx.pd, thread, QpType.RC, ctx.cq, ctx.cq, max_send_wr=1, max_recv_wr=rx_depth, max_sge=1,
        max_inline_data=max_inline_data,
    )  # fmt: skip


@step
def ibv_query_qp(ctx: Pingpong, thread: Thread) -> int:
    """Return how many bytes the queue pair takes inline."""
    thread.charge(ctx.host.dev.costs.verb)
    found: int = ctx.qp.max_inline_data
    return found


@waiting_step
def ibv_modify_qp(ctx: Pingpong, thread: Thread, state: QpState, **attributes: int) -> Wait:
    """Move the queue pair to its next state."""
    return (yield from verbs.modify_qp(ctx.qp, thread, state, **attributes))


@waiting_step
def ibv_post_recv(ctx: Pingpong, thread: Thread, request: RecvWr) -> Wait:
    """Post one receive."""
    return (yield from verbs_post.post_recv(ctx.qp, thread, request))


@waiting_step
def ibv_post_send(ctx: Pingpong, thread: Thread, request: SendWr) -> Wait:
    """Post the send."""
    thread.note(bytes=ctx.options.size)
    return (yield from verbs_post.post_send(ctx.qp, thread, request))


@waiting_step
def ibv_poll_cq(ctx: Pingpong, thread: Thread, count: int) -> Wait:
    """Poll until there is a completion; returns up to `count` of them.

    The program calls ibv_poll_cq over and over; here one step stands for the calls that found nothing and the one
    that did.
    """
    first = yield from verbs_post.wait_cq(ctx.cq, thread, 1, ctx.host.dev.costs.cqe)
    more = yield from verbs_post.poll_cq(ctx.cq, thread, count - 1)
    return [*first, *more]


@waiting_step
def ibv_destroy_qp(ctx: Pingpong, thread: Thread) -> Wait:
    """Destroy the queue pair."""
    yield from verbs.destroy_qp(ctx.qp, thread)


@step
def ibv_destroy_cq(ctx: Pingpong, thread: Thread) -> None:
    """Destroy the completion queue."""
    thread.charge(ctx.host.dev.costs.verb)


@waiting_step
def ibv_dereg_mr(ctx: Pingpong, thread: Thread) -> Wait:
    """Deregister the memory."""
    return (yield from verbs.dereg_mr(ctx.mr, thread))


@step
def ibv_free_buf(ctx: Pingpong, thread: Thread) -> None:
    """Free the buffer: it goes back to the C library, which keeps it."""


@step
def ibv_dealloc_pd(ctx: Pingpong, thread: Thread) -> None:
    """Free the protection domain."""
    thread.charge(ctx.host.dev.costs.verb)
