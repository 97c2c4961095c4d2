"""Zeroed arrays: what is never written takes no memory, however often they come and go."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kit.memory.physical.zeros import MAPPED, zeros

COME_AND_GO = """
import resource
from kit.memory.physical.zeros import zeros

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = most()
for _ in range(20):
    held = [zeros(1 << 18, "u8") for _ in range(64)]
    for each in held:
        each[17] = 1
print(most() - before)
"""


@pytest.mark.parametrize("count", [0, 1, MAPPED // 8 - 1, MAPPED // 8, MAPPED // 8 + 1])
def test_they_are_zeros_of_the_type_that_can_be_written(count: int) -> None:
    found = zeros(count, np.uint64)
    assert found.dtype == np.uint64 and found.shape == (count,) and not found.any()
    found[:] = 7
    assert (found == 7).all() and not zeros(count, np.uint64).any()


def test_records_come_as_records() -> None:
    kind = np.dtype([("bcount", "<u4"), ("key", "<u4"), ("va", "<u8")])
    found = zeros(MAPPED, kind)
    found["key"][5] = 3
    assert found[5].tolist() == (0, 3, 0) and len(found) == MAPPED


def test_what_is_not_written_takes_no_memory() -> None:
    """64 lists of 2 MiB, 20 times: 2.6 GB asked for, a page of each written."""
    done = subprocess.run([sys.executable, "-c", COME_AND_GO], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000, f"{done.stdout} KiB"
