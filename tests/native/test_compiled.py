"""Compiled modules: the same results, used only while they are what the sources say, made whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import cli
from kit.native import build, compiled
from kit.native.build import CompileError
from kit.native.loader import _Finder

# Every scenario of the flow whose driver is compiled, with jitter where it has none, and the default of the others.
RUNS = """
import hashlib, sys
import kit
from kit.drivers.uvm import pmm_gpu

print("compiled" if not pmm_gpu.__file__.endswith(".py") else "read")
for flow in kit.flows():
    for scenario in kit.scenarios(flow) if flow == "cuda_demand_paging" else ["default"]:
        for jitter in (0.0, 0.1) if flow == "cuda_demand_paging" else (0.0,):
            run = kit.run(flow, scenario, **({"jitter": jitter, "seed": 7} if jitter else {}))
            told = run.to_json().encode(), run.trace.spans.array().tobytes(), run.trace.moves.array().tobytes()
            print(flow, scenario, jitter, len(run.trace.spans), *(hashlib.sha256(each).hexdigest() for each in told))
"""


def results(**environment: str) -> list[str]:
    given = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", RUNS], capture_output=True, text=True, env=given, check=True)
    return done.stdout.splitlines()


def test_results_are_the_same_to_the_last_byte() -> None:
    try:
        build.check()
    except CompileError:
        assert not compiled.modules()
    else:
        if not compiled.modules():  # an edited source: `make test` has compiled before
            build.build()
    first, *found = results(KIT_COMPILED="1")
    second, *wanted = results(KIT_COMPILED="0")
    assert (first, second) == ("compiled" if compiled.COMPILED.is_dir() else "read", "read")
    assert len(wanted) > 60
    assert found == wanted


# Runs that are stopped at any moment, as Ctrl-C and a notebook's stop button do.
STOPPED = """
import random, signal, sys, time
import kit

class Stopped(Exception):
    pass

def stop(*_):
    raise Stopped

signal.signal(signal.SIGALRM, stop)
short = dict(program="stream", buffer_bytes=16 << 20)
runs = [dict(short, lanes=1), short, dict(short, pattern="random", touches=2000, oversubscription=1.25)]
draw, stopped, end = random.Random(1), 0, time.monotonic() + 6
while time.monotonic() < end:
    try:
        flow = kit.open("cuda_demand_paging", **draw.choice(runs))
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, 0.03))
        flow.finish()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stopped:
        stopped += 1
print(stopped)
"""


def test_a_run_can_be_stopped_at_any_moment() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for compiled modules that is not the package's own."""
    monkeypatch.setattr(compiled, "COMPILED", tmp_path / "made")
    monkeypatch.delenv("KIT_COMPILED", raising=False)
    compiled.modules.cache_clear()
    yield tmp_path / "made"
    monkeypatch.undo()
    compiled.modules.cache_clear()


def put(made: Path, fingerprint: int) -> None:
    made.mkdir(exist_ok=True)
    told = {"fingerprint": fingerprint, "modules": {"kit.sim.engine": "kit/sim/engine.so", "ab12__mypyc": "ab12.so"}}
    (made / compiled.MANIFEST).write_text(json.dumps(told))
    compiled.modules.cache_clear()


def test_modules_are_found_while_the_sources_are_the_same(made: Path) -> None:
    put(made, compiled.fingerprint())
    assert compiled.modules() == {"kit.sim.engine": made / "kit/sim/engine.so", "ab12__mypyc": made / "ab12.so"}
    found = _Finder().find_spec("kit.sim.engine")
    assert found is not None and found.origin == str(made / "kit/sim/engine.so")
    assert _Finder().find_spec("ab12__mypyc") is not None
    assert [_Finder().find_spec(name) for name in ("kit.sim.steps", "kit.flows", "json", "kitten.sim.engine")] == [
        None
    ] * 4


def test_an_edited_source_has_all_of_them_read(made: Path) -> None:
    put(made, compiled.fingerprint() ^ 1)
    assert compiled.modules() == {}
    assert _Finder().find_spec("kit.sim.engine") is None


def test_the_environment_can_refuse_them(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(made, compiled.fingerprint())
    monkeypatch.setenv("KIT_COMPILED", "0")
    compiled.modules.cache_clear()
    assert compiled.modules() == {}


@pytest.mark.parametrize("text", [None, "", "{"], ids=["none", "empty", "cut off"])
def test_without_a_whole_manifest_there_are_none(made: Path, text: str | None) -> None:
    made.mkdir()
    if text is not None:
        (made / compiled.MANIFEST).write_text(text)
    assert compiled.modules() == {}


def test_the_fingerprint_sees_an_edit_a_new_file_and_a_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sim/engine.py", "drivers/uvm/types.py", "lab/panel.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("PAGE = 4096\n")
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    seen = [compiled.fingerprint()]
    (tmp_path / "lab/panel.py").write_text("PAGE = 1\n")  # nothing compiled looks at it
    assert compiled.fingerprint() == seen[0]
    (tmp_path / "sim/engine.py").write_text("PAGE = 8192\n")
    seen.append(compiled.fingerprint())
    (tmp_path / "sim/locks.py").write_text("")
    seen.append(compiled.fingerprint())
    (tmp_path / "sim/locks.py").rename(tmp_path / "sim/lock.py")
    assert len({*seen, compiled.fingerprint()}) == 4


# Instead of the compiler: says which files it was given, and leaves one for each.
FAKE = """
import json, sys
from pathlib import Path
to, in_c, *files = sys.argv[1:]
for name, source in json.loads(in_c).items():
    assert Path(source).is_file(), source
    files.append(name.replace(".", "/") + ".c")
for file in files:
    assert not file.endswith(".py") or "@step" not in Path(file).read_text() or "steps" in file, file
    Path(to, file).with_suffix(".so").parent.mkdir(parents=True, exist_ok=True)
    Path(to, file).with_suffix(".so").touch()
"""


def test_what_is_compiled_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SETUP", FAKE)
    count = build.build()
    compiled.modules.cache_clear()
    found = compiled.modules()
    assert len(found) == count + 1 > 40
    assert found["kit.memory.columns"] == made / "kit/memory/columns.so"
    assert found["kit.drivers.uvm.pmm_gpu"] == made / "kit/drivers/uvm/pmm_gpu.so"
    assert all(file.is_file() for file in found.values())
    build.remove()
    compiled.modules.cache_clear()
    assert compiled.modules() == {}


def test_a_compiler_that_fails_leaves_what_there_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(made, compiled.fingerprint())
    monkeypatch.setattr(build, "SETUP", "raise SystemExit('engine.py:12: error: no')")
    with pytest.raises(CompileError, match=r"engine\.py:12: error: no"):
        build.build()
    compiled.modules.cache_clear()
    assert list(compiled.modules()) == ["kit.sim.engine", "ab12__mypyc"]


def test_without_a_compiler(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert cli.main(["compile"]) == 1
    assert capsys.readouterr().err == "kit: error: there is no C compiler (cc)\n"
    assert cli.main(["compile", "--if-possible"]) == 0
    assert "the same results take twice the time: there is no C compiler" in capsys.readouterr().err
    assert not made.exists()


def test_without_headers(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CompileError, match=r"there is no Python\.h in .*python3-dev"):
        build.check()


def test_without_mypyc(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build, "get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"mypyc and setuptools must be installed: pip install"):
        build.check()


def test_the_command_compiles_once(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "SETUP", FAKE)
    monkeypatch.setattr(build, "check", lambda: None)
    assert cli.main(["compile", "--if-possible"]) == 0
    assert "modules compiled in" in capsys.readouterr().out
    compiled.modules.cache_clear()
    assert cli.main(["compile", "--if-possible"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["compile"]) == 0
    assert capsys.readouterr() == ("everything is compiled already\n", "")
    assert cli.main(["compile", "--remove"]) == 0
    assert not made.exists()
