"""Seeded schedules of concurrent actors: nothing lost, nothing left, nobody waiting for ever.

``FARFAULT_SCHEDULES`` says how many seeds are run, ``FARFAULT_SCHEDULE`` replays one and prints its course.
"""

from __future__ import annotations

import os

import pytest
from hmm.schedules import Schedule

SCHEDULES = int(os.environ.get("FARFAULT_SCHEDULES", "2000"))
BLOCK = 100


@pytest.mark.parametrize("block", range(-(-SCHEDULES // BLOCK)))
def test_schedules(block: int) -> None:
    for seed in range(block * BLOCK, min((block + 1) * BLOCK, SCHEDULES)):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except BaseException as error:
            error.add_note(f"replay: FARFAULT_SCHEDULE={seed} python -m pytest tests/hmm/test_schedules.py -k replay")
            raise


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed is the same schedule, step for step."""
    seed = int(os.environ.get("FARFAULT_SCHEDULE", "1"))
    first = Schedule(seed)
    try:
        first.run()
    finally:
        if "FARFAULT_SCHEDULE" in os.environ:
            with capsys.disabled():
                print("", *first.done, sep="\n")
    again = Schedule(seed)
    again.run()
    assert again.done == first.done
