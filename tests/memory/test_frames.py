"""Frames: who holds which, and what is in them."""

from __future__ import annotations

import errno

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kit.errors import DriverError
from kit.memory.frames import Frames

COUNTS = st.sampled_from([1, 1, 3, 16, 512])


@given(st.lists(st.one_of(COUNTS, st.integers(-30, -1)), max_size=60), st.integers(1, 2000))
def test_no_frame_is_held_twice_and_none_is_lost(steps: list[int], capacity: int) -> None:
    frames, held = Frames("memory", capacity), []
    for step in steps:
        if step < 0 and held:
            frames.free(*held.pop(step % len(held)))
        elif step > 0:
            room = capacity - sum(count for _, count in held)
            try:
                held.append((frames.alloc(step), step))
            except DriverError as error:
                assert error.errno == errno.ENOMEM and error.status == "NV_ERR_NO_MEMORY"
                assert room < step or step > 1, "a single frame is always found while there is one"
        taken = [first + at for first, count in held for at in range(count)]
        assert len(set(taken)) == len(taken) == frames.used
        assert all(0 <= frame < capacity for frame in taken)


def test_full_memory_names_itself_and_gives_back_what_was_freed() -> None:
    frames = Frames("host memory", 4)
    first = frames.alloc(3)
    with pytest.raises(DriverError, match="host memory has no 2 frames left"):
        frames.alloc(2)
    assert frames.used == 3
    frames.free(first, 3)
    assert {frames.alloc(1) for _ in range(4)} == {0, 1, 2, 3}


@pytest.mark.parametrize("payload_bytes", [8, 64, 512, 4096])
def test_every_word_of_a_payload_counts(payload_bytes: int) -> None:
    frames = Frames("memory", 64, payload_bytes)
    at, stamps = np.array([3, 1, 40]), np.array([7, 1 << 40, 12345], dtype=np.uint64)
    frames.alloc(64)
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
    frames.alloc(1)
    frames.write(np.array([0]), np.array([99], dtype=np.uint64))
    frames.alloc(100_000)
    assert frames.intact(np.array([0]), np.array([99], dtype=np.uint64)).all()
    assert len(frames.payload) >= 100_001
