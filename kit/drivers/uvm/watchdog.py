"""A run in which the GPU faults for ever is given up, with an error that names what is stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.types import ACCESS_NAMES, PAGE_SHIFT
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.drivers.uvm.sm import Kernel, Misses

__all__ = ["Watchdog"]

# Replays that no access gets through. Whatever is served last before a replay is still there when it wakes, so one
# replay normally lets something through. Entries of accesses that went through since may stand before it (policies
# without a flush): as many batches as the buffer has entries, at worst. Ten thousand more are beyond any doubt.
REPLAYS: Final = 10_000
# A throttled access is not served before its nap is over, up to as many naps as lead to a pin, or before the pin
# ends; several pages can be in turn. In that time there are many replays, so time has to pass as well.
PERIODS: Final = 4


class Watchdog:
    """Looks at a kernel now and then.

    Raises
    ------
    KitError
        Accesses wait, and neither replays nor time have let any through.
    """

    def __init__(self, kernel: Kernel, gpu: Gpu) -> None:
        self.kernel, self.gpu = kernel, gpu
        module = gpu.module
        naps = module.thrashing_pin_threshold * module.thrashing_nap + module.thrashing_pin
        self.patience = float(PERIODS * naps * module.thrashing_lapse_usec) if module.thrashing_enable else 0.0
        self.replays = REPLAYS + gpu.fault_buffer.entries
        self._went_on()

    def _went_on(self) -> None:
        self.progress, self.since, self.at = self.kernel.progress, self.gpu.replays, self.gpu.engine.now

    def look(self, misses: Misses) -> None:
        """Accesses have missed, once more."""
        gpu = self.gpu
        if self.kernel.progress != self.progress:
            self._went_on()
        elif gpu.replays - self.since > self.replays and gpu.engine.now - self.at > self.patience:
            page, access = (int(np.asarray(column)[0]) for column in (misses.page, misses.access))
            raise KitError(
                f"kernel {self.kernel.name} is stuck: {gpu.replays - self.since} replays in "
                f"{gpu.engine.now - self.at:.0f} us let none of its accesses through; {self.kernel.stalled} wait, "
                f"the first for a {ACCESS_NAMES[access]} at {page << PAGE_SHIFT:#x}"
            )
