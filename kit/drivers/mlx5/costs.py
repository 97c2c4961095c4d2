"""What the mlx5 driver and its hardware charge time for: the names that a machine profile gives values."""

from __future__ import annotations

from collections.abc import Mapping

from kit.sim.costs import Costs

__all__ = ["COSTS", "make_costs"]

# Microseconds each, unless the text says otherwise.
COSTS: dict[str, str] = {
    # the hardware and its firmware
    "hw_fault_detect": "from the first access to a missing translation until the event is in the queue",
    "irq": "from the event in the queue until its interrupt handler runs",
    "cmd_create_mkey": "firmware command CREATE_MKEY",
    "cmd_destroy_mkey": "firmware command DESTROY_MKEY",
    "cmd_query_mkey": "firmware command QUERY_MKEY",
    "cmd_create_eq": "firmware command CREATE_EQ",
    "cmd_resume": "firmware command PAGE_FAULT_RESUME",
    "cmd_modify_qp": "firmware commands that move a queue pair from one state to another, each",
    "umr_wqe": "one UMR work request: doorbell, fetch, execution, completion",
    "umr_per_kib": "each KiB of translation entries that a UMR work request carries",
    "wqe_fetch": "doorbell and fetch of one work request",
    "cqe": "writing one completion and seeing it by polling",
    "wire_latency": "one way between the two adapters",
    "wire_bandwidth": "bytes per microsecond on the wire",
    "resend_interval": "requester's own page fault: from one attempt to the next while the page is missing",
    # the driver
    "verb": "one call into the kernel through uverbs, both ways",
    "eqe": "decoding one page-fault event and queueing its work",
    "wq_dispatch": "from queueing a work item until a free worker runs it",
    "read_wqe": "copying one work request from the user's queue",
    "list_page": "allocating and clearing the page and DMA lists, for each page of the region",
    "dma_map_page": "mapping one page for DMA",
    "dma_unmap_page": "unmapping one page from DMA",
    "pin_page": "taking a long-term pin on one page",
    "unpin_page": "giving the pin of one page up",
    "scan_entry": "looking at one entry of the DMA list during an invalidation or a release",
    "xlt_entry": "writing one translation entry into the buffer of a UMR work request",
    "xlt_alloc": "allocating and mapping the buffer of a UMR work request",
    "cache_op": "taking an mkey from the cache or giving it back",
    "srcu_grace_period": "one synchronize_srcu (only drivers before the use counts)",
}


def make_costs(values: Mapping[str, float] | None = None) -> Costs:
    """Return the costs as attributes; None makes everything free (a model without time).

    Raises
    ------
    ParameterError
        A name that is unknown, or a cost that has no value.
    """
    costs = Costs(COSTS, values)
    if values is None:
        costs.wire_bandwidth = float("inf")
    return costs
