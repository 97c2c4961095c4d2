"""RDMA follows migration: a GPU driver or a file system moves pages, and messages to them go on."""

from __future__ import annotations

from kit.flows.rdma_follows_migration.parameters import FollowsParameters
from kit.flows.rdma_follows_migration.session import STAGES, FollowsSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow(
    "RDMA follows pages that a GPU driver or a file system moves", FollowsParameters, FollowsSession, STAGES
)
