"""A channel against a queue that is looked through: pushes in order, and no more of them than it has entries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kit.drivers.uvm.channel import Channel
from kit.sim.engine import Engine

TIMES = st.integers(0, 40).map(float)


@given(entries=st.integers(2, 6), pushes=st.lists(st.tuples(TIMES, TIMES, TIMES), max_size=40))
def test_a_push_starts_when_its_turn_has_come_and_waits_for_an_entry(
    entries: int, pushes: list[tuple[float, float, float]]
) -> None:
    thread, channel = Engine().thread("t"), Channel("C", entries)
    clock, free_at, held = 0.0, 0.0, []
    for pause, duration, after in pushes:
        clock += pause
        thread.now = clock
        while sum(end > clock for end in held) >= entries - 1:  # one stays free: wait until the next one completes
            clock = min(end for end in held if end > clock)
        start = max(clock, after, free_at)
        free_at = start + duration
        held.append(free_at)
        assert channel.push(thread, duration, after) == (start, free_at)
        assert thread.now == clock
    assert channel.pushes == len(pushes) and channel.free_at == free_at
