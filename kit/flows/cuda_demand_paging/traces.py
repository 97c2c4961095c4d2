"""Recorded access traces: read what valgrind's lackey tool prints, keep them as small ``.npz`` files.

A trace is the order in which a real program touched its 4 KiB pages. Consecutive touches of one
page of one kind are one record, since only the first of them can fault.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kit.errors import TraceFileError, did_you_mean
from kit.flows.cuda_demand_paging.lackey import MalformedLine, parse_lines

__all__ = ["AccessTrace", "fold", "read_trace", "shipped_trace", "write_trace"]

ARRAYS = ("vpn", "index", "write")
CHUNK = 1 << 24
_PAGE_NUMBERS = 1 << 52
# What a damaged .npz raises; a RuntimeError where its directory asks for a password, or for what zipfile cannot do; a
# TokenError where an array's head is not Python; a MemoryError where it promises more than there is room for.
_BROKEN = (zipfile.BadZipFile, EOFError, ValueError, KeyError, zlib.error, RuntimeError, TokenError, MemoryError)


@dataclass(frozen=True, eq=False)
class AccessTrace:
    """The page touches of one program, in order.

    Attributes
    ----------
    vpn : ndarray of int64, shape (pages,)
        The distinct virtual page numbers (4 KiB), ascending.
    index : ndarray of int32, shape (records,)
        Position in `vpn` of each touch.
    write : ndarray of bool, shape (records,)
        Whether the touch stores; a modify (load and store by one instruction) does.
    """

    vpn: NDArray[np.int64]
    index: NDArray[np.int32]
    write: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def pages(self) -> int:
        """Number of distinct pages."""
        return len(self.vpn)

    def first(self, records: int) -> AccessTrace:
        """Return the trace of the first `records` touches, over the pages that these use."""
        if records >= len(self):
            return self
        return _of_stream(self.vpn[self.index[:records]], self.write[:records])


def shipped_trace() -> Path:
    """Return the path of the recorded trace that comes with the kit."""
    return Path(__file__).with_name("data") / "graph_walk.npz"


def read_trace(path: str | os.PathLike[str], *, instructions: bool = False) -> AccessTrace:
    """Read a recorded access trace.

    Parameters
    ----------
    path : path
        An ``.npz`` file with the arrays of `AccessTrace`, or the text that
        ``valgrind --tool=lackey --trace-mem=yes`` prints, gzipped or not. The content decides.
    instructions : bool
        Count the instruction fetches of a text as loads instead of leaving them out.

    Raises
    ------
    TraceFileError
        The file is missing, cut off, no trace, or holds arrays that contradict each other.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as wrong:
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, siblings) if isinstance(wrong, FileNotFoundError) else ""
        raise _refuse(file, f"a file that can be read ({wrong.strerror})", hint) from None
    if not magic:
        raise _refuse(file, "a trace with at least one load or store; this file is empty")
    if magic.startswith(b"PK") or file.suffix == ".npz":
        return _read_npz(file)
    return _read_text(file, magic.startswith(b"\x1f\x8b"), instructions)


def write_trace(trace: AccessTrace, path: str | os.PathLike[str]) -> None:
    """Write `trace` as a compressed ``.npz``; `path` holds the old content or the new, never a part.

    The same trace gives the same bytes.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        with draft.open("xb") as stream:
            np.savez_compressed(stream, vpn=trace.vpn, index=trace.index, write=trace.write)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def fold(pages: NDArray[np.int64], write: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Drop every touch that repeats the page and the kind of the one before it."""
    keep = np.ones(len(pages), dtype=np.bool_)
    np.not_equal(pages[1:], pages[:-1], out=keep[1:])
    keep[1:] |= write[1:] != write[:-1]
    return pages[keep], write[keep]


def _of_stream(pages: NDArray[np.int64], write: NDArray[np.bool_]) -> AccessTrace:
    vpn, index = np.unique(pages, return_inverse=True)
    return AccessTrace(vpn, index.astype(np.int32), write)


def _refuse(file: Path, allowed: str, hint: str = "") -> TraceFileError:
    return TraceFileError("trace_file", str(file), allowed, hint)


# -- .npz


def _read_npz(file: Path) -> AccessTrace:
    try:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise _refuse(file, "an .npz file with the arrays vpn, index and write; this is a single array")
        with found:
            missing = [name for name in ARRAYS if name not in found.files]
            if missing:
                raise _refuse(file, "an .npz file with the arrays vpn, index and write; missing: " + ", ".join(missing))
            vpn, index, write = (found[name] for name in ARRAYS)
    except TraceFileError:
        raise
    except (*_BROKEN, OSError) as wrong:
        raise _refuse(file, f"a whole .npz file of plain arrays ({wrong})") from None
    _check_arrays(file, vpn, index, write)
    return AccessTrace(vpn.astype(np.int64), index.astype(np.int32), write)


def _check_arrays(file: Path, vpn: NDArray[Any], index: NDArray[Any], write: NDArray[Any]) -> None:
    for name, array in zip(ARRAYS, (vpn, index, write), strict=True):
        kinds = "b" if name == "write" else "iu"
        if not isinstance(array, np.ndarray):  # numpy hands out what has not an array's head as it is
            raise _refuse(file, f"a whole .npz file of plain arrays; {name} is none")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            wanted = "booleans" if name == "write" else "whole numbers"
            raise _refuse(file, f"{name} as one row of {wanted}, not shape {array.shape} of {array.dtype}")
    if len(index) == 0:
        raise _refuse(file, "a trace with at least one record; index is empty")
    if len(index) != len(write):
        raise _refuse(file, f"index and write of one length, not {len(index)} and {len(write)}")
    if len(vpn) == 0 or int(vpn[0]) < 0 or int(vpn[-1]) >= _PAGE_NUMBERS or bool((vpn[1:] <= vpn[:-1]).any()):
        raise _refuse(file, "vpn as page numbers from 0 to 2**52 - 1 that ascend without repeats")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= len(vpn):
        raise _refuse(file, f"index from 0 to {len(vpn) - 1}, the positions in vpn; found {low} to {high}")


# -- the text of lackey


def _read_text(file: Path, gzipped: bool, instructions: bool) -> AccessTrace:
    pages: list[NDArray[np.int64]] = []
    kinds: list[NDArray[np.bool_]] = []
    lines = 0
    try:
        with gzip.open(file, "rb") if gzipped else file.open("rb") as stream:
            for chunk in _whole_lines(stream):
                page, write, count = parse_lines(chunk, instructions)
                page, write = fold(page, write)
                pages.append(page)
                kinds.append(write)
                lines += count
    except MalformedLine as wrong:
        text = f"lines like ' L 1ffefff7e0,8'; line {lines + wrong.line} is {wrong.text!r}"
        hint = " Keep the program's own output apart with --log-file."
        raise _refuse(file, text + (f": {wrong.why}" if wrong.why else ""), "" if wrong.why else hint) from None
    except (EOFError, ValueError, OSError, zlib.error) as wrong:
        raise _refuse(
            file, f"a whole text of valgrind --tool=lackey --trace-mem=yes, gzipped or not ({wrong})"
        ) from None
    if not any(map(len, pages)):
        raise _refuse(file, "a text with L, S or M lines, as valgrind --tool=lackey --trace-mem=yes prints it")
    return _of_stream(*fold(np.concatenate(pages), np.concatenate(kinds)))


def _whole_lines(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """Yield the stream in pieces of about `CHUNK` bytes that end with a line."""
    rest = b""
    while piece := stream.read(CHUNK):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield rest + piece[:cut]
            rest = piece[cut:]
        elif len(rest) < CHUNK:
            rest += piece
        else:
            raise ValueError(f"no line ends within {CHUNK} bytes")
    if rest:
        yield rest + b"\n"
