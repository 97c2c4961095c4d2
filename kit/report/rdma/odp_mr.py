"""What the flow of memory regions side by side brings to the reports."""

from kit.report.flow_report import TableEntry
from kit.report.rdma.common import TABLES, report

__all__ = ["REPORT"]

REPORT = report(
    tables={
        "kinds": TableEntry("what each kind of region cost, side by side", "kit.report.rdma.tables:kinds_table"),
        **TABLES,
    },
    shown=("kinds", "rdma_stat", "umr", "page_faults"),
)
