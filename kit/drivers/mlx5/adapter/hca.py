"""One host channel adapter: mkeys, queues, commands, UMR execution, page faults and their resumption."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import simpy

from kit.drivers.mlx5.adapter.mkey_table import MkeyTable, Translation
from kit.drivers.mlx5.adapter.qp import Qp, srq_image
from kit.drivers.mlx5.adapter.queues import Srq
from kit.drivers.mlx5.adapter.umr_engine import apply_umr, umr_refused
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.core.cmd import mlx5_cmd_exec
from kit.drivers.mlx5.core.dma import DmaDevice
from kit.drivers.mlx5.core.waiting import Semaphore
from kit.drivers.mlx5.descriptors import Mkc, PageFaultEqe, UmrWqe, WqeImage
from kit.drivers.mlx5.enums import AccessMode, PageFaultSubtype, QpState, WcStatus
from kit.drivers.mlx5.parameters import HcaCounters, HcaParameters
from kit.errors import Errno
from kit.sim.costs import Costs
from kit.sim.locks import Lock

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.fabric import Fabric
    from kit.drivers.mlx5.core.eq_ring import Eq
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.engine import Engine, Thread, Wait

__all__ = ["Fault", "Hca", "HcaParameters"]


@dataclass(eq=False, slots=True)
class Fault:
    """A page fault that the adapter waits for.

    Attributes
    ----------
    resume : callable
        Called with whether the driver resumed it with an error.
    """

    token: int
    sub_type: int
    who: str
    start: float
    va: int
    resume: Callable[[bool], None]


class Hca:
    """The hardware of one mlx5 device.

    Parameters
    ----------
    engine : Engine
    memory : PhysicalMemory
        Of the host.
    costs : Costs
        `kit.drivers.mlx5.costs.make_costs`.
    caps : HcaCaps
    params : HcaParameters
    name : str
        The actor in the trace.

    Attributes
    ----------
    memory_scheme : bool
        Page faults are MEMORY events; set by a driver that knows them.
    internal_error : bool
        MLX5_DEVICE_STATE_INTERNAL_ERROR: every command fails.
    null_mkey : int
        The device's reserved key whose pages are never present.
    tx_free : float
        When the link can take the next message.
    """

    def __init__(
        self, engine: Engine, memory: PhysicalMemory, costs: Costs, caps: HcaCaps | None = None,
        params: HcaParameters | None = None, name: str = "mlx5_0",
    ) -> None:  # fmt: skip
        self.engine, self.memory, self.costs, self.name = engine, memory, costs, name
        self.caps, self.params = caps or HcaCaps(), params or HcaParameters()
        self.dma = DmaDevice(memory)
        self.mkeys = MkeyTable(self.caps.max_indirection)
        self.null_mkey = self.mkeys.create(Mkc(access_mode=AccessMode.NULL, length64=True), pg_access=True).key
        self.memory_scheme = self.internal_error = self.fail_eq_buffer = False
        self.cmd_slots = Semaphore(self.params.cmd_slots)
        self.eq_table_lock = Lock()
        self.eqs: dict[int, Eq] = {}
        self.pf_eq: Eq | None = None
        self.next_eqn = 0
        self.qps: dict[int, Qp] = {}
        self.srqs: dict[int, Srq] = {}
        self.fabric: Fabric | None = None
        self.tx_free = 0.0
        self.umr_qp_state = QpState.RTS
        self.inject_umr: Callable[[UmrWqe], bool] | None = None
        self._umr_free = 0.0
        self._faults: dict[int, Fault] = {}
        self._token = 0
        self.counters = HcaCounters()

    @property
    def network(self) -> Fabric:
        """The fabric that it is attached to."""
        if self.fabric is None:
            raise RuntimeError(f"{self.name} is not attached to a fabric")
        return self.fabric

    # -- time -----------------------------------------------------------------------------------------------------

    def after(self, delay: float, act: Callable[[], None]) -> None:
        """Let the hardware do something `delay` microseconds from now."""
        event = simpy.Timeout(self.engine.env, delay)
        event.callbacks.append(lambda _: act())  # a fresh event has a list

    # -- UMR ------------------------------------------------------------------------------------------------------

    def execute_umr(self, thread: Thread, wqe: UmrWqe) -> Wait:
        """Execute a UMR work request; they run one after the other, in the order in which they are posted.

        Returns
        -------
        WcStatus
            SUCCESS, WR_FLUSH_ERR when the UMR queue pair cannot send, or ``params.umr_error``, after which that
            queue pair is in ERR.
        """
        yield from thread.sync()
        size = wqe.xlt.nbytes if wqe.xlt is not None else 0
        start = max(thread.now, self._umr_free)
        self._umr_free = end = start + self.costs.umr_wqe + self.costs.umr_per_kib * size / 1024
        thread.now = end
        yield from thread.sync()
        if self.umr_qp_state != QpState.RTS:
            return WcStatus.WR_FLUSH_ERR
        mkey = self.mkeys.get(wqe.mkey)
        injected = self.inject_umr is not None and self.inject_umr(wqe)
        why = "injected" if injected else umr_refused(mkey, wqe)
        status = self.params.umr_error if why else WcStatus.SUCCESS
        self.engine.trace.span(
            "umr", self.name, start, end, bytes=size, cause=why, status=status.name if why else "ok", value=wqe.mkey
        )  # fmt: skip
        if why or mkey is None:
            self.umr_qp_state = QpState.ERR
            return status
        apply_umr(mkey, wqe)
        self.counters.umr_wqes += 1
        self.counters.umr_bytes += size
        return status

    def modify_umr_qp(self, thread: Thread, state: QpState) -> Wait:
        """Move the UMR queue pair to another state; returns 0 or a negative errno."""
        ret = yield from mlx5_cmd_exec(self, thread, self.costs.cmd_modify_qp)
        if not ret:
            self.umr_qp_state = state
        return ret

    # -- page faults ----------------------------------------------------------------------------------------------

    def raise_fault(
        self, who: str, va: int, eqe: PageFaultEqe, lost: Translation, resume: Callable[[bool], None]
    ) -> bool:
        """Report a missing page in the page-fault event queue and remember what waits for it.

        Parameters
        ----------
        who : str
            "requester" or "responder".
        va : int
            For the trace.
        eqe : PageFaultEqe
            The transport scheme's event; the memory scheme makes its own from `lost`.
        resume : callable
            Called with True if the driver resumes with an error.

        Returns
        -------
        bool
            False when there is no queue to report to.
        """
        if self.pf_eq is None:
            return False
        self._token += 1
        token = self._token & 0xFFFFFF
        if self.memory_scheme:
            eqe = self._memory_event(lost, token)
        elif eqe.sub_type == PageFaultSubtype.WQE:
            eqe.token = token
        else:
            eqe.pftype_token |= token
        self._faults[token] = Fault(token, eqe.sub_type, who, self.engine.now, va, resume)
        self.counters.page_faults += 1
        self.after(self.costs.hw_fault_detect, lambda: self._report(eqe))
        return True

    def _report(self, eqe: PageFaultEqe) -> None:
        if self.pf_eq is not None:
            self.pf_eq.write(eqe)

    def _memory_event(self, lost: Translation, token: int) -> PageFaultEqe:
        """Return the memory scheme's event: whole pages, so its address is taken to be a page's (UNVERIFIED)."""
        pages = (lost.va + lost.size - 1 >> 12) - (lost.va >> 12) + 1
        return PageFaultEqe(
            PageFaultSubtype.MEMORY, flags=1 << 7, token31_0=token, demand_fault_pages=pages << 12,
            pre_demand_fault_pages=self.params.prefetch_before, post_demand_fault_pages=self.params.prefetch_after,
            mkey=lost.key, va=lost.va & ~0xFFF,
        )  # fmt: skip

    def page_fault_resume(
        self, thread: Thread, page_fault_type: int, token: int, wq_number: int, error: bool | int
    ) -> Wait:
        """PAGE_FAULT_RESUME: let what faulted go on, or fail it; returns 0 or a negative errno."""
        ret = yield from mlx5_cmd_exec(self, thread, self.costs.cmd_resume)
        if ret:
            return ret
        fault = self._faults.pop(token & 0xFFFFFF, None)
        if fault is None:
            self.counters.unknown_resumes += 1
            return Errno(errno.EINVAL, "mlx5_cmd_exec", f"no page fault has token {token:#x}")
        self.counters.resumes += 1
        self.counters.resumes_in_error += bool(error)
        now = self.engine.now
        self.engine.trace.span(
            "qp_stalled", self.name, fault.start, now, va=fault.va, cause=fault.who,
            status="error" if error else "ok", value=fault.token,
        )  # fmt: skip
        fault.resume(bool(error))
        return 0

    @property
    def outstanding_faults(self) -> list[Fault]:
        """Page faults that have not been resumed, oldest first."""
        return list(self._faults.values())

    # -- what the driver reads ------------------------------------------------------------------------------------

    def get_rsc(self, wq_num: int) -> Qp | Srq | None:
        """Return the queue with a number, or None when it has been destroyed."""
        return self.qps.get(wq_num) or self.srqs.get(wq_num)

    def read_wqe(self, wq_num: int, wqe_index: int, requestor: bool) -> WqeImage | None:
        """Copy a work request from the user's queue; None when it cannot be read."""
        queue = self.get_rsc(wq_num)
        if queue is None:
            return None
        if isinstance(queue, Srq):
            return srq_image(queue, wqe_index)
        return queue.image(wqe_index, requestor)
