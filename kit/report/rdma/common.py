"""The part of a `FlowReport` that the flows over mlx5 share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kit.report.flow_report import Activity, Closeup, FlowReport, Headline, TableEntry
from kit.report.language import BLUE, DARK, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Lane, say_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kit.flows.run import Run

__all__ = ["HARDWARE", "LANES", "TABLES", "event_columns", "headlines", "report", "steps_of_era"]

HARDWARE = (
    "host_program", "rdma_message", "message", "eqe", "umr", "qp_stalled", "wire", "rnr_wait", "retransmit",
    "packet_lost", "dma_stale", "completion", "pfn_list", "dma_list", "hardware_mtt", "hardware_ksm",
)  # fmt: skip

LANES = (
    Lane("program", ("host_program",), "#d9d9e0", together=True),
    Lane("messages", ("message",), BLUE),
    Lane("QP stands still", ("qp_stalled",), "#b4b4bc", under="rnr_wait", words="QP stands still for a page",
         under_words="waits after an RNR NAK"),
    Lane("interrupt", ("mlx5_ib_eq_pf_int",), PURPLE),
    Lane("fault handler", ("mlx5_ib_eqe_pf_action",), SKY, accent=("hmm_range_fault",), accent_colour=DARK,
         accent_words="hmm_range_fault"),
    Lane("CPU page fault", ("handle_mm_fault",), GREEN),
    Lane("firmware command", ("mlx5_cmd_exec",), YELLOW),
    Lane("UMR", ("umr",), ORANGE),
    Lane("invalidation", ("mlx5_ib_invalidate_range",), VERMILION),
    Lane("register, deregister", ("mlx5_ib_reg_user_mr", "mlx5_ib_dereg_mr"), "#8d8d99", together=True),
)  # fmt: skip

_COST_GROUPS = (
    ("firmware commands", r"cmd_exec|page_fault_resume"),
    ("UMR: change translations", r"umr|xlt|populate_(mtt|klm|ksm)"),
    ("dma-bufs and their exporter", r"dma_?buf|dma_resv|^ttm_|amdgpu"),
    (
        "page-fault queue",
        r"eq_pf|eqe_pf|pfault|mempool|eq_(get|update|create|enable)|create_(async|map)_eq|frag_buf|init_(fbc|eq)",
    ),
    ("look up and DMA-map pages", r"umem_odp|dma_(un)?map|hmm_pfn|update_odp_stats"),
    ("walk the CPU's page table", r"hmm_|mmu_interval_read"),
    ("pin and unpin", r"pin_user|ib_umem_(get|release)|__ib_umem"),
    ("CPU page faults", r"fault|anonymous|do_swap|do_wp|wp_page"),
    ("invalidate", r"invalidate|notifier"),
    ("mkeys and their cache", r"mkey|cache_(ent|work)|add_keys|clean_keys"),
    ("register and deregister", r"reg_|dereg|real_mr|user_odp_mr|implicit|child|cacheable_mr|set_mr_fields"),
    ("migrate", r"migrat|dmirror|remap"),
    ("reclaim and unmap", r"shrink|unmap|zap_"),
    ("programs wait for completions", r"ibv_poll_cq"),
    ("programs set up and connect", r"^(main|ibv_|pp_)"),
    ("other memory management", r"."),
)

TABLES = {
    "rdma_stat": TableEntry(
        "rdma stat show mr: the counters of every on-demand region", "kit.report.rdma.tables:rdma_stat"
    ),
    "page_faults": TableEntry("the adapters' page faults, one a row", "kit.report.rdma.tables:page_faults"),
    "umr": TableEntry("UMR work requests by what asked for them", "kit.report.rdma.tables:umr_table"),
}

_KINDS = {
    "qp_stalled": "PAGE_FAULT",
    "mlx5_ib_invalidate_range": "INVALIDATION",
    "mlx5_ib_dmabuf_invalidate_cb": "INVALIDATION",
    "umr": "UMR_WQE",
    "message": "MESSAGE",
    "rnr_wait": "RNR_NAK",
    "retransmit": "RETRANSMISSION",
    "packet_lost": "PACKET_LOST",
    "dma_stale": "STALE_DMA",
}
_VIEWS = {
    "Steps": "kit.report.rdma.common:steps_of_era",
    "Tables": "kit.report.views:tables_view",
    "Tables of pages": "kit.report.rdma.layers:address_layers",
    "One fault": "kit.report.rdma.sequence:sequence_chart",
    "Event queue": "kit.report.rdma.queue:queue_depth",
    "Notifier": "kit.report.rdma.notifier:notifier_chart",
    "Costs": "kit.report.figures:cost_breakdown",
}


def event_columns(run: Run) -> dict[str, NDArray[Any]]:
    """Return the records of the adapters and of invalidations as the columns of the events file."""
    from kit.report.events import step_event_columns

    return step_event_columns(run, _KINDS)


def headlines(run: Run) -> list[Headline]:
    """Return the adapters' faults, UMR work requests, invalidations, the mean standstill and stale uses."""
    m = run.metrics
    found = [
        Headline(m["faults"], f"{int(m['faults']):,}", "page faults of adapters"),
        Headline(m["umr_wqes"], f"{int(m['umr_wqes']):,}", "UMR work requests"),
        Headline(m["invalidations"], f"{int(m['invalidations']):,}", "invalidations"),
        Headline(m["fault_mean_us"], say_time(m["fault_mean_us"]), "mean standstill of a fault"),
    ]
    stale = m["stale_dma"]
    return [*found, Headline(stale, f"{int(stale):,}", "uses of stale addresses", good=not stale)]


def steps_of_era(run: Run) -> Any:
    """Return the documented steps of the run's kernel, with what the run reached."""
    from kit.flows.documented import Documented
    from kit.report.figures import documented_steps

    return documented_steps(run, Documented.load(run.flow, str(run.parameters.get("era", ""))))


def report(**own: Any) -> FlowReport:
    """Return a flow's report: what is shared, changed by what is its own."""
    base: dict[str, Any] = {
        "lanes": LANES,
        "actors": (
            "program", "requester program", "responder program", "requester hca", "responder hca", "responder irq",
            "requester hca irq", "responder hca irq", "responder mlx5_ib_page_fault/0",
        ),
        "tables": TABLES,
        "shown": ("rdma_stat", "umr", "page_faults"),
        "events": "kit.report.rdma.common:event_columns",
        "headlines": "kit.report.rdma.common:headlines",
        "views": _VIEWS,
        "copies": (),
        "hardware": HARDWARE,
        "closeup": Closeup(
            "qp_stalled", "Page fault {number} of the adapter, {time} from the missing page to the resumption",
            "One page fault, up close.", "The adapters have met no missing page{which}, so there is none to show.",
        ),
        "activities": (
            Activity("queue pairs stand still", ("qp_stalled",), "", "#b4b4bc"),
            Activity("adapters execute UMR", ("umr",), "", ORANGE),
            Activity("messages on the wire", ("wire",), "", BLUE),
        ),
        "cost_groups": _COST_GROUPS,
        "program_groups": ("programs wait for completions", "programs set up and connect"),
        "memory": "the responder's memory",
        "untouched": "No page has moved yet: memory that nobody touched is nowhere.",
    }  # fmt: skip
    return FlowReport(**{**base, **own})
