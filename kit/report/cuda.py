"""What CUDA demand paging brings to the reports: the words of nvprof and Nsight Systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.report.flow_report import Activity, Closeup, Copies, FlowReport, Headline, TableEntry
from kit.report.language import BLUE, DARK, ORANGE, PURPLE, SKY, VERMILION, Lane, say_bytes

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["REPORT", "headlines"]

_LANES = (
    Lane("host program", ("host_program",), "#d9d9e0", together=True),
    Lane("CPU fault", ("uvm_vm_fault", "uvm_va_space_cpu_fault", "UvmEventTypeCpuFault"), BLUE),
    Lane("GPU", ("gpu_stall",), "#b4b4bc", under="kernel", words="GPU stalled", under_words="a kernel runs"),
    Lane("fault batch", ("fetch_fault_buffer_entries", "preprocess_fault_batch"), PURPLE, together=True),
    Lane("service", ("service_fault_batch",), SKY, accent=("evict_root_chunk",), accent_colour=DARK,
         accent_words="evicting"),
    Lane("copy HtoD", ("UvmEventTypeMigration",), ORANGE, "copy HtoD"),
    Lane("copy DtoH", ("UvmEventTypeMigration",), ORANGE, "copy DtoH", (), "eviction", VERMILION,
         accent_words="copy of an eviction"),
)  # fmt: skip
_COST_GROUPS = (
    ("wait for copies and replays", r"tracker_wait|push_wait|end_and_wait|service_replayable_faults$"),
    ("API calls", r"_api_|uvm_mmap|uvm_free|uvm_migrate"),
    ("evict", r"evict"),
    ("cancel fatal faults", r"cancel|fatal"),
    ("replay and flush", r"replay_on|fault_buffer_flush|hal_fault_buffer_replay|clear_replayable"),
    ("read the fault buffer", r"fetch_fault|fault_buffer|write_get|isr|replayable_faults"),
    ("sort and look up faults", r"preprocess|translate_instance|entry_to_va_space"),
    (
        "prefetch and thrashing policy",
        r"prefetch_hint|perf_prefetch|bitmap_tree|compute_prefetch|grow_fault|thrashing|throttl",
    ),
    ("find and zero memory", r"populate|alloc|chunk|zero|memset|Pma|pmm_|phys_mem"),
    ("set up and push copies", r"copy|memcopy|push_|channel_"),
    ("page tables and TLB", r"map|pte|tlb|pde|page_tree|revoke|mmu_|insert_page|membar"),
    ("CPU faults", r"cpu_fault|vm_fault"),
    ("decide and service blocks", r"service|residency|va_block|block_"),
    ("advice and user migration", r"migrate|preferred|accessed_by|read_dup|range"),
)


def headlines(run: Run) -> list[Headline]:
    """Return fault groups, CPU faults, bytes each way and evictions, counted in the run's trace."""
    from kit.report.figures.window import COLUMN, spans_of

    rows = run.trace.spans.array()

    def count(step: str) -> int:
        return len(spans_of(run.trace, rows, (step,)))

    found = []
    for step, label in (("UvmEventTypeGpuFault", "GPU fault groups"), ("UvmEventTypeCpuFault", "CPU faults")):
        found.append(Headline(count(step), f"{count(step):,}", label))
    for each in REPORT.copies:
        size = float(spans_of(run.trace, rows, (each.step,), each.actor)[:, COLUMN["bytes"]].sum())
        found.append(Headline(size, say_bytes(size), each.words))
    evicted = count("evict_root_chunk")
    return [*found, Headline(evicted, f"{evicted:,}", "chunks evicted")]


REPORT = FlowReport(
    lanes=_LANES,
    actors=("cpu", "gpu", "UVM GPU0 BH", "uvm worker", "copy HtoD", "copy DtoH"),
    tables={
        "nvprof": TableEntry("nvprof's unified memory summary block", "kit.report.nvprof:um_summary"),
        "gpu_trace": TableEntry(
            "nvprof --print-gpu-trace: every record by start time", "kit.report.nvprof:gpu_trace"
        ),
        "um_sum": TableEntry(
            "nsys stats um_sum: migrations and faults by virtual address; um_sum:rows=N for more than 10",
            "kit.report.nsys:um_sum", rows=True,
        ),
        "um_total_sum": TableEntry(
            "nsys stats um_total_sum: migration and fault totals", "kit.report.nsys:um_total_sum"
        ),
        "um_cpu_page_faults_sum": TableEntry(
            "nsys stats um_cpu_page_faults_sum: CPU faults by instruction", "kit.report.nsys:um_cpu_page_faults_sum"
        ),
        "cuda_gpu_mem_size_sum": TableEntry(
            "nsys stats cuda_gpu_mem_size_sum: copies by size", "kit.report.nsys:cuda_gpu_mem_size_sum"
        ),
        "cuda_gpu_mem_time_sum": TableEntry(
            "nsys stats cuda_gpu_mem_time_sum: copies by time", "kit.report.nsys:cuda_gpu_mem_time_sum"
        ),
        "measured": TableEntry(
            "what was published about the same program on this machine, beside the run",
            "kit.report.measured:measured",
        ),
        "measured_totals": TableEntry(
            "published totals of the P100 and of the T4, beside the same programs run by the kit",
            "kit.report.measured_totals:measured_totals",
        ),
    },
    shown=("nvprof", "um_total_sum", "um_sum", "um_cpu_page_faults_sum"),
    events="kit.report.cupti:um_event_columns",
    headlines="kit.report.cuda:headlines",
    views={
        "Steps": "kit.report.figures:documented_steps",
        "Tables": "kit.report.views:tables_view",
        "Copy sizes": "kit.report.figures:copy_sizes",
        "Costs": "kit.report.figures:cost_breakdown",
    },
    copies=(
        Copies("UvmEventTypeMigration", "copy HtoD", "host to device", "device", "the GPU"),
        Copies("UvmEventTypeMigration", "copy DtoH", "device to host", "host", "the host"),
    ),
    hardware=("gpu_stall", "kernel", "host_program"),
    closeup=Closeup(
        "UvmEventTypeGpuFault",
        "Fault batch {number}, {time} from the first fault to the last copy",
        "One fault batch, up close.",
        "This run has no fault batch{which}, so there is none to show.",
    ),
    event_prefix="UvmEventType",
    activities=(
        Activity("GPU lanes stalled", ("gpu_stall",), "", "#b4b4bc"),
        Activity("copies to the GPU", ("UvmEventTypeMigration",), "copy HtoD", ORANGE),
        Activity("copies to the host", ("UvmEventTypeMigration",), "copy DtoH", ORANGE),
    ),
    cost_groups=_COST_GROUPS,
    memory="managed memory",
    untouched="No page has moved yet: managed memory that nothing touched is nowhere.",
    exports=("--nsys",),
    idle={
        "first_touch": "The CPU touches nothing before the kernel in this run.",
        "read_back": "Nothing is read back in this run: after the kernel the CPU does not touch the data.",
    },
)  # fmt: skip
