"""nvprof's reports against what nvprof printed."""

from __future__ import annotations

import pytest

from kit.report import table
from kit.report.tables import nvprof_size, nvprof_time
from kit.sim.trace import Trace

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
BASE = 0x7F26_6E00_0000

# Printed by nvprof for add<<<1,1>>> on a GeForce RTX 2060 Max-Q (github.com/xyloid/a_dive_into_ray_tracing).
RTX2060 = """\
Unified Memory profiling result:
Device "GeForce RTX 2060 with Max-Q Design (0)"
   Count  Avg Size  Min Size  Max Size  Total Size  Total Time  Name
      48  170.67KB  4.0000KB  0.9961MB  8.000000MB  1.421896ms  Host To Device
      24  170.67KB  4.0000KB  0.9961MB  4.000000MB  656.8220us  Device To Host
      12         -         -         -           -  2.820396ms  Gpu page fault groups
Total CPU Page faults: 36
"""


def test_summary_of_the_one_thread_vector_add_is_the_recorded_block(vector_add_run):
    made = table(vector_add_run, "nvprof")
    assert made.to_text() == RTX2060
    assert made.rows[2] == (12, "-", "-", "-", "-", "2.820396ms", "Gpu page fault groups")


def test_rows_and_lines_without_records_are_left_out(make_run):
    # A posted P100-SXM2 block of a program with prefetched, remotely mapped arrays and no faults of either sort.
    trace = Trace()
    for engine, count, total in (("copy HtoD", 8, 1416.337), ("copy DtoH", 4, 660.617)):
        each = int(total * 1000) // count / 1000
        for i in range(count):
            time = each if i < count - 1 else round(total - each * (count - 1), 3)
            trace.span("UvmEventTypeMigration", engine, i, i + time, va=BASE, bytes=2 * MIB, cause="user")
    for i in range(8):
        trace.span("UvmEventTypeMapRemote", "gpu", i, i, va=BASE, bytes=2 * MIB, cause="policy")
    assert table(make_run(trace, device="Tesla P100-SXM2-16GB"), "nvprof").to_text() == (
        "Unified Memory profiling result:\n"
        'Device "Tesla P100-SXM2-16GB (0)"\n'
        "   Count  Avg Size  Min Size  Max Size  Total Size  Total Time  Name\n"
        "       8  2.0000MB  2.0000MB  2.0000MB  16.00000MB  1.416337ms  Host To Device\n"
        "       4  2.0000MB  2.0000MB  2.0000MB  8.000000MB  660.6170us  Device To Host\n"
        "       8  2.0000MB  2.0000MB  2.0000MB  16.00000MB           -  Remote mapping from device\n"
        "Total remote mappings to CPU: 8\n"
    )


def test_only_cpu_faults_print_no_device(make_run):
    trace = Trace()
    trace.span("UvmEventTypeCpuFault", "cpu", 1, 1, va=BASE)
    assert table(make_run(trace), "nvprof").to_text() == "Unified Memory profiling result:\nTotal CPU Page faults: 1\n"


def test_thrashing_prints_a_row_and_a_line(make_run):
    trace = Trace()
    for i in range(3):
        trace.span("UvmEventTypeThrashingDetected", "cpu", i, i, va=BASE, bytes=PAGE)
    lines = table(make_run(trace), "nvprof").to_text().splitlines()
    assert lines[3:] == [
        "       3  4.0000KB  4.0000KB  4.0000KB  12.00000KB           -  Memory thrashes",
        "Total CPU thrashes: 3",
    ]


def test_nothing_recorded_says_so(empty_run):
    assert table(empty_run, "nvprof").to_text().endswith("No unified memory records.\n")


# Bytes or nanoseconds and the words nvprof printed for them: vector adds on RTX 2060 Max-Q and RTX 8000, Monte Carlo
# traces on V100-SXM2, and a thrashing OpenACC run on V100-PCIE.
@pytest.mark.parametrize(
    ("nbytes", "width", "text"),
    [
        (8 * MIB / 48, 8, "170.67KB"),
        (4 * KIB, 8, "4.0000KB"),
        (1020 * KIB, 8, "0.9961MB"),
        (972 * KIB, 8, "972.00KB"),
        (8 * MIB / 99, 8, "82.747KB"),
        (2 * MIB, 8, "2.0000MB"),
        (0, 8, "0B"),
        (8 * MIB, 10, "8.000000MB"),
        (800 * MIB, 10, "800.0000MB"),
        (739 * MIB + 704 * KIB, 10, "739.6875MB"),
        (60 * KIB, 20, "60.000000KB"),
        (1020 * KIB, 20, "0.996094MB"),
        (116 * KIB, 20, "116.000000KB"),
    ],
)
def test_sizes_as_printed(nbytes, width, text):
    assert nvprof_size(nbytes, width) == text


@pytest.mark.parametrize(
    ("nanoseconds", "width", "text"),
    [
        (288, 8, "288ns"),
        (1811, 8, "1.8110us"),
        (10976, 8, "10.976us"),
        (545090, 8, "545.09us"),
        (6572100, 8, "6.5721ms"),
        (1161840000, 8, "1.16184s"),
        (25452700000, 8, "25.4527s"),
        (656822, 10, "656.8220us"),
        (1421896, 10, "1.421896ms"),
        (34266660, 10, "34.26666ms"),
        (4618286000, 10, "4.618286s"),
        (53551726000, 10, "53.551726s"),
        (999_999_999, 8, "1.00000s"),
    ],
)
def test_times_as_printed(nanoseconds, width, text):
    assert nvprof_time(nanoseconds, width) == text


# Lines of a V100-SXM2 trace (github.com/engpap/montecarlo-benchmarking), heading included.
GPU_TRACE = (
    "   Start  Duration            Grid Size      Block Size     Regs*    SSMem*    DSMem*  "
    "         Device   Context    Stream        Unified Memory  Virtual Address  Name\n"
    "675.37ms         -                    -               -         -         -         -  "
    "              -         -         -         PC 0xd669e1c0   0x7f266e000000  [Unified Memory CPU page faults]\n"
    "1.16201s  4.6720us                    -               -         -         -         -  "
    "Tesla V100-SXM2         -         -            4.000000KB   0x7f266e200000  [Unified Memory Memcpy HtoD]\n"
    "1.16202s  11.872us                    -               -         -         -         -  "
    "Tesla V100-SXM2         -         -           60.000000KB   0x7f266e201000  [Unified Memory Memcpy HtoD]\n"
    "1.16204s  98.402us                    -               -         -         -         -  "
    "Tesla V100-SXM2         -         -                   114   0x7f266e300000  [Unified Memory GPU page faults]\n"
    "1.41979s  101.31us                    -               -         -         -         -  "
    "Tesla V100-SXM2         -         -            1.000000MB   0x7f266e400000  [Unified Memory Memcpy DtoH]\n"
)


def test_gpu_trace_lines_are_the_recorded_ones(make_run):
    trace = Trace()
    trace.span("UvmEventTypeMigration", "copy DtoH", 1419790, 1419891.31, va=0x7F266E400000, bytes=MIB)
    trace.span("UvmEventTypeGpuFault", "gpu", 1162040, 1162138.402, va=0x7F266E300000, value=114, cause="read")
    trace.span("UvmEventTypeMigration", "copy HtoD", 1162020, 1162031.872, va=0x7F266E201000, bytes=60 * KIB)
    trace.span("UvmEventTypeMigration", "copy HtoD", 1162010, 1162014.672, va=0x7F266E200000, bytes=4 * KIB)
    trace.span("UvmEventTypeCpuFault", "cpu", 675370, 675370, va=0x7F266E000000, value=0x7F26D669E1C0)
    assert table(make_run(trace, device="Tesla V100-SXM2-16GB"), "gpu_trace").to_text() == GPU_TRACE


def test_gpu_trace_lists_kernels_with_their_launch(make_run):
    trace = Trace()
    trace.span("kernel", "gpu", 670110, 672834.1, cause="rngSetupStates(int*)")
    run = make_run(trace, device="Tesla V100-SXM2-16GB", grid=3200, block=256)
    line = table(run, "gpu_trace").to_text().splitlines()[1]
    assert line.startswith("670.11ms  2.7241ms           (3200 1 1)       (256 1 1)         -        0B        0B")
    assert line.endswith("         1         7                     -                -  rngSetupStates(int*) [1]")
