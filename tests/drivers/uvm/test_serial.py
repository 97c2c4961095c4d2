"""One access after the other is what a stream with one lane does."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kit.drivers.uvm.serial import SerialKernel
from kit.drivers.uvm.sm import Misses
from kit.drivers.uvm.stream import StreamKernel
from kit.memory.physical.content import Content

SLOTS = 40
TOUCHES = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.booleans()), max_size=300)
LOOKS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=SLOTS, max_size=SLOTS), st.booleans(), st.booleans()))


def said(found: tuple[float, Misses | None]) -> object:
    spent, misses = found
    if misses is None:
        return spent, None
    columns = (misses.page, misses.access, misses.utlb, misses.delay)
    return spent, [[float(number) for number in column] for column in columns]


@given(TOUCHES, LOOKS, st.sets(st.integers(-1, SLOTS)))
def test_it_agrees_with_a_stream_of_one_lane(
    touches: list[tuple[int, bool]], looks: list[tuple[list[int], bool, bool]], cancelled: set[int]
) -> None:
    slots = np.array([slot for slot, _ in touches], dtype=np.int64)
    access = np.array([2 if writes else 1 for _, writes in touches], dtype=np.int8)
    need = access.astype(np.uint8)
    one = SerialKernel("k", slots, slots, access, need, 0.3 + 0.7)
    many = StreamKernel("k", slots, slots, access, need, 1, 28, 0.3, 0.7)
    contents = (Content(), Content())
    for content in contents:
        content.grow(SLOTS + 1)
    for rights, retry, short in looks:
        now, horizon = np.array([*rights, 0], dtype=np.uint8), 5.0 if short else 1e12
        found = [k.advance(now, content, horizon, retry) for k, content in zip((one, many), contents, strict=True)]
        assert said(found[0]) == said(found[1])
        assert (one.done, one.stalled, one.blocked) == (many.done, many.stalled, many.blocked)
        assert contents[0].dirty.tolist() == contents[1].dirty.tolist()
    assert one.cancel(cancelled, False) == many.cancel(cancelled, False)
    assert (one.done, one.stalled) == (many.done, many.stalled)
    assert one.cancel(set(), True) == many.cancel(set(), True)
