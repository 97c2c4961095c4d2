"""mlx5 memory regions side by side: pinned, explicitly on demand, implicitly on demand."""

from __future__ import annotations

from kit.flows.mlx5_odp_mr.parameters import OdpMrParameters
from kit.flows.mlx5_odp_mr.session import STAGES, OdpMrSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow(
    "mlx5 memory regions side by side: pinned, on demand, implicit", OdpMrParameters, OdpMrSession, STAGES
)
