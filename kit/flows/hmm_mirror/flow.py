"""Linux HMM: a device mirrors a process's address space, and pages move to its memory and back."""

from __future__ import annotations

from kit.flows.hmm_mirror.parameters import HmmParameters
from kit.flows.hmm_mirror.session import STAGES, HmmSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow(
    "Linux HMM: a device mirrors a process, and pages migrate to its memory and back", HmmParameters, HmmSession, STAGES
)
