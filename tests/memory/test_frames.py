"""Frames: who holds which, and what is in them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kit.memory.invariants import check_invariants
from kit.memory.physical.frames import Frames
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.reclaim.alloc import alloc_pages_exact, free_pages_exact
from kit.sim.engine import Engine

STEPS = st.lists(st.tuples(st.sampled_from(["run", "run", "pages", "huge", "free"]), st.integers(1, 600)), max_size=50)


@given(STEPS, st.integers(2, 4000))
def test_no_frame_is_held_twice_and_none_is_lost(steps: list[tuple[str, int]], capacity: int) -> None:
    """Runs for drivers, single pages and 2 MiB blocks come from the same frames and become one another."""
    memory = PhysicalMemory(Engine(), capacity)
    held: list[tuple[str, list[int]]] = []
    for what, n in steps:
        room, taken = memory.free_pages, None
        if what == "free" and held:
            kind, frames = held.pop(n % len(held))
            free_pages_exact(memory, frames[0], len(frames)) if kind == "run" else memory.put(np.array(frames))
        elif what == "run":
            first = alloc_pages_exact(memory, n)
            taken = None if first is None else list(range(first, first + n))
            assert taken or room < n or n > 1, "a single frame is always found while there is one"
        elif what == "pages":
            pages = memory.alloc_pages(n)
            taken = None if pages is None else pages.tolist()
            assert (taken is None) == (room < n), "single pages are found wherever they are"
        elif what == "huge":
            head = memory.alloc_huge()
            held += [] if head is None else [("huge", [head])]
        held += [(what, taken)] if taken else []
        every = [f for kind, frames in held for f in (range(frames[0], frames[0] + 512) if kind == "huge" else frames)]
        assert len(set(every)) == len(every) == memory.used == capacity - 1 - memory.free_pages
        assert all(0 < frame < capacity for frame in every) and not memory.free_mask()[every].any()
        assert len(memory.payload) > max(every, default=0), "what is given out has room for its content"
    check_invariants(memory, [], {frame: 1 for _, frames in held for frame in frames})


def test_runs_are_found_in_what_neighbours_gave_back() -> None:
    memory = PhysicalMemory(Engine(), 13)
    parts = [alloc_pages_exact(memory, 3) for _ in range(4)]
    assert alloc_pages_exact(memory, 1) is None
    for first in (parts[1], parts[2], parts[0]):
        assert first is not None
        free_pages_exact(memory, first, 3)
    assert alloc_pages_exact(memory, 10) is None
    assert alloc_pages_exact(memory, 9) == parts[0]


def test_a_page_that_somebody_else_holds_stays_when_its_driver_lets_go() -> None:
    memory = PhysicalMemory(Engine(), 100)
    first = alloc_pages_exact(memory, 8)
    assert first is not None
    memory.get(first + 3)
    free_pages_exact(memory, first, 8)
    assert (memory.used, int(memory.refcount[first + 3])) == (1, 1)
    memory.put(first + 3)
    assert memory.used == 0
    with pytest.raises(RuntimeError, match="more often"):
        free_pages_exact(memory, first, 8)


@pytest.mark.parametrize("payload_bytes", [8, 64, 512, 4096])
def test_every_word_of_a_payload_counts(payload_bytes: int) -> None:
    frames = Frames("memory", 64, payload_bytes)
    at, stamps = np.array([3, 1, 40]), np.array([7, 1 << 40, 12345], dtype=np.uint64)
    frames.ensure(64)
    frames.write(at, stamps)
    assert frames.payload.shape[1] * 8 == payload_bytes
    assert frames.intact(at, stamps).all()
    assert not frames.intact(at, np.roll(stamps, 1)).any()
    frames.payload[40, -1] ^= np.uint64(1)
    assert frames.intact(at, stamps).tolist() == [True, True, False]
    frames.zero(slice(0, 64))
    assert frames.intact(np.arange(64), np.zeros(64, dtype=np.uint64)).all()
    if payload_bytes > 8:
        assert len(set(frames.pattern(np.array([5], dtype=np.uint64))[0].tolist())) == payload_bytes // 8


def test_content_survives_growth() -> None:
    frames = Frames("memory", 1 << 20)
    frames.ensure(1)
    frames.write(np.array([0]), np.array([99], dtype=np.uint64))
    frames.ensure(100_001)
    assert frames.intact(np.array([0]), np.array([99], dtype=np.uint64)).all()
    assert len(frames.payload) >= 100_001
