"""The walk without HMM: memory of the device's own, copies both ways, every pointer translated twice (seed 003)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.errors import raise_for
from kit.flows.hmm_mirror.structure import rewritten
from kit.memory.faults.load_store import load, store
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from kit.flows.hmm_mirror.session import HmmSession
    from kit.sim.engine import Wait

__all__ = ["DEVICE_BASE", "offload_by_copies"]

DEVICE_BASE = 0x10_0000_0000  # where the device's own address space has its allocation


def offload_by_copies(session: HmmSession) -> Wait:
    """Copy the structure into memory that the device allocated, walk it there, and copy it back."""
    s, cpu, p = session, session.cpu, session.parameters
    if p.pages > s.device.capacity:
        s.record.explicit = "does not fit"
        return
    cpu.charge(s.machine["device_alloc_call"])
    s.mm.record_moves = False  # the structure itself stays where it is
    staging = raise_for(
        (yield from mmap(s.mm, cpu, p.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
    )
    pages, first, copy = np.arange(p.pages), s.base // PAGE, staging // PAGE

    held = yield from load(s.mm, cpu, first + pages)
    s.record.compare(held, s.expected)
    yield from store(s.mm, cpu, copy + pages, rewritten(held, s.base, DEVICE_BASE))
    cpu.charge(s.machine["pointer_rewrite"] * p.pages)
    there = yield from load(s.mm, cpu, copy + pages)
    yield from _dma(session, True)

    visits = s.structure.walk()
    writes = s.structure.writes(len(visits), p.write_fraction)
    s.record.compare(rewritten(there, DEVICE_BASE, s.base)[visits], s.expected[visits])
    np.add.at(there, visits[writes], np.uint64(1))
    np.add.at(s.expected, visits[writes], np.uint64(1))
    start = cpu.now
    cpu.charge(len(visits) * s.machine["device_visit_local"])
    s.engine.trace.span("device_walk", "device", start, cpu.now, pages=len(visits), value=len(visits), cause="local")

    yield from _dma(session, False)
    yield from store(s.mm, cpu, copy + pages, there)
    yield from store(
        s.mm, cpu, first + pages, rewritten((yield from load(s.mm, cpu, copy + pages)), DEVICE_BASE, s.base)
    )
    cpu.charge(s.machine["pointer_rewrite"] * p.pages)
    yield from munmap(s.mm, cpu, staging, p.pages * PAGE)
    s.mm.record_moves = True
    s.record.explicit = "done"
    s.record.rewritten += 2 * int((s.structure.words(s.base) != 0).sum())


def _dma(session: HmmSession, out: bool) -> Wait:
    """One copy of the whole allocation by the copy engine."""
    cpu, nbytes = session.cpu, session.parameters.pages * PAGE
    start = cpu.now
    cpu.charge(session.device.copy_time(nbytes, out))
    session.engine.trace.span(
        "device_copy", "copy HtoD" if out else "copy DtoH", start, cpu.now, pages=nbytes // PAGE, bytes=nbytes,
        cause="explicit", value=1,
    )  # fmt: skip
    yield from cpu.sync()
