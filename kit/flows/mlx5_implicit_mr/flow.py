"""mlx5 implicit memory region: one key for the whole address space, filled in by page faults of the adapter."""

from __future__ import annotations

from kit.flows.mlx5_implicit_mr.parameters import ImplicitParameters
from kit.flows.mlx5_implicit_mr.session import STAGES, ImplicitSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow(
    "mlx5 implicit memory region: remote writes fault in gigabytes and pages",
    ImplicitParameters,
    ImplicitSession,
    STAGES,
)
