"""Failures on purpose: memory that cannot be had, mappings, requests and commands that fail."""

from __future__ import annotations

__all__ = ["Injection"]


class Injection:
    """What is made to fail on purpose: a site fails its next calls, after some that still work.

    `SITES` names them all.
    """

    SITES = (
        "umem_odp", "pfn_list", "dma_list", "notifier_insert", "odp_mkeys", "mr", "create_mkey_in", "xlt_max",
        "xlt_spare", "xlt_page", "xlt_dma_map", "dma_map", "umr", "umr_recover", "pf_kmalloc", "pf_pool", "pf_wq",
        "eq_create", "eq_enable", "wqe_page", "read_wqe", "prefetch_work", "pf_frame", "cache_page", "cache_async",
        "swiotlb",
    )  # fmt: skip

    def __init__(self) -> None:
        self._armed: dict[str, tuple[int, int]] = {}
        self.hits: dict[str, int] = {}

    def fail(self, site: str, times: int = 1, after: int = 0) -> None:
        """Let `site` work `after` times more and then fail `times` times."""
        if site not in self.SITES:
            raise KeyError(f"{site!r} is not one of {', '.join(self.SITES)}")
        self._armed[site] = after, times

    def hit(self, site: str) -> bool:
        """Whether this call of `site` fails."""
        if site not in self._armed:
            return False
        after, times = self._armed[site]
        if after:
            self._armed[site] = after - 1, times
            return False
        self.hits[site] = self.hits.get(site, 0) + 1
        if times > 1:
            self._armed[site] = 0, times - 1
        else:
            del self._armed[site]
        return True
