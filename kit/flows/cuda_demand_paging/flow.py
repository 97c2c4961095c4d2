"""CUDA demand paging: cudaMallocManaged, first touch, GPU faults, migration, read-back."""

from __future__ import annotations

from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.cuda_demand_paging.session import STAGES, CudaSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow("CUDA unified memory: demand paging between host and GPU", CudaParameters, CudaSession, STAGES)
