"""Reading recorded access traces: against hand-counted lines, a plain parser and damaged files."""

from __future__ import annotations

import contextlib
import gzip
import random
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kit.flows.cuda_demand_paging.traces as traces
from kit.errors import TraceFileError
from kit.flows.cuda_demand_paging.traces import AccessTrace, read_trace, shipped_trace, write_trace

NOISE = "==4711== Lackey, an example Valgrind tool\n==4711== \n"


def stream(trace: AccessTrace) -> list[tuple[int, bool]]:
    return list(zip(trace.vpn[trace.index].tolist(), trace.write.tolist(), strict=True))


def plain_reader(text: str, instructions: bool = False) -> list[tuple[int, bool]]:
    """The same rules, one line at a time."""
    out: list[tuple[int, bool]] = []
    for line in text.splitlines():
        if line[:3] in (" L ", " S ", " M ") or (instructions and line.startswith("I  ")):
            address, size = line[3:].split(",")
            first, last = int(address, 16) >> 12, (int(address, 16) + int(size) - 1) >> 12
            for page in range(first, last + 1):
                touch = (page, line[1] in "SM")
                if not out or out[-1] != touch:
                    out.append(touch)
    return out


def saved(folder: Path, text: str, name: str = "trace.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_hand_counted_lines(tmp_path: Path) -> None:
    text = (
        NOISE
        + "I  04001000,3\n"
        + " L 1ffefff7e0,8\n"  # page 0x1ffefff, load
        + " L 1ffefff7e8,8\n"  # again: folded
        + " S 1ffefff7e0,8\n"  # another kind: kept
        + " M 00005ffc,8\n"  # crosses from page 5 to page 6: both
        + " L 00006000,4\n"  # load after a modify of the same page: kept
        + "reached 5 nodes\n"
    )
    trace = read_trace(saved(tmp_path, text))
    assert stream(trace) == [(0x1FFEFFF, False), (0x1FFEFFF, True), (5, True), (6, True), (6, False)]
    assert trace.vpn.tolist() == [5, 6, 0x1FFEFFF]
    assert (trace.vpn.dtype, trace.index.dtype, trace.write.dtype) == (np.int64, np.int32, np.bool_)
    assert len(trace) == 5 and trace.pages == 3


def test_instruction_fetches_only_on_request(tmp_path: Path) -> None:
    path = saved(tmp_path, "I  00001000,3\n S 00002000,1\nI  00001003,3\n")
    assert stream(read_trace(path)) == [(2, True)]
    assert stream(read_trace(path, instructions=True)) == [(1, False), (2, True), (1, False)]


def test_kernel_half_addresses_and_line_ends(tmp_path: Path) -> None:
    path = saved(tmp_path, " L ffffffffff600000,8\r\n S 0,1")
    assert stream(read_trace(path)) == [(0xFFFFFFFFFF600, False), (0, True)]


lines = st.one_of(
    st.tuples(st.sampled_from("LSM"), st.integers(0, 2**48), st.integers(1, 512)).map(
        lambda t: f" {t[0]} {t[1]:08x},{t[2]}"
    ),
    st.tuples(st.integers(0, 2**48), st.integers(1, 15)).map(lambda t: f"I  {t[0]:08x},{t[1]}"),
    st.sampled_from(["==1== x", "", "Load 7", " L", "I", "S 10,4"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=60), st.booleans(), st.sampled_from([1 << 24, 64, 200]))
def test_agrees_with_a_plain_reader(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], fetches: bool, chunk: int
) -> None:
    text = "\n".join(["==1== start", *rows, " S 00001000,8"]) + "\n"
    path = saved(tmp_path_factory.mktemp("text"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "CHUNK", chunk)
        assert stream(read_trace(path, instructions=fetches)) == plain_reader(text, fetches)


def test_gzip_is_seen_by_content(tmp_path: Path) -> None:
    text = NOISE + " L 00001000,8\n S 00003000,8\n"
    path = tmp_path / "trace.log"
    path.write_bytes(gzip.compress(text.encode()))
    assert stream(read_trace(path)) == plain_reader(text)


def test_a_real_recording_of_valgrind(tmp_path: Path) -> None:
    log = tmp_path / "true.txt"
    command = ["valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-file={log}", "/bin/true"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    trace = read_trace(log)
    assert stream(trace) == plain_reader(log.read_text())
    assert 10 < trace.pages < len(trace)


def test_at_least_a_million_lines_a_second(tmp_path: Path) -> None:
    rng = random.Random(1)
    block = "".join(
        f" {rng.choice('LSM')} {rng.randrange(2**37):08x},{rng.choice((1, 4, 8, 16))}\n" for _ in range(50_000)
    )
    path = saved(tmp_path, block * 20)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        read_trace(path)
        took.append(time.perf_counter() - start)
    assert 1_000_000 / min(took) > 1e6


def test_round_trip_is_atomic_and_repeats_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = read_trace(saved(tmp_path, " L 00001000,8\n S 00003000,8\n L 00001000,8\n"))
    target = tmp_path / "small.npz"
    write_trace(trace, target)
    first = target.read_bytes()
    write_trace(trace, target)
    assert target.read_bytes() == first
    back = read_trace(target)
    assert stream(back) == stream(trace) and back.vpn.tolist() == [1, 3]

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(traces.np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"):
        write_trace(trace, target)
    assert target.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".draft")] == []


def test_first_keeps_only_the_pages_it_uses(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, " L 00005000,8\n S 00003000,8\n L 00001000,8\n"))
    assert stream(trace.first(2)) == [(5, False), (3, True)]
    assert trace.first(2).vpn.tolist() == [3, 5]
    assert trace.first(99) is trace


def test_shipped_trace_is_the_recording_that_its_readme_describes() -> None:
    path = shipped_trace()
    trace = read_trace(path)
    text = path.with_name("README.md").read_text()
    assert f"{len(trace):,} records over {trace.pages} pages" in text
    assert f"{trace.write.mean():.0%}".replace("%", " %") in text
    assert path.stat().st_size < 300_000
    assert path.with_suffix(".c").exists()


def arrays(**change: object) -> dict[str, np.ndarray]:
    good = {"vpn": np.array([1, 5], np.uint64), "index": np.array([0, 1, 0]), "write": np.array([True, False, True])}
    return {name: np.asarray(value) for name, value in {**good, **change}.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vpn": None}, "missing: vpn"),
        ({"write": None, "index": None}, "missing: index, write"),
        ({"index": [0, 2, 0]}, "found 0 to 2"),
        ({"index": [0, -1, 0]}, "found -1 to 0"),
        ({"index": [0.0, 1.0, 0.0]}, "index as one row of whole numbers"),
        ({"write": [1, 0, 1]}, "write as one row of booleans"),
        ({"write": [True]}, "of one length"),
        ({"index": [[0], [1], [0]]}, "shape (3, 1)"),
        ({"index": np.zeros(0, np.int32), "write": np.zeros(0, bool)}, "at least one record"),
        ({"vpn": [5, 1]}, "ascend"),
        ({"vpn": [5, 5]}, "ascend"),
        ({"vpn": [-1, 5]}, "from 0"),
        ({"vpn": np.array([1, 2**52], np.uint64)}, "2**52"),
        ({"vpn": np.zeros(0, np.int64)}, "ascend"),
    ],
)
def test_arrays_that_make_no_trace(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays(**change))
    with pytest.raises(TraceFileError) as caught:
        read_trace(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert caught.value.name == "trace_file" and caught.value.value == str(path)


@pytest.mark.parametrize("kept", [3, 10, 60, 200, 400, 560])
def test_truncated_npz(tmp_path: Path, kept: int) -> None:
    whole = tmp_path / "whole.npz"
    np.savez_compressed(whole, **arrays())
    data = whole.read_bytes()
    assert kept < len(data)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(data[:kept])
    with pytest.raises(TraceFileError):
        read_trace(cut)


@pytest.mark.parametrize(("field", "value"), [(8, 1), (8, 32), (8, 64), (10, 99)], ids=str)
@pytest.mark.parametrize("array", [0, 1, 2])
def test_a_directory_that_asks_for_what_cannot_be_read(tmp_path: Path, array: int, field: int, value: int) -> None:
    """Flags of the zip directory (8: encrypted, patched, strongly encrypted) and its compression method (10)."""
    path = tmp_path / "asks.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(array + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    data[at + field] = value
    path.write_bytes(bytes(data))
    with pytest.raises(TraceFileError, match=r"a whole \.npz file"):
        read_trace(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, where: int, what: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "flip.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    data[where % len(data)] = what
    path.write_bytes(bytes(data))
    with contextlib.suppress(TraceFileError):
        read_trace(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, **arrays(vpn=np.array([{}, {}], dtype=object)))
    with pytest.raises(TraceFileError, match="plain arrays"):
        read_trace(path)


def test_a_single_array_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(TraceFileError, match="single array"):
        read_trace(path)


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    saved(tmp_path, " L 1000,8\n", "sqlite.txt")
    with pytest.raises(TraceFileError, match=r"Did you mean .sqlite\.txt."):
        read_trace(tmp_path / "sqlit.txt")
    with pytest.raises(TraceFileError, match="No such file"):
        read_trace(tmp_path / "nowhere" / "x.npz")
    with pytest.raises(TraceFileError, match="can be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (NOISE, "L, S or M lines"),
        ("I  00001000,3\n", "L, S or M lines"),
        (" L 00001000,8\n L zz,8\n", "line 2 is ' L zz,8'"),
        (NOISE + " S 00001000\n", "line 3"),
        (" L 00001000,8\n L 0000", "line 2"),
        (" L 00001000,0\n", "line 1 is ' L 00001000,0'. Keep"),
        (" L 00001000,99999\n", "line 1"),
        (" L 00001000,8 \n", "line 1"),
        (" L 12345678901234567,8\n", "line 1"),
        (" L fffffffffffffff8,8\n S fffffffffffffffe,8\n", "line 2 is ' S fffffffffffffffe,8': its access runs past"),
    ],
)
def test_text_that_makes_no_trace(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceFileError) as caught:
        read_trace(saved(tmp_path, text))
    assert says in str(caught.value)


def test_cut_gzip_and_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b" L 00001000,8\n" * 5000)[:40])
    with pytest.raises(TraceFileError, match="whole text"):
        read_trace(cut)
    monkeypatch.setattr(traces, "CHUNK", 64)
    with pytest.raises(TraceFileError, match="no line ends"):
        read_trace(saved(tmp_path, "x" * 1000))


HEAD = b"\x93NUMPY\x01\x00"
LONG = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }\n"


@pytest.mark.parametrize(
    "member",
    [b"hello", HEAD + struct.pack("<H", 20) + b"{'descr': ((((((((((", HEAD + struct.pack("<H", len(LONG)) + LONG],
    ids=["no array", "a head that is not Python", "more rows than there is memory"],
)
def test_an_npz_whose_members_are_no_arrays(tmp_path: Path, member: bytes) -> None:
    file = tmp_path / "odd.npz"
    with zipfile.ZipFile(file, "w") as archive:
        for name in traces.ARRAYS:
            archive.writestr(f"{name}.npy" if member.startswith(HEAD) else name, member)
    with pytest.raises(TraceFileError, match=r"a whole \.npz file of plain arrays"):
        read_trace(file)
