"""Content: what the program wrote last, told apart from everything else."""

from __future__ import annotations

import numpy as np

from kit.memory.physical.content import Content
from kit.memory.physical.frames import Frames


def content(pages: int) -> tuple[Content, Frames]:
    made, frames = Content(), Frames("memory", 1000)
    made.grow(pages)
    frames.ensure(1000)
    return made, frames


def test_only_the_last_write_before_a_settlement_counts() -> None:
    made, frames = content(10)
    made.write(np.array([3, 3, 5]))
    slots = np.flatnonzero(made.dirty)
    assert slots.tolist() == [3, 5]
    made.settle(slots, frames, np.array([30, 50], dtype=np.int32))
    assert not made.dirty.any()
    assert frames.intact(np.array([30, 50]), made.stamps[[3, 5]]).all()
    assert made.stamps[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]


def test_no_two_settlements_and_no_two_pages_share_a_stamp() -> None:
    made, frames = content(10)
    seen = set()
    for _ in range(5):
        made.write(np.arange(10))
        made.settle(np.arange(10), frames, np.arange(10, dtype=np.int32))
        seen |= set(made.stamps.tolist())
    assert len(seen) == 50 and 0 not in seen


def test_a_stale_copy_is_told_apart() -> None:
    made, frames = content(4)
    made.write(np.array([1]))
    made.settle(np.array([1]), frames, np.array([7], dtype=np.int32))
    made.write(np.array([1]))
    made.settle(np.array([1]), frames, np.array([8], dtype=np.int32))
    assert frames.intact(np.array([7, 8]), made.stamps[[1, 1]]).tolist() == [False, True]


def test_freed_pages_hold_nothing_and_growth_keeps_the_others() -> None:
    made, frames = content(4)
    made.write(np.arange(4))
    made.settle(np.arange(2), frames, np.arange(2, dtype=np.int32))
    kept = int(made.stamps[0])
    made.forget(1, 3)
    made.grow(2000)
    assert made.stamps[0] == kept and not made.stamps[1:].any() and not made.dirty[1:].any()
    assert len(made.stamps) == len(made.dirty) == 2000
