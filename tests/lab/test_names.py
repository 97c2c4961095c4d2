"""A package's public names last: no submodule, imported later, takes their place."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from ipywidgets import Widget
from synthetic import sequential_run

import kit
import kit.lab

ROOT = Path(kit.__file__).parent


def submodules(folder: Path) -> set[str]:
    found = {each.stem for each in folder.glob("*.py")} | {each.parent.name for each in folder.glob("*/__init__.py")}
    return found - {"__init__"}


def defined(package: Path, name: str) -> set[str]:
    """Return what a package's ``__init__`` defines, or imports from elsewhere than the package itself."""
    names: set[str] = set()
    for each in ast.walk(ast.parse(package.read_text("utf-8"))):
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            names.add(each.name)
        elif isinstance(each, ast.ImportFrom) and each.module != name:
            names |= {alias.asname or alias.name for alias in each.names}
    return names


@pytest.mark.parametrize("package", sorted(ROOT.rglob("__init__.py")), ids=lambda each: each.parent.name)
def test_no_submodule_takes_the_place_of_what_its_package_defines(package: Path) -> None:
    own = ".".join(("kit", *package.parent.relative_to(ROOT).parts))
    for name in defined(package, own) & submodules(package.parent):
        import_module(f"{own}.{name}")
        assert not isinstance(getattr(import_module(own), name), ModuleType), f"{own}.{name}"


def test_the_controls_can_be_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.lab, "interactive", lambda: True)
    monkeypatch.setattr("kit.lab.panel.Panel._show", lambda panel: None)
    run = sequential_run()
    assert all(isinstance(kit.lab.controls(run), Widget) for _again in range(2))
