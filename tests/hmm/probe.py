"""A driver that only looks: `hmm_range_fault` with a caller's own requests, and `migrate_vma` with a caller's own choices."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
from hmm.harness import Process, Program

from kit.memory.device.hmm import hmm_range_fault
from kit.memory.device.hmm_entries import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
)
from kit.memory.notifier.mmu_interval_notifier import (
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuIntervalNotifierOps, MmuNotifierRange
from kit.memory.types import PAGE
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock

SNAPSHOT, READ, WRITE = 0, int(HMM_PFN_REQ_FAULT), int(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
VALID, WRITABLE, ERROR = int(HMM_PFN_VALID), int(HMM_PFN_WRITE), int(HMM_PFN_ERROR)
EBUSY = errno.EBUSY


class Probe:
    """One subscription over a range of a process, which notes every invalidation it hears."""

    def __init__(self, process: Process, start: int, pages: int) -> None:
        self.process, self.start, self.pages = process, start, pages
        self.sub, self.lock = MmuIntervalNotifier(self), Lock()
        self.heard: list[tuple[int, int, int, object]] = []  # event, start, end, owner

    def insert(self) -> Program:
        ops = MmuIntervalNotifierOps(self.invalidate)
        ret = yield from mmu_interval_notifier_insert(
            self.sub, self.process.thread, self.process.mm, self.start, self.pages * PAGE, ops
        )
        assert ret == 0
        return self

    def remove(self) -> Program:
        yield from mmu_interval_notifier_remove(self.sub, self.process.thread)

    def invalidate(self, sub: Any, thread: Thread, range: MmuNotifierRange, cur_seq: int) -> Wait:
        if range.blockable:
            yield from self.lock.acquire(thread)
        elif self.lock.holder is not None:
            return False
        else:
            yield from self.lock.acquire(thread)
        mmu_interval_set_seq(sub, cur_seq)
        self.heard.append((int(range.event), range.start, range.end, range.owner))
        yield from self.lock.release(thread)
        return True

    def asked(
        self, start: int, entries: Any, seq: int, default: int = 0, mask: int = 0, owner: object = None
    ) -> HmmRange:
        return HmmRange(
            notifier=self.sub, notifier_seq=seq, start=start, end=start + len(entries) * PAGE, hmm_pfns=entries,
            default_flags=default, pfn_flags_mask=mask, dev_private_owner=owner,
        )  # fmt: skip

    def range_fault(
        self, start: int, pages: int, default: int = 0, mask: int = 0, inputs: Any = None, owner: object = None
    ) -> Program:
        """The protocol of Documentation/mm/hmm.rst: retry while -EBUSY or a collision; return (result, entries)."""
        thread, mm = self.process.thread, self.process.mm
        given = np.zeros(pages, dtype=np.uint64) if inputs is None else np.asarray(inputs, dtype=np.uint64)
        for _ in range(100):
            entries = given.copy()
            seq = yield from mmu_interval_read_begin(self.sub, thread)
            asked = self.asked(start, entries, seq, default, mask, owner)
            yield from mm.mmap_lock.read_acquire(thread)
            result = yield from hmm_range_fault(asked, thread)
            yield from mm.mmap_lock.read_release(thread)
            if result == -EBUSY:
                continue
            if result:
                return result, entries
            yield from self.lock.acquire(thread)
            stale = mmu_interval_read_retry(self.sub, seq)
            yield from self.lock.release(thread)
            if not stale:
                return 0, entries
        raise AssertionError("100 collisions")


def look(
    process: Process, start: int, pages: int, default: int = 0, mask: int = 0, inputs: Any = None, owner: object = None
) -> Program:
    """Run one `hmm_range_fault` under a notifier of its own; return (result, entries as ints)."""
    probe = yield from Probe(process, start, pages).insert()
    result, entries = yield from probe.range_fault(start, pages, default, mask, inputs, owner)
    yield from probe.remove()
    return result, entries


def flags(entries: np.ndarray) -> list[str]:
    """Return each entry as letters: E error, V valid, W writable, 9 order 9, p a pfn without valid, - nothing."""
    words = []
    for entry in entries.tolist():
        word = "E" if entry & ERROR else ""
        word += "V" if entry & VALID else ""
        word += "W" if entry & WRITABLE else ""
        order, pfn = entry >> 53 & 31, entry & (1 << 53) - 1
        word += str(order) if order else ""
        word += "p" if pfn and not entry & VALID else ""
        words.append(word or "-")
    return words
