"""CUDA demand paging: cudaMallocManaged, first touch, GPU faults, migration, read-back."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.cuda_demand_paging.session import STAGES, Session
from kit.flows.run import Run

__all__ = ["FLOW", "CudaDemandPaging"]


class CudaDemandPaging:
    """The flow as the registry sees it."""

    name = "cuda_demand_paging"
    title = "CUDA unified memory: demand paging between host and GPU"
    Parameters = CudaParameters
    stages = STAGES

    def open(self, parameters: CudaParameters, scenario: str = "") -> Session:
        """Return the flow as an object with one method a stage."""
        return Session(parameters, scenario)

    def run(
        self, parameters: CudaParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return Session(parameters, scenario).finish(progress)


FLOW = CudaDemandPaging()
