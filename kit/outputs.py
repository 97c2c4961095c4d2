"""Files that appear whole or not at all, and a progress line."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self, TextIO

from kit.errors import ParameterError

__all__ = ["STDOUT", "ProgressLine", "check_folder", "check_targets", "publish", "staged"]

STDOUT = "-"


def check_targets(targets: Mapping[str, str], piped: tuple[str, ...] = ()) -> None:
    """Raise `ParameterError` unless every output can be written; nothing is written.

    Parameters
    ----------
    targets : mapping of str to str
        Path by option; ``-`` is the standard output.
    piped : tuple of str
        Options that may name the standard output.
    """
    seen: dict[Path, str] = {}
    for option, target in targets.items():
        if target == STDOUT:
            if option not in piped:
                raise ParameterError(option, target, "a file (only " + " and ".join(piped) + " may be -)")
            path = Path(STDOUT)
        else:
            path = Path(target).resolve()
            _check_file(option, target, Path(target))
        if path in seen:
            raise ParameterError(option, target, f"another file than that of {seen[path]}")
        seen[path] = option


def _check_file(option: str, given: str, path: Path) -> None:
    if not given or path.is_dir():
        raise ParameterError(option, given, "a file, not a folder")
    if path.exists() and not path.is_file():
        return  # a device or a pipe is written to, never replaced
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ParameterError(option, given, "a file in a folder that exists and may be written")


def check_folder(option: str, given: str) -> Path:
    """Return `given` as a folder that exists or can be made; nothing is made yet."""
    path = Path(given)
    nearest = path.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not given or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ParameterError(option, given, "a folder that exists, or can be made, and may be written")
    return path


def publish(writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Call each writer with a temporary path; when all have succeeded, put the files in their places.

    Parameters
    ----------
    writers : mapping of str to callable
        Writer by target path; ``-`` is the standard output.
    """
    with ExitStack() as stack:
        made: list[tuple[Path, str]] = []
        for target, write in writers.items():
            special = target == STDOUT or (Path(target).exists() and not Path(target).is_file())
            place = None if special else Path(target).resolve().parent
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".kit-", dir=place)))
            file = folder / (Path(target).name if target != STDOUT else "stdout")
            write(file)
            made.append((file, target))
        for file, target in made:
            _put(file, target)


def _put(file: Path, target: str) -> None:
    if target == STDOUT:
        sys.stdout.write(file.read_text("utf-8"))
    elif Path(target).exists() and not Path(target).is_file():
        with file.open("rb") as source, Path(target).open("wb") as sink:
            shutil.copyfileobj(source, sink)
    else:
        file.replace(Path(target).resolve())


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a temporary folder inside `folder`, on its file system; it is gone afterwards.

    `folder` is made when it is missing, and removed again when nothing was put into it.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".building-", dir=folder) as building:
            yield Path(building)
    finally:
        for each in missing:
            if any(each.iterdir()):
                break
            each.rmdir()


class ProgressLine:
    """One line on a terminal that says how far a run is; silent where there is no terminal.

    Parameters
    ----------
    stream : text file, optional
        Where to write; the standard error when left out.
    quiet : bool
        Write nothing at all.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty() and not quiet
        self._last = 0.0

    def __call__(self, share: float, text: str = "") -> None:
        """Show `share` (0 to 1) and `text`, at most ten times a second."""
        now = time.monotonic()
        if self.shown and (now - self._last > 0.1 or share >= 1):
            self._last = now
            self.stream.write(f"\r\x1b[K{share:4.0%} {text}")
            self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
