"""What was compiled, and whether it is still what the sources say.

`kit.native.build` compiles the rooms through which every fault goes, and leaves beside what it makes the check sum of
the text that it was made from. One edited source, and all modules are read from their sources again: nobody has to
wait for a compiler to try a change, and none can be missed. ``KIT_COMPILED=0`` has them read from the sources anyway.
"""

from __future__ import annotations

import json
import os
import zlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["COMPILED", "MANIFEST", "PACKAGE", "fingerprint", "modules", "sources", "unwanted"]

PACKAGE = Path(__file__).resolve().parent.parent
MANIFEST = "compiled.json"
# One folder for each Python: what is compiled for one does not load into another.
COMPILED = PACKAGE / "native" / ("compiled" + EXTENSION_SUFFIXES[0].rpartition(".")[0])
# What is compiled, and what that looks at while it is: another text there makes another compiled module.
READ = ("errors.py", "sim/*.py", "memory/**/*.py", "drivers/uvm/*.py", "native/*.py", "native/*.c")


def sources() -> list[Path]:
    """Return every file that the compiled modules depend on, ascending."""
    return sorted(found for pattern in READ for found in PACKAGE.glob(pattern))


def fingerprint() -> int:
    """Return a check sum of the names and the text of `sources`."""
    found = 0
    for source in sources():
        found = zlib.crc32(source.read_bytes(), zlib.crc32(str(source.relative_to(PACKAGE)).encode(), found))
    return found


def unwanted() -> bool:
    """Whether the environment says that sources are to be run whatever is compiled."""
    return os.environ.get("KIT_COMPILED") == "0"


@cache
def modules() -> dict[str, Path]:
    """Return the files of the compiled modules by their names: none where they are not wanted or out of date."""
    if unwanted():
        return {}
    try:
        said = json.loads((COMPILED / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if said["fingerprint"] != fingerprint():
        return {}
    return {name: COMPILED / file for name, file in said["modules"].items()}
