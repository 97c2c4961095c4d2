"""What the flow in which RDMA follows moving pages brings to the reports."""

from kit.report.language import BLUE, DARK, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Lane
from kit.report.rdma.common import HARDWARE, report

__all__ = ["REPORT"]

_LANES = (
    Lane("program", ("host_program",), "#d9d9e0", together=True),
    Lane("messages", ("message",), BLUE),
    Lane("QP stands still", ("qp_stalled",), "#b4b4bc", under="rnr_wait", words="QP stands still for a page",
         under_words="waits after an RNR NAK"),
    Lane(
        "the mover", ("dmirror_fops_unlocked_ioctl", "unmap_mapping_range", "amdgpu_bo_move", "gpu_copy"), PURPLE,
        together=True,
    ),
    Lane("invalidation", ("mlx5_ib_invalidate_range", "mlx5_ib_dmabuf_invalidate_cb"), VERMILION),
    Lane("fault handler", ("mlx5_ib_eqe_pf_action",), SKY, accent=("hmm_range_fault",), accent_colour=DARK,
         accent_words="hmm_range_fault"),
    Lane("page fault, page home", ("handle_mm_fault",), GREEN),
    Lane("firmware command", ("mlx5_cmd_exec",), YELLOW),
    Lane("UMR", ("umr",), ORANGE),
)  # fmt: skip

REPORT = report(
    lanes=_LANES, memory="the buffer", hardware=(*HARDWARE, "gpu_copy"),
    idle={"read_back": "No page has to come home for the CPU here, so no simulated time passes."},
)  # fmt: skip
