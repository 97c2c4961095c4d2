"""What the flow in which RDMA follows moving pages brings to the reports."""

from kit.report.language import BLUE, DARK, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Lane
from kit.report.rdma.common import report

__all__ = ["REPORT"]

_LANES = (
    Lane("program", ("host_program",), "#d9d9e0", together=True),
    Lane("messages", ("message",), BLUE),
    Lane("QP stands still", ("qp_stalled",), "#b4b4bc", under="rnr_wait"),
    Lane("the mover", ("dmirror_fops_unlocked_ioctl", "unmap_mapping_range"), PURPLE, together=True),
    Lane("invalidation", ("mlx5_ib_invalidate_range",), VERMILION),
    Lane("fault handler", ("mlx5_ib_eqe_pf_action",), SKY, accent=("hmm_range_fault",), accent_colour=DARK),
    Lane("page fault, page home", ("handle_mm_fault",), GREEN),
    Lane("firmware command", ("mlx5_cmd_exec",), YELLOW),
    Lane("UMR", ("umr",), ORANGE),
)

REPORT = report(lanes=_LANES, memory="the buffer")
