"""RDMA follows migration: a GPU driver or a file system moves pages, and messages to them go on."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.rdma_follows_migration.parameters import FollowsParameters
from kit.flows.rdma_follows_migration.session import STAGES, FollowsSession
from kit.flows.run import Run

__all__ = ["FLOW", "RdmaFollowsMigration"]


class RdmaFollowsMigration:
    """The flow as the registry sees it."""

    name = "rdma_follows_migration"
    title = "RDMA follows pages that a GPU driver or a file system moves"
    Parameters = FollowsParameters
    stages = STAGES

    def open(self, parameters: FollowsParameters, scenario: str = "") -> FollowsSession:
        """Return the flow as an object with one method a stage."""
        return FollowsSession(parameters, scenario)

    def run(
        self, parameters: FollowsParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return FollowsSession(parameters, scenario).finish(progress)


FLOW = RdmaFollowsMigration()
