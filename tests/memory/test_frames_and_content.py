"""Frames conserve themselves and their payload; content knows what was written last."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.errors import DriverError
from kit.memory.content import Content
from kit.memory.frames import Frames


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([1, 3, 16, 512])), max_size=60))
def test_no_frame_is_given_twice(operations: list[tuple[bool, int]]) -> None:
    frames, held = Frames("memory", 4096), []
    for take, count in operations:
        if take or not held:
            try:
                held.append((frames.alloc(count), count))
            except DriverError as error:
                assert error.errno == errno.ENOMEM
        else:
            frames.free(*held.pop(0))
        owned = [frame for first, count in held for frame in range(first, first + count)]
        assert len(owned) == len(set(owned)) == frames.used
        assert not owned or max(owned) < 4096


def test_running_out_says_so_with_errno() -> None:
    frames = Frames("host memory", 10)
    frames.alloc(8)
    with pytest.raises(DriverError, match=r"ENOMEM.*host memory has no 3 frames left") as caught:
        frames.alloc(3)
    assert caught.value.errno == errno.ENOMEM
    assert frames.used == 8


@pytest.mark.parametrize("payload", [8, 64, 4096])
def test_a_changed_word_anywhere_is_noticed(payload: int) -> None:
    frames = Frames("memory", 8, payload)
    first = frames.alloc(4)
    stamps = np.arange(1, 5, dtype=np.uint64)
    frames.write(np.arange(first, first + 4), stamps)
    assert frames.intact(np.arange(first, first + 4), stamps).all()
    frames.payload[first + 2, -1] ^= np.uint64(1)
    assert frames.intact(np.arange(first, first + 4), stamps).tolist() == [True, True, False, True]


def test_swapped_pages_are_noticed() -> None:
    content, frames = Content(), Frames("memory", 8)
    content.grow(2)
    frames.alloc(2)
    content.write(np.array([0, 1]))
    content.settle(np.array([0, 1]), frames, np.array([0, 1], dtype=np.int32))
    assert frames.intact(np.array([0, 1]), content.stamps[:2]).all()
    assert not frames.intact(np.array([1, 0]), content.stamps[:2]).any()


def test_each_settlement_is_new_content() -> None:
    content, frames = Content(), Frames("memory", 4)
    content.grow(1)
    frames.alloc(1)
    seen = set()
    for _ in range(3):
        content.write(np.array([0]))
        content.settle(np.array([0]), frames, np.array([0], dtype=np.int32))
        seen.add(int(content.stamps[0]))
    assert len(seen) == 3 and not content.dirty.any()
