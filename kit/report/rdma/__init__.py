"""What the flows over the mlx5 driver bring to the reports: the words of ``rdma stat``, and pictures of their own."""

from kit.report.rdma.common import steps_of_era
from kit.report.rdma.layers import address_layers
from kit.report.rdma.notifier import notifier_chart
from kit.report.rdma.queue import queue_depth
from kit.report.rdma.sequence import sequence_chart

__all__ = ["address_layers", "notifier_chart", "queue_depth", "sequence_chart", "steps_of_era"]
