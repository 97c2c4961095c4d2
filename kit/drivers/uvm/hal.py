"""Hardware layer: what differs between GPU families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FAMILIES", "Hal"]


@dataclass(frozen=True)
class Hal:
    """Facts of one GPU family, as the driver's HAL files hold them.

    Attributes
    ----------
    name : str
    replayable_faults : bool
        GPU page faults exist (Pascal and later); without them the driver is UVM-Lite.
    geometry : str
        Page-table geometry (`kit.memory.table.pagetable.GEOMETRIES`).
    cancel_by_address : bool
        Fatal faults are cancelled precisely by virtual address (Volta and later).
    prefetch_faults : bool
        Prefetch instructions fault by default.
    tlb_ranges_max : int
        Pages or ranges above which an invalidate takes the whole TLB.
    tlb_by_range : bool
        One invalidate method a range (Volta and later) instead of one a page.
    extra_hshub_membars : int
        Additional membars of GP100 and GV100.
    """

    name: str
    replayable_faults: bool = True
    geometry: str = "pascal"
    cancel_by_address: bool = True
    prefetch_faults: bool = True
    tlb_ranges_max: int = 8
    tlb_by_range: bool = True
    extra_hshub_membars: int = 0


FAMILIES: Final = {
    hal.name: hal
    for hal in (
        Hal("kepler", replayable_faults=False, cancel_by_address=False, prefetch_faults=False, tlb_by_range=False),
        Hal("maxwell", replayable_faults=False, cancel_by_address=False, prefetch_faults=False, tlb_by_range=False),
        Hal("pascal", cancel_by_address=False, prefetch_faults=False, tlb_ranges_max=32, tlb_by_range=False),
        Hal(
            "pascal_gp100", cancel_by_address=False, prefetch_faults=False, tlb_ranges_max=32, tlb_by_range=False,
            extra_hshub_membars=2,
        ),
        Hal("volta", extra_hshub_membars=2),
        Hal("turing"),
        Hal("ampere"),
        Hal("ada"),
        Hal("hopper", geometry="hopper"),
        Hal("blackwell", geometry="hopper"),
    )
}  # fmt: skip
