"""What the implicit memory region's flow brings to the reports."""

from kit.report.rdma.common import report

__all__ = ["REPORT"]

REPORT = report()
