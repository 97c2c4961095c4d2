"""Compiled modules are found in place of their sources."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from typing import Any

__all__ = ["install"]

ROOMS = ("sim", "memory", "drivers")  # those with compiled modules
WORDS = "native.words"  # what only a compiled form imports


class _Finder:
    """Where Python asks first."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        home, _, rest = fullname.partition(".")
        if not (home == "kit" and (rest.partition(".")[0] in ROOMS or rest == WORDS)) and not home.endswith("__mypyc"):
            return None
        from kit.native.compiled import modules

        file = modules().get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def install() -> None:
    """Have Python look for compiled modules from now on."""
    sys.meta_path.insert(0, _Finder())
