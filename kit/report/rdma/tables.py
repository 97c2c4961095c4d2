"""Tables of the flows over mlx5: the counters of ``rdma stat``, the adapter's page faults, and what each kind costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.window import COLUMN, spans_of
from kit.report.tables import Table

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["COUNTERS", "kinds_table", "page_faults", "rdma_stat", "umr_table"]

COUNTERS = (
    "page_faults", "page_faults_handled", "page_invalidations", "page_invalidations_handled", "page_prefetch",
)  # fmt: skip
_KEPT = 40


def rdma_stat(run: Run) -> Table:
    """Return the counters of every on-demand region, as ``rdma stat show mr`` has them."""
    names = [key.removesuffix("_page_faults") for key in run.metrics if key.endswith("_page_faults")]
    rows = []
    for number, name in enumerate(names):
        counters = [run.metrics.get(f"{name}_{counter}") for counter in COUNTERS]
        rows.append((f"mlx5_0 mrn {number}", name, *(None if c is None else int(c) for c in counters)))
    return Table(
        "rdma stat show mr", ("dev", "region", *COUNTERS), rows,
        "Pages that faults brought and that invalidations took back, and how many operations that were.",
        ("", "", ",", ",", ",", ",", ","), _as_printed,
    )  # fmt: skip


def _as_printed(made: Table) -> str:
    """Print a region a line, as the tool does; counters that the kernel does not have are left out."""
    lines = []
    for row in made.records():
        said = " ".join(f"{name} {row[name]}" for name in COUNTERS if row[name] is not None)
        lines.append(f"dev {row['dev']} ({row['region']}) {said}\n")
    return "".join(lines) or "no on-demand region\n"


def page_faults(run: Run) -> Table:
    """Return the page faults that the adapters reported: when, where, how long the queue pair stood still."""
    table = run.trace.spans.array()
    rows = spans_of(run.trace, table, ("qp_stalled",))
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    words = run.trace
    found = [
        (
            round(float(r[0]), 3), round(float(r[1] - r[0]), 3), words.actors.words[int(r[COLUMN["actor"]])],
            words.causes.words[int(r[COLUMN["cause"]])], int(r[COLUMN["va"]]),
            words.statuses.words[int(r[COLUMN["status"]])],
        )
        for r in rows[:_KEPT]
    ]  # fmt: skip
    more = f" The first {_KEPT} of {len(rows):,}." if len(rows) > _KEPT else ""
    return Table(
        "page faults of the adapters", ("Start (us)", "Stalled (us)", "Adapter", "Side", "Address", "Resumed"), found,
        f"One row a fault, from the missing page to the resumption.{more}", (",.3f", ",.3f", "", "", "address", ""),
    )  # fmt: skip


def umr_table(run: Run) -> Table:
    """Return the UMR work requests by what asked for them: how many, how many bytes of translations, how long."""
    table = run.trace.spans.array()
    posted = spans_of(run.trace, table, ("mlx5r_umr_post_send_wait",))
    names = run.trace.steps.words
    step, parent = table[:, COLUMN["step"]].astype(np.int64), table[:, COLUMN["parent"]].astype(np.int64)
    sums: dict[str, list[float]] = {}
    for row in posted:
        why = _why(names, step, parent, int(row[COLUMN["parent"]]))
        entry = sums.setdefault(why, [0, 0.0])
        entry[0] += 1
        entry[1] += float(row[1] - row[0])
    rows = [
        (why, int(count), time, time / count) for why, (count, time) in sorted(sums.items(), key=lambda i: -i[1][0])
    ]
    return Table(
        "UMR work requests", ("Asked for by", "WQEs", "Time (us)", "Mean (us)"), rows,
        "Every change of a translation goes through the adapter as a work request; the driver waits for each.",
        ("", ",", ",.1f", ",.2f"),
    )  # fmt: skip


_REASONS = {
    "mlx5_ib_invalidate_range": "invalidation: zap translations",
    "free_implicit_child_mr_work": "child freed: slot of the parent, key of the child",
    "implicit_get_child_mr": "child made: all its translations empty",
    "mlx5_ib_alloc_implicit_mr": "implicit registration: every slot empty",
    "mlx5_ib_init_odp_mr": "explicit registration: what is resident now",
    "create_real_mr": "pinned registration: every page",
    "mlx5_ib_dereg_mr": "deregistration: revoke the key",
    "mlx5_ib_advise_mr": "prefetch",
    "mlx5_ib_prefetch_mr_work": "prefetch",
    "mlx5_ib_eqe_pf_action": "page fault: new translations, new slots",
}


def _why(names: list[str], step: NDArray[np.int64], parent: NDArray[np.int64], row: int) -> str:
    """Return the reason of a work request: the first ancestor that names one."""
    while row >= 0:
        name = names[step[row]]
        if name in _REASONS:
            return _REASONS[name]
        row = int(parent[row])
    return "other"


_COLUMNS = {
    "Pinned (B)": "pinned_bytes",
    "Lists (B)": "lists_bytes",
    "Register (us)": "register_us",
    "Prefetch (us)": "prefetch_us",
    "First touch (us)": "first_touch_us",
    "Page-out (us)": "page_out_us",
    "Resident after (B)": "resident_after_bytes",
    "Second touch (us)": "second_touch_us",
    "Deregister (us)": "deregister_us",
}


def kinds_table(run: Run) -> Table:
    """Return what each kind of memory region cost, side by side: one row a kind."""
    kinds = [kind for kind in ("pinned", "explicit", "implicit") if f"{kind}_register_us" in run.metrics]
    rows = [(kind, *(run.metrics.get(f"{kind}_{name}") for name in _COLUMNS.values())) for kind in kinds]
    return Table(
        "memory regions side by side", ("Region", *_COLUMNS), rows,
        "The same work with each kind of region: what is pinned, what the driver keeps, and how long each part took.",
        ("", *(",.0f" if name.endswith("bytes") else ",.1f" for name in _COLUMNS.values())),
    )  # fmt: skip
