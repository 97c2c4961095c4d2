"""mlx5 implicit memory region: one key for the whole address space, filled in by page faults of the adapter."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.mlx5_implicit_mr.parameters import ImplicitParameters
from kit.flows.mlx5_implicit_mr.session import STAGES, ImplicitSession
from kit.flows.run import Run

__all__ = ["FLOW", "Mlx5ImplicitMr"]


class Mlx5ImplicitMr:
    """The flow as the registry sees it."""

    name = "mlx5_implicit_mr"
    title = "mlx5 implicit memory region: remote writes fault in gigabytes and pages"
    Parameters = ImplicitParameters
    stages = STAGES

    def open(self, parameters: ImplicitParameters, scenario: str = "") -> ImplicitSession:
        """Return the flow as an object with one method a stage."""
        return ImplicitSession(parameters, scenario)

    def run(
        self, parameters: ImplicitParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return ImplicitSession(parameters, scenario).finish(progress)


FLOW = Mlx5ImplicitMr()
