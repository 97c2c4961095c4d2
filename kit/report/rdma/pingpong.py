"""What rc_pingpong brings to the reports: what the program prints, beside the counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.report.flow_report import TableEntry
from kit.report.language import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Lane
from kit.report.rdma.common import TABLES, report
from kit.report.tables import Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["REPORT", "pingpong"]


def pingpong(run: Run) -> Table:
    """Return what the client prints at its end: bytes, time and rate, and time a round trip."""
    p, m = run.parameters, run.metrics
    rows: list[tuple[float, ...]] = []
    if m.get("elapsed_us"):
        nbytes = p["size"] * p["iters"] * 2
        rows.append((nbytes, m["elapsed_us"] / 1e6, m["mbit_per_s"], p["iters"], m["us_per_iter"]))
    columns = ("bytes", "seconds", "Mbit/sec", "iters", "usec/iter")
    caption = "What the client prints when all round trips are done; nothing when one of the programs gave up."
    return Table("rc_pingpong", columns, list(rows), caption, (",", ".6f", ",.2f", ",", ",.2f"), _as_printed)


def _as_printed(made: Table) -> str:
    if not made.rows:
        return "the program gave up before all round trips were done\n"
    nbytes, seconds, rate, iters, each = made.rows[0]
    return (
        f"{nbytes} bytes in {seconds:.2f} seconds = {rate:.2f} Mbit/sec\n"
        f"{iters} iters in {seconds:.2f} seconds = {each:.2f} usec/iter\n"
    )


_LANES = (
    Lane("program", ("host_program",), "#d9d9e0", together=True),
    Lane("client sends", ("ibv_post_send",), BLUE, "requester program"),
    Lane("server sends", ("ibv_post_send",), SKY, "responder program"),
    Lane("on the wire", ("wire",), "#8d8d99"),
    Lane("client QP stands still", ("qp_stalled",), "#b4b4bc", "requester hca"),
    Lane("server QP stands still", ("qp_stalled",), "#b4b4bc", "responder hca"),
    Lane("fault handlers", ("mlx5_ib_eqe_pf_action",), PURPLE),
    Lane("CPU page fault", ("handle_mm_fault",), GREEN),
    Lane("firmware command", ("mlx5_cmd_exec",), YELLOW),
    Lane("UMR", ("umr",), ORANGE),
    Lane("invalidation", ("mlx5_ib_invalidate_range",), VERMILION),
)

REPORT = report(
    lanes=_LANES,
    tables={"pingpong": TableEntry("what the program prints", "kit.report.rdma.pingpong:pingpong"), **TABLES},
    shown=("pingpong", "rdma_stat", "umr", "page_faults"),
    memory="the server's buffer",
)
