"""The project as a whole: lint, types, packaging, dependencies, floors, import time."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import kit

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**kept, **environment}, check=False)


def test_ruff_finds_nothing() -> None:
    found = run(sys.executable, "-m", "ruff", "check", ".")
    assert found.returncode == 0, found.stdout + found.stderr


def test_mypy_finds_nothing() -> None:
    found = run(sys.executable, "-m", "mypy")
    assert found.returncode == 0, found.stdout + found.stderr


def conda_lines() -> list[str]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    return [line for line in listed if isinstance(line, str)]


def test_environment_yml_lists_the_dependencies() -> None:
    conda = {Requirement(line) for line in conda_lines() if line not in ("pip",) and not line.startswith("python>")}
    assert conda == set(DEPENDENCIES)
    assert f"python{PROJECT['requires-python']}" in conda_lines()


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *EXTRAS], ids=str)
def test_what_is_installed_satisfies_the_requirement(requirement: Requirement) -> None:
    assert importlib.metadata.version(requirement.name) in requirement.specifier
    assert [each.operator for each in requirement.specifier] == [">="], "lower bounds only"


def test_constraints_are_plain_and_cover_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pinned) == len(lines)
    for requirement in [*DEPENDENCIES, *EXTRAS]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_cover_what_the_pinned_packages_need() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    needed: set[str] = set()
    for name, version in pinned.items():
        try:
            if importlib.metadata.version(name) != version:
                continue  # another version, in an environment of another making, may need other packages
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(requirement.name))
    assert needed - set(pinned) <= {"pip"}  # every virtual environment brings its own


def test_what_is_pinned_runs_on_every_python_that_the_project_runs_on() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    refused = []
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        name, _, version = line.partition("==")
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told = importlib.metadata.metadata(name)
            if told["Version"] == version and oldest not in SpecifierSet(told["Requires-Python"] or ""):
                refused.append(f"{line} needs Python {told['Requires-Python']}")
    assert refused == []


def test_the_public_face_is_what_it_says() -> None:
    assert kit.__all__ == ["__version__", "explore", "flows", "machines", "open", "run", "scenarios"]
    assert all(hasattr(kit, name) for name in kit.__all__)
    assert list(kit.flows()) == list(kit.flows.registry.ENTRIES), "kit.flows is a package and can be called"


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import kit; print(time.perf_counter() - t);"
        "print([m for m in ('matplotlib', 'pandas', 'ipywidgets', 'networkx', 'pydantic', 'simpy', 'yaml') if m in sys.modules])"
    )
    seen = [run(sys.executable, "-c", code).stdout.splitlines() for _ in range(3)]
    assert [lines[1] for lines in seen] == ["[]"] * 3
    assert min(float(lines[0]) for lines in seen) < 0.3


# The house: a room may only look down. Rooms that are not listed stand on the roof (command line) or in the ground.
FLOORS = {"sim": 1, "memory": 2, "drivers": 3, "flows": 4, "report": 5, "lab": 6, "batch": 6, "native": 6}
GROUND = {"kit.errors", "kit.paths"}


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """Yield what a module imports when it is itself imported: not for types, not inside functions."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Try):
            yield from imports(statement.body)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_only_looks_down(room: str) -> None:
    for file in (ROOT / "kit" / room).rglob("*.py"):
        for name in imports(ast.parse(file.read_text("utf-8")).body):
            words = name.split(".")
            if words[0] == "kit" and ".".join(words[:2]) not in GROUND and len(words) > 1 and words[1] in FLOORS:
                assert FLOORS[words[1]] <= FLOORS[room], f"{file.relative_to(ROOT)} imports {name}"


def test_a_wheel_carries_notebooks_and_scenarios(tmp_path: Path) -> None:
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("farfault_kit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))], "for one Python only"
        archive.extractall(tmp_path / "installed")
    for folder in ("notebooks", "scenarios"):
        there = {
            str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*") if f.suffix in (".ipynb", ".yaml", ".json")
        }
        there = {name for name in there if ".ipynb_checkpoints" not in name}
        base = tmp_path / "installed" / "kit" / "_data"
        assert there <= {str(f.relative_to(base)) for f in (base / folder).rglob("*")}
    code = "import kit, kit.paths; print(kit.__file__, kit.paths.root(), sep='\\n')"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert found.stdout.splitlines() == [
        str(tmp_path / "installed" / "kit" / "__init__.py"),
        str(tmp_path / "installed" / "kit" / "_data"),
    ]


@pytest.mark.parametrize("target", ["run", "test", "lab", "bench"])
def test_make_installs_only_when_the_lists_have_changed(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".installed"
    stamp.touch()
    assert "pip" not in run("make", "-n", target, cwd=tmp_path).stdout
    os.utime(stamp, (0, 0))
    assert "pip install" in run("make", "-n", target, cwd=tmp_path).stdout


def test_the_ci_script_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text("utf-8")
    assert script.read_text("utf-8").rstrip().endswith("make test")
