"""A page whose content is lost is reported, wherever it is and whenever it happens: what 0 lost pages rests on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit.drivers.uvm.types import CPU, GPU
from kit.flows.cuda_demand_paging.flow import FLOW
from kit.flows.cuda_demand_paging.session import CudaSession
from kit.memory.table.pagemask import holds

READS = {"program": "stream", "buffer_bytes": 8 << 20, "write_fraction": 0.0}


def opened(**given: Any) -> CudaSession:
    return FLOW.open(FLOW.Parameters.check({**READS, **given})).allocate().first_touch()


def spoil(session: CudaSession, processor: int, count: int) -> None:
    """Change a bit in the frames of some pages that are resident at a processor."""
    pool = (session.va_space.host, session.va_space.gpu.frames)[processor]
    left = count
    for block in session.va_space.ranges[0].blocks.values():
        held = [page for page in range(block.pages) if holds(block.resident[processor], page)][:left]
        pool.payload[block.frames[processor][held], -1] ^= np.uint64(1)
        left -= len(held)
    assert not left, "too few pages are there"


@pytest.mark.parametrize("payload", [8, 4096])
@pytest.mark.parametrize("given", [{}, {"oversubscription": 1.5}, {"pattern": "random", "touches": 3000}], ids=str)
def test_what_the_host_loses_before_the_launch(given: dict[str, Any], payload: int) -> None:
    session = opened(payload_bytes=payload, **given)
    spoil(session, CPU, 3)
    assert session.kernel().read_back().finish().integrity.lost == 3


@pytest.mark.parametrize("payload", [8, 4096])
@pytest.mark.parametrize("written", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("oversubscription", [0.0, 1.5])
def test_what_the_gpu_loses_before_it_is_read_back(oversubscription: float, written: float, payload: int) -> None:
    session = opened(payload_bytes=payload, oversubscription=oversubscription, write_fraction=written).kernel()
    spoil(session, GPU, 600)  # of more than one block
    assert session.read_back().finish().integrity.lost == 600


def test_what_is_written_anew_is_not_lost() -> None:
    session = opened(write_fraction=1.0)
    spoil(session, CPU, 3)
    assert session.kernel().read_back().finish().integrity.lost == 0
