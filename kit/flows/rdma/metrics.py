"""Metrics that every flow over mlx5 has, counted in the trace; gauges come from the drivers' own counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.mlx5.restrack import fill_stat_mr_entry

if TYPE_CHECKING:
    from kit.flows.documented import Conformance
    from kit.flows.rdma.hosts import Host
    from kit.flows.rdma.session import RdmaSession
    from kit.flows.run import Integrity

__all__ = ["common_metrics", "stat_rows"]


def common_metrics(session: RdmaSession, conformance: Conformance, checked: Integrity) -> dict[str, float]:
    """Return flat names and numbers: times in microseconds, sizes in bytes."""
    trace = session.engine.trace
    column = trace.spans.column
    step, value = column("step"), column("value")
    duration = column("end") - column("start")
    nbytes = column("bytes")

    def of(name: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.asarray(step == trace.steps.ids.get(name, -1))

    found: dict[str, float] = {"simulated_us": session.engine.now}
    for name, started, ended in session.stages:
        found[f"{name}_us"] = ended - started
    messages = of("message")
    found["messages"], found["message_bytes_total"] = int(messages.sum()), int(nbytes[messages].sum())
    if found["messages"]:
        found["message_mean_us"] = float(duration[messages].mean())
        found["message_max_us"] = float(duration[messages].max())
    found["faults"] = int(of("qp_stalled").sum())
    found["fault_mean_us"] = float(duration[of("qp_stalled")].mean()) if found["faults"] else 0.0
    found["eqes"], found["eq_depth_max"] = int(of("eqe").sum()), int(value[of("eqe")].max(initial=0))
    found["interrupts"] = int(of("mlx5_ib_eq_pf_int").sum())
    found["resumes"] = int(of("mlx5_ib_page_fault_resume").sum())
    found["resumes_in_error"] = sum(h.dev.hca.counters.resumes_in_error for h in _hosts(session))
    found["rnr_naks"] = sum(h.dev.hca.counters.rnr_naks for h in _hosts(session))
    found["retransmissions"] = int(of("retransmit").sum())
    found["umr_wqes"], found["umr_bytes"] = int(of("umr").sum()), int(nbytes[of("umr")].sum())
    found["hmm_walks"] = int(of("hmm_range_fault").sum())
    found["cpu_faults"] = session.responder.mm.faults + session.requester.mm.faults
    told = of("mlx5_ib_invalidate_range") | of("mlx5_ib_dmabuf_invalidate_cb")
    found["invalidations"] = int(told.sum())
    found["children_created"] = int(of("implicit_get_child_mr").sum())
    found["children_destroyed"] = int(of("free_implicit_child_mr_work").sum())
    found["create_mkey_commands"] = int(of("mlx5_core_create_mkey").sum())
    found["stale_dma"] = sum(len(h.dev.hca.dma.stale) for h in _hosts(session))
    moves = trace.moves.array()
    found["bytes_moved"] = int(moves[moves[:, 4] != 0][:, 3].sum()) * 4096 if len(moves) else 0
    for row in stat_rows(session):
        for name, counted in row[1].items():
            found[f"{row[0]}_{name}"] = counted
    found["spans"], found["moves"] = len(trace.spans), len(trace.moves)
    found["steps_reached"], found["steps_documented"] = len(conformance.steps_reached), conformance.steps_documented
    found["pages_checked"], found["lost_pages"] = checked.pages_checked, checked.lost
    return found


def _hosts(session: RdmaSession) -> tuple[Host, Host]:
    return (session.requester, session.responder)


def stat_rows(session: RdmaSession) -> list[tuple[str, dict[str, int]]]:
    """Return (region's name, its counters as ``rdma stat show mr`` has them) for each on-demand region of the run."""
    return [
        (name, fill_stat_mr_entry(mr)) for host in _hosts(session) for name, mr in host.mrs if fill_stat_mr_entry(mr)
    ]
