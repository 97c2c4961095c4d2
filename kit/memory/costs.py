"""What the memory system charges time for: the names that a machine profile gives values (microseconds)."""

from __future__ import annotations

from collections.abc import Mapping

from kit.sim.costs import Costs

__all__ = ["COSTS", "make_costs"]

COSTS: dict[str, str] = {
    "syscall": "entering and leaving the kernel for one system call",
    "fault_entry": "taking a CPU page fault exception and returning from it, for each fault",
    "handle_mm_fault": "finding the area and walking the page table down to the entry, for each fault",
    "vma_op": "inserting, splitting, merging or removing one area",
    "table_alloc": "allocating and installing one page-table page",
    "walk_table": "visiting one leaf table in a range walk",
    "pte_read": "examining one entry in a range walk",
    "pte_write": "writing one entry, with its reference and rmap counts",
    "tlb_flush": "one TLB shootdown of a range",
    "page_alloc": "allocating one 4 KiB page",
    "huge_alloc": "allocating one 2 MiB folio",
    "page_free": "freeing one page or folio",
    "page_zero": "clearing 4 KiB",
    "page_copy": "copying 4 KiB within host memory",
    "huge_zero": "clearing 2 MiB",
    "huge_copy": "copying 2 MiB within host memory",
    "rmap_walk": "visiting one mapping of one page through the reverse map",
    "lru_page": "putting one page on, or isolating it from, an LRU list",
    "split_folio": "splitting one 2 MiB folio into 4 KiB pages",
    "fork_base": "creating a process, without its memory",
    "swap_out_page": "writing 4 KiB to swap",
    "swap_in_page": "reading 4 KiB back from swap",
    "file_read_page": "reading 4 KiB of a file into the page cache",
    "file_write_page": "writing 4 KiB of the page cache back to the file",
    "gup_page": "get_user_pages for one page whose entry is present",
    "notifier_call": "calling one MMU notifier subscription, without what its driver does",
    "hmm_entry": "translating one entry in hmm_range_fault",
    "migrate_entry": "collecting, checking and replacing one page in migrate_vma, without its copy",
}


def make_costs(values: Mapping[str, float] | None = None) -> Costs:
    """Return the costs as attributes; None makes everything free (a model without time).

    Raises
    ------
    ParameterError
        A name that is unknown, or a cost that has no value.
    """
    return Costs(COSTS, values)
