"""Seeded schedules of concurrent actors: nothing lost, nothing left, nobody waiting for ever.

``FARFAULT_SCHEDULES`` says how many seeds are run, ``FARFAULT_SCHEDULE`` replays one and prints its course.
"""

from __future__ import annotations

import pytest
from hmm.schedules import Schedule
from seeds import Seeds

SEEDS = Seeds(Schedule, "FARFAULT_SCHEDULE", 2000, "tests/hmm/test_schedules.py")


@pytest.mark.parametrize("block", range(SEEDS.blocks))
def test_schedules(block: int) -> None:
    SEEDS.run(block)


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed is the same schedule, step for step."""
    SEEDS.replay(capsys)
