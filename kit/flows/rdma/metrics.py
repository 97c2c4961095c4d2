"""Metrics that every flow over mlx5 has, counted in the trace; gauges come from the drivers' own counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.drivers.mlx5.mr.restrack import fill_stat_mr_entry
from kit.flows.metrics import SpanColumns, conformance_metrics, integrity_metrics, time_metrics

if TYPE_CHECKING:
    from kit.flows.documented import Conformance
    from kit.flows.rdma.session import RdmaSession
    from kit.flows.run import Integrity

__all__ = ["common_metrics", "stat_rows"]


def common_metrics(session: RdmaSession, conformance: Conformance, checked: Integrity) -> dict[str, float]:
    """Return flat names and numbers: times in microseconds, sizes in bytes."""
    trace = session.engine.trace
    spans = SpanColumns(trace)
    duration = spans.duration
    found = time_metrics(session)
    messages = spans.of("message")
    found["messages"], found["message_bytes_total"] = int(messages.sum()), spans.total("bytes", messages)
    if found["messages"]:
        found["message_mean_us"] = float(duration[messages].mean())
        found["message_max_us"] = float(duration[messages].max())
    found["faults"] = spans.count("qp_stalled")
    found["fault_mean_us"] = float(duration[spans.of("qp_stalled")].mean()) if found["faults"] else 0.0
    found["eqes"], found["eq_depth_max"] = spans.count("eqe"), int(spans["value"][spans.of("eqe")].max(initial=0))
    found["interrupts"] = spans.count("mlx5_ib_eq_pf_int")
    found["resumes"] = spans.count("mlx5_ib_page_fault_resume")
    found["resumes_in_error"] = sum(h.dev.hca.counters.resumes_in_error for h in session.hosts)
    found["rnr_naks"] = sum(h.dev.hca.counters.rnr_naks for h in session.hosts)
    found["retransmissions"] = spans.count("retransmit")
    found["umr_wqes"], found["umr_bytes"] = spans.count("umr"), spans.total("bytes", spans.of("umr"))
    found["hmm_walks"] = spans.count("hmm_range_fault")
    found["cpu_faults"] = sum(h.mm.faults for h in session.hosts)
    found["invalidations"] = spans.count("mlx5_ib_invalidate_range") + spans.count("mlx5_ib_dmabuf_invalidate_cb")
    made = spans.of("implicit_get_child_mr") & (spans["status"] == trace.statuses("ok"))
    found["children_created"] = int(made.sum())
    found["children_destroyed"] = spans.count("free_implicit_child_mr_work")
    found["create_mkey_commands"] = spans.count("mlx5_core_create_mkey")
    found["stale_dma"] = sum(len(h.dev.hca.dma.stale) for h in session.hosts)
    moves = trace.moves.array()
    found["bytes_moved"] = int(moves[moves[:, 4] != 0][:, 3].sum()) * 4096 if len(moves) else 0
    for region, counters in stat_rows(session):
        for name, counted in counters.items():
            found[f"{region}_{name}"] = counted
    return {**found, **conformance_metrics(trace, conformance), **integrity_metrics(checked)}


def stat_rows(session: RdmaSession) -> list[tuple[str, dict[str, int]]]:
    """Return (region's name, its counters as ``rdma stat show mr`` has them) for each on-demand region of the run."""
    return [(name, fill_stat_mr_entry(mr)) for host in session.hosts for name, mr in host.mrs if fill_stat_mr_entry(mr)]
