"""restrack.c: the counters that ``rdma stat show mr`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr

__all__ = ["fill_stat_mr_entry", "mr_cache_debugfs"]


def fill_stat_mr_entry(mr: Mlx5IbMr) -> dict[str, int]:
    """Return an on-demand region's counters under their names and in their order; empty for any other (restrack.c).

    ``page_faults`` and ``page_prefetch`` are 4 KiB pages, ``page_invalidations`` entries of the region's page size,
    ``*_handled`` operations; the latter exist since 6.14. Faults of an implicit region count at the parent,
    invalidations at the child.
    """
    if not mr.is_odp:
        return {}
    stats, dev = mr.odp_stats, mr.dev
    rows = {
        "page_faults": stats.faults,
        "page_faults_handled": stats.faults_handled,
        "page_invalidations": stats.invalidations,
        "page_invalidations_handled": stats.invalidations_handled,
        "page_prefetch": stats.prefetch,
    }
    handled = dev.options.of("handled_counters", dev.era)
    return {name: value for name, value in rows.items() if handled or not name.endswith("_handled")}


def mr_cache_debugfs(dev: Mlx5IbDev) -> list[dict[str, int]]:
    """Return the mkey cache as debugfs shows it: one row an entry, with ``size``, ``limit``, ``cur`` and ``miss``."""
    rows = []
    for key in dev.cache.keys:
        ent = dev.cache.ents[key]
        rows.append(
            {
                "access_mode": key.access_mode, "ndescs": key.ndescs, "size": ent.size, "limit": ent.limit,
                "cur": ent.ci, "miss": ent.miss,
            }
        )  # fmt: skip
    return rows
