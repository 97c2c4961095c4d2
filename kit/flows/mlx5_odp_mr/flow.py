"""mlx5 memory regions side by side: pinned, explicitly on demand, implicitly on demand."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.mlx5_odp_mr.parameters import OdpMrParameters
from kit.flows.mlx5_odp_mr.session import STAGES, OdpMrSession
from kit.flows.run import Run

__all__ = ["FLOW", "Mlx5OdpMr"]


class Mlx5OdpMr:
    """The flow as the registry sees it."""

    name = "mlx5_odp_mr"
    title = "mlx5 memory regions side by side: pinned, on demand, implicit"
    Parameters = OdpMrParameters
    stages = STAGES

    def open(self, parameters: OdpMrParameters, scenario: str = "") -> OdpMrSession:
        """Return the flow as an object with one method a stage."""
        return OdpMrSession(parameters, scenario)

    def run(
        self, parameters: OdpMrParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return OdpMrSession(parameters, scenario).finish(progress)


FLOW = Mlx5OdpMr()
