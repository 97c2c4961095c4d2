"""Compile the rooms through which every fault goes, with mypyc: ``kit compile``.

The same typed Python, as machine code: results are the same to the last byte, in about a third of the time. It takes a
C compiler and two minutes. What is compiled must mean what its types say, and page numbers are shifted there, never
multiplied: where a signal arrives in a product of integers above 2**31, mypyc's library ends the process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

from kit.errors import KitError
from kit.native import compiled
from kit.native.inline import inline_steps, plain_masks

__all__ = ["CompileError", "build", "check", "remove"]

# Packages by file: the engine and the trace, masks and content, and the whole CUDA driver.
MODULES = (
    "sim/columns.py", "sim/engine.py", "sim/locks.py", "sim/log.py", "sim/trace.py",
    "memory/table/pagemask.py", "memory/physical/content.py",
    "memory/space/vm_insert.py", "native/words.py",
    "drivers/uvm/*.py",
)  # fmt: skip
# What has a form of its own for the compiler, in this room.
FORMS = {"log.py": "sim/log.py", "pagemask.py": "memory/table/pagemask.py"}
# What is written in C, by the module in whose place it stands.
IN_C = {"kit.memory.columns": "kit/native/columns.c"}
# What is only looked at is not checked: nobody needs the stubs of packages that the tests need.
SETUP = """
import json, sys
import numpy
from mypyc.build import mypycify
from setuptools import Extension, setup
to, in_c, *files = sys.argv[1:]
made = mypycify(["--follow-imports=silent", *files], opt_level="3", debug_level="0")
for name, file in json.loads(in_c).items():
    made.append(Extension(name, [file], include_dirs=[numpy.get_include()], extra_compile_args=["-O3"]))
setup(
    name="kit", packages=[], ext_modules=made,
    script_args=["-q", "build_ext", "--build-lib", to, "--build-temp", "objects"],
)
"""


class CompileError(KitError):
    """The compiler said no."""


def check() -> None:
    """Raise `CompileError` where there is nothing to compile with."""
    if not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        raise CompileError("there is no C compiler (cc)")
    if not Path(get_path("include"), "Python.h").is_file():
        raise CompileError(f"there is no Python.h in {get_path('include')} (Debian has it in python3-dev)")
    missing = [name for name in ("mypyc", "setuptools") if find_spec(name) is None]
    if missing:
        raise CompileError(f"{' and '.join(missing)} must be installed: pip install 'farfault-kit[compile]'")


def build() -> int:
    """Compile, and put the modules where `kit.native.loader` finds them; return how many there are.

    Raises
    ------
    CompileError
        With what the compiler said; what was compiled before stays.
    """
    with tempfile.TemporaryDirectory() as folder:
        there, made, text = Path(folder), Path(folder, "made"), compiled.fingerprint()
        shutil.copytree(compiled.PACKAGE, there / "kit", ignore=shutil.ignore_patterns(compiled.COMPILED.name))
        for form, place in FORMS.items():
            shutil.copy(there / "kit/native" / form, there / "kit" / place)
        files = [file for pattern in MODULES for file in sorted((there / "kit").glob(pattern))]
        files = [file for file in files if file.name != "__init__.py"]
        numbers: dict[str, int] = {}
        for file in files:
            file.write_text(inline_steps(plain_masks(file.read_text("utf-8")), numbers), "utf-8")
        names = [str(file.relative_to(there)) for file in files]
        command = [sys.executable, "-c", SETUP, str(made), json.dumps(IN_C), *names]
        # Hidden, a function cannot be another library's: calls within this one are direct, or written out.
        flags = {"CFLAGS": f"{os.environ.get('CFLAGS', '')} -fvisibility=hidden"}
        done = subprocess.run(command, cwd=there, env={**os.environ, **flags}, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"the modules cannot be compiled: {(done.stdout + done.stderr).strip()[-2000:]}")
        found = {_module(file.relative_to(made)): str(file.relative_to(made)) for file in sorted(made.rglob("*.*"))}
        said = {"fingerprint": text, "modules": found}
        (made / compiled.MANIFEST).write_text(json.dumps(said, indent=1), "utf-8")
        remove()
        shutil.move(made, compiled.COMPILED)
    return len(files)


def remove() -> None:
    """Delete what was compiled for this Python."""
    shutil.rmtree(compiled.COMPILED, ignore_errors=True)


def _module(file: Path) -> str:
    return ".".join([*file.parts[:-1], file.name.partition(".")[0]])
