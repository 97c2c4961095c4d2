"""A kernel whose accesses never get through is given up; one that only waits for long is not."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.uvm.harness import READS, Harness, pages

from kit.drivers.uvm.sm import Misses
from kit.drivers.uvm.stream import NEVER, StreamKernel
from kit.drivers.uvm.watchdog import REPLAYS, Watchdog
from kit.errors import KitError


def ready(**module: int) -> tuple[Harness, StreamKernel]:
    h = Harness(entries=16, **module)
    return h, h.stream(pages(h.allocate(512), range(32)), READS, lanes=8)


def missed(kernel: StreamKernel, at: int) -> Misses:
    return Misses(kernel.pages[at : at + 1], kernel.access[at : at + 1], np.zeros(1, dtype=np.int32), [0.0])


def test_the_error_names_what_is_stuck() -> None:
    h, kernel = ready(thrashing_pin=1)
    kernel.need[5] = NEVER  # no right lets this access through
    with pytest.raises(KitError, match=r"kernel stream is stuck: [0-9]+ replays in [0-9]+ us let none") as error:
        h.run(h.launching(kernel))
    assert str(error.value).endswith(f"1 wait, the first for a read at {int(kernel.pages[5]) << 12:#x}")
    assert kernel.progress == 31, "all others went through"
    assert h.gpu.replays > REPLAYS + 16


def test_replays_and_time_have_to_pass() -> None:
    h, kernel = ready(thrashing_nap=2, thrashing_pin=20, thrashing_pin_threshold=5)
    watchdog, misses = Watchdog(kernel, h.gpu), missed(kernel, 3)
    h.gpu.replays += REPLAYS + 17
    watchdog.look(misses)
    h.wait(4 * (2 * 5 + 20) * 500.0)
    watchdog.look(misses)
    h.wait(1.0)
    with pytest.raises(KitError, match="stuck"):
        watchdog.look(misses)


def test_time_alone_is_not_enough() -> None:
    h, kernel = ready()
    watchdog = Watchdog(kernel, h.gpu)
    h.wait(1e9)
    h.gpu.replays += REPLAYS + 16
    watchdog.look(missed(kernel, 0))


def test_an_access_that_goes_through_starts_it_again() -> None:
    h, kernel = ready(thrashing_enable=False)
    watchdog = Watchdog(kernel, h.gpu)
    for position in (1, 2):
        h.wait(1.0)
        h.gpu.replays += REPLAYS + 17
        kernel.position = position
        watchdog.look(missed(kernel, position))


def test_progress_of_a_kernel_counts_its_accesses() -> None:
    h, kernel = ready()
    h.run(h.launching(kernel))
    assert kernel.done and kernel.progress == 32
