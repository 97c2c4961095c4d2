"""Schedules by seed: how many of them are run, in blocks that several workers share, and how one is replayed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import pytest

BLOCK = 100


class Seeded(Protocol):
    """A schedule: made from its seed, run once; `done` is its course, a line for each step."""

    done: list[str]

    def run(self) -> object: ...


S = TypeVar("S", bound=Seeded)


class Seeds(Generic[S]):
    """The seeds of one kind of schedule.

    Parameters
    ----------
    schedule : callable
        Makes the schedule of a seed.
    variable : str
        Environment variable with a seed to replay; with an S at its end, the one that says how many seeds are run.
    count : int
        How many when it does not say.
    test : str
        Module of the tests, for the line that says how to replay a failure.
    """

    def __init__(self, schedule: Callable[[int], S], variable: str, count: int, test: str) -> None:
        self.schedule, self.variable, self.test = schedule, variable, test
        self.count = int(os.environ.get(f"{variable}S", count))
        self.blocks = -(-self.count // BLOCK)

    def block(self, number: int) -> range:
        """Return the seeds of a block."""
        return range(number * BLOCK, min((number + 1) * BLOCK, self.count))

    def run(self, number: int) -> None:
        """Run every schedule of a block; a failure says how to see it again."""
        for seed in self.block(number):
            try:
                self.schedule(seed).run()
            except BaseException as error:
                error.add_note(f"replay: {self.variable}={seed} python -m pytest {self.test} -k replay")
                raise

    def replay(self, capsys: pytest.CaptureFixture[str]) -> tuple[S, S]:
        """Run one seed twice, printing its course if somebody asked for it, and return both schedules for comparison."""
        seed = int(os.environ.get(self.variable, "1"))
        first, again = self.schedule(seed), self.schedule(seed)
        try:
            first.run()
        finally:
            if self.variable in os.environ:
                with capsys.disabled():
                    print("", *first.done, sep="\n")
        again.run()
        assert again.done == first.done
        return first, again
