"""Modules that have a form of their own for the compiler: both are tested alike."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from kit.native.compiled import PACKAGE

__all__ = ["read"]


def read(file: str) -> ModuleType:
    """Return a module as its source has it, whatever is compiled."""
    spec = spec_from_file_location("read", PACKAGE / file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
