"""Which pages a migration may take: its select flags, and whose device memory it is (mm/migrate_device.c @ 7.0)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.migrate_vma import (
    MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
)
from kit.memory.physical.memremap import DEVICE_COHERENT, DEVICE_PRIVATE, DevPagemap, pgmaps_where
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.types import Bit, Kind

__all__ = ["Selection"]


class Selection:
    """Which pages a migration may take: its select flags, by pagemap; 0 is the host."""

    def __init__(self, migrate: MigrateVma) -> None:
        self.migrate, self.memory = migrate, migrate.area.mm.memory
        self.system = bool(migrate.flags & MIGRATE_VMA_SELECT_SYSTEM)
        self._known: list[DevPagemap | None] = []

    @property
    def private(self) -> NDArray[np.bool_]:
        """Device-private entries, shape (pagemaps,)."""
        return self._looked_up()[0]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Present pages, the host's or those of coherent device memory, shape (pagemaps,)."""
        return self._looked_up()[1]

    def eligible(self, kind: NDArray[np.uint8], bits: NDArray[np.uint8], frame: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which PTEs name a page that the select flags and the owner allow."""
        normal = (kind == Kind.PRESENT) & (bits & np.uint8(Bit.SPECIAL) == 0) & (frame != ZERO_PFN)
        private = kind == Kind.DEVICE_PRIVATE
        of = self.memory.pgmap[np.where(normal | private, frame, 0)]
        return np.asarray((normal & self.present[of]) | (private & self.private[of]))

    def _looked_up(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Look the owner's pagemaps up, again when some were plugged in or out while the collection waited."""
        if self._known != self.memory.pgmaps:
            self._known = list(self.memory.pgmaps)
            private = self._chosen(DEVICE_PRIVATE, MIGRATE_VMA_SELECT_DEVICE_PRIVATE)
            present = self._chosen(DEVICE_COHERENT, MIGRATE_VMA_SELECT_DEVICE_COHERENT)
            present[0] = self.system
            self._both = private, present
        return self._both

    def _chosen(self, kind: int, flag: int) -> NDArray[np.bool_]:
        def ours(pgmap: DevPagemap) -> bool:
            return pgmap.type == kind and pgmap.owner is self.migrate.pgmap_owner

        return pgmaps_where(self.memory, ours) & bool(self.migrate.flags & flag)
