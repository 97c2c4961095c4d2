"""What the HMM mirror flow brings to the reports: strace's and /proc/vmstat's words, its lanes and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.report.flow_report import Activity, Closeup, Copies, FlowReport, Headline, TableEntry
from kit.report.language import BLUE, ORANGE, PURPLE, SKY, VERMILION, Lane, say_bytes

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["REPORT", "headlines"]

_LANES = (
    Lane("host program", ("host_program",), "#d9d9e0", together=True),
    Lane("CPU fault", ("do_user_addr_fault",), BLUE, "cpu", accent=("dmirror_devmem_fault",), accent_colour=VERMILION,
         accent_words="CPU fault on a device page"),
    Lane("other process, thread", ("do_user_addr_fault", "mprotect", "madvise"), "#7fb2d6", others=("cpu",),
         together=True),
    Lane("device working", ("device_walk",), "#9bd3bd"),
    Lane("device stalled", ("device_stall",), "#b4b4bc"),
    Lane("driver", ("dmirror_fops_unlocked_ioctl",), SKY, accent=("hmm_range_fault",), accent_colour=PURPLE,
         accent_words="hmm_range_fault"),
    Lane("invalidation", ("mmu_notifier_invalidate_range_start",), VERMILION),
    Lane("copy to device", ("device_copy",), ORANGE, "copy HtoD"),
    Lane("copy to host", ("device_copy",), ORANGE, "copy DtoH"),
)  # fmt: skip


def headlines(run: Run) -> list[Headline]:
    """Return faults, pages that moved, bytes copied and pointers rewritten."""
    m = run.metrics
    counts = (
        ("device_faults", "device faults"), ("faults_home", "CPU faults on device pages"),
        ("migrate_moved_pages", "pages migrated"), ("mirror_invalidations", "mirror invalidations"),
    )  # fmt: skip
    found = [Headline(m[name], f"{m[name]:,.0f}", label) for name, label in counts]
    found.insert(3, Headline(m["bytes_moved"], say_bytes(m["bytes_moved"]), "copied over the link"))
    return found


REPORT = FlowReport(
    lanes=_LANES,
    actors=("cpu", "driver", "device", "copy HtoD", "copy DtoH", "other thread", "eviction worker"),
    tables={
        "strace": TableEntry("system calls, counted as strace -c does", "kit.report.hmm.tables:strace"),
        "commands": TableEntry("every command to the device, as strace shows it; commands:rows=N for more than 20",
                               "kit.report.hmm.tables:commands", rows=True),
        "notifier_events": TableEntry("invalidations by event", "kit.report.hmm.tables:notifier_events"),
        "migrations": TableEntry("migrate_vma by direction, phase by phase", "kit.report.hmm.tables:migrations"),
        "three_ways": TableEntry("copies, mirroring and migration side by side", "kit.report.hmm.tables:three_ways"),
        "measured": TableEntry("what was published, beside what the kit makes", "kit.report.hmm.measured:measured"),
    },
    shown=("three_ways", "strace", "migrations", "notifier_events", "commands"),
    events="kit.report.hmm.tables:event_columns",
    headlines="kit.report.hmm.report:headlines",
    views={
        "Page tables": "kit.report.hmm.figures:page_tables",
        "Three phases": "kit.report.hmm.figures:migration_phases",
        "Sequence": "kit.report.hmm.figures:sequence_numbers",
        "Steps": "kit.report.figures:documented_steps",
        "Tables": "kit.report.views:tables_view",
        "Costs": "kit.report.figures:cost_breakdown",
    },
    copies=(
        Copies("device_copy", "copy HtoD", "host to device", "device", "the device"),
        Copies("device_copy", "copy DtoH", "device to host", "host", "the host"),
    ),
    hardware=("host_program", "device_walk", "device_stall", "device_copy"),
    closeup=Closeup(
        "device_stall",
        "Device fault {number}, {time} from the held access to its retry",
        "One device fault, up close.",
        "This run has no device fault{which}, so there is none to show.",
    ),
    activities=(
        Activity("device working", ("device_walk",), "", "#9bd3bd"),
        Activity("device stalled", ("device_stall",), "", "#b4b4bc"),
        Activity("copies to the device", ("device_copy",), "copy HtoD", ORANGE),
        Activity("copies to the host", ("device_copy",), "copy DtoH", ORANGE),
    ),
    cost_groups=(
        ("invalidate mirrors", r"mmu_notifier|mmu_interval|dmirror_interval"),
        ("ask the CPU's page table", r"hmm_|dmirror_range_fault|dmirror_fault|dmirror_do_fault"),
        ("collect and unmap", r"migrate_vma_setup|migrate_vma_collect|unmap$|device_unmap|try_to_migrate|split"),
        ("allocate and copy", r"alloc_and_copy|devmem_alloc|dmirror_do_read|dmirror_do_write|allocate_chunk"),
        ("exchange pages", r"migrate_vma_pages|migrate_device_pages|insert_page"),
        ("put mappings back", r"finalize|remove_migration"),
        ("CPU faults", r"fault|do_anonymous|do_swap|do_wp|wp_page|huge_pmd"),
        ("fork and exit", r"fork|copy_page|exit|unmap_vmas|free_pgtables|release"),
        ("system calls", r"mmap|munmap|mprotect|madvise|ioctl|fops|user_pages|vmi_"),
    ),
    memory="the structure",
    untouched="No page has moved yet: memory that nothing touched is nowhere.",
)  # fmt: skip
