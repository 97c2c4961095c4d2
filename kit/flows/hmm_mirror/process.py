"""The process: it builds the structure, touches it, forks, and exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.errors import Errno, raise_for
from kit.flows.hmm_mirror.noise import NOISE_PAGES
from kit.flows.hmm_mirror.parameters import HUGE
from kit.flows.hmm_mirror.structure import Pages, Words
from kit.flows.run import Allocation
from kit.memory.faults.gup import pin_user_pages_fast
from kit.memory.faults.load_store import load, store
from kit.memory.syscalls.exit import exit_mmap
from kit.memory.syscalls.fork import fork
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.types import (
    FOLL_LONGTERM,
    FOLL_WRITE,
    MADV_HUGEPAGE,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
)

if TYPE_CHECKING:
    from kit.flows.hmm_mirror.session import HmmSession
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["build", "fork_children", "leave", "touch"]

RW, ANON = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
TURN = 64  # CPU touches between looks at what others do meanwhile


def build(session: HmmSession) -> Wait:
    """Map memory and write the structure, node by node: the CPU's first touch."""
    s, p, cpu, mm = session, session.parameters, session.cpu, session.mm
    length = p.pages * PAGE
    align = HUGE if length >= HUGE else None
    s.base = raise_for((yield from mmap(mm, cpu, length, RW, ANON, align=align)))
    s.allocations.append(Allocation(p.structure, s.base, length))
    if p.thp:
        raise_for((yield from madvise(mm, cpu, s.base, length, MADV_HUGEPAGE)))
    if p.noise != "none":
        s.noise_area = raise_for((yield from mmap(mm, cpu, NOISE_PAGES * PAGE, RW, ANON)))
        mm.record_moves = False  # the map shows the structure alone
        ones = np.ones(NOISE_PAGES, dtype=np.uint64)
        yield from store(mm, cpu, s.noise_area // PAGE + np.arange(NOISE_PAGES), ones)
        mm.record_moves = True
    s.expected = s.structure.words(s.base)
    yield from write(s, s.structure.place, s.expected[s.structure.place], cpu)
    if p.pinned_pages:
        s.pinned = yield from pin_user_pages_fast(mm, cpu, s.base, p.pinned_pages, FOLL_WRITE | FOLL_LONGTERM)
    yield from cpu.sync()


def write(session: HmmSession, pages: Pages, words: Words, thread: Thread) -> Wait:
    """Store words, one a page."""
    yield from store(session.mm, thread, session.base // PAGE + pages, words)


def touch(session: HmmSession, pages: Pages) -> Wait:
    """Let the CPU read pages and write to some of them; what it reads must be what was last written."""
    s, thread = session, session.cpu
    writes = s.rng.random(len(pages)) < s.parameters.cpu_write_fraction
    for at in range(0, len(pages), TURN):
        some, wrote = pages[at : at + TURN], writes[at : at + TURN]
        seen = yield from load(s.mm, thread, s.base // PAGE + some)
        s.record.compare(seen, s.expected[some])
        if wrote.any():
            s.expected[some[wrote]] += np.uint64(1)
            s.record.cpu_writes += int(wrote.sum())
            yield from write(s, some[wrote], s.expected[some[wrote]], thread)
        thread.charge(s.machine["cpu_visit"] * len(some))
        yield from thread.sync()


def fork_children(session: HmmSession) -> Wait:
    """Fork as often as asked, and let every child run; return the running children."""
    s, mm, running = session, session.mm, []
    for number in range(s.parameters.children):
        mm.record_moves = False  # the map shows the parent's address space alone
        child = yield from fork(mm, s.cpu)
        if isinstance(child, Errno):
            raise_for(child)
        mm.record_moves, child.record_moves = True, False
        yield from s.cpu.sync()
        running.append(s.engine.start(run_child(s, child, number + 1)))
    return running


def run_child(session: HmmSession, mm: Mm, number: int) -> Wait:
    """One child: it reads and writes its share of the pages, checks that they are its own, and exits."""
    s, first = session, session.base // PAGE
    thread = s.engine.thread(f"child {number}")
    thread.now = s.engine.now
    expected = s.expected.copy()
    pages = s.structure.some_pages(s.parameters.child_fraction)
    for at in range(0, len(pages), TURN):
        some = pages[at : at + TURN]
        wrote = some[::2]
        s.record.compare((yield from load(mm, thread, first + some)), expected[some])
        expected[wrote] += np.uint64(2)
        yield from store(mm, thread, first + wrote, expected[wrote])
        yield from thread.sync()
    for at in range(0, len(pages), TURN):
        some = pages[at : at + TURN]
        s.record.compare((yield from load(mm, thread, first + some)), expected[some])
    yield from exit_mmap(mm, thread)
    yield from thread.sync()


def leave(session: HmmSession) -> Wait:
    """Unmap the first half of the structure, then exit."""
    s, mm, cpu = session, session.mm, session.cpu
    if s.noise_area:
        mm.record_moves = False
        yield from munmap(mm, cpu, s.noise_area, NOISE_PAGES * PAGE)
        mm.record_moves = True
    s.evictions.settle(s.base, s.parameters.pages)
    half = s.parameters.pages // 2 * PAGE
    if half:
        yield from munmap(mm, cpu, s.base, half)
    yield from exit_mmap(mm, cpu)
