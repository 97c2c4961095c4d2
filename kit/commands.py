"""What each command of ``kit`` does."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import options as choices
from kit import paths
from kit.cli import EXPORTS, FAILED, FLOW_EXPORTS, OK
from kit.errors import ParameterError
from kit.flows import registry
from kit.outputs import STDOUT, ProgressLine, check_folder, check_targets, publish

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["COMMANDS"]


def _write(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def _list(options: Namespace) -> int:
    from kit.sim.machine import load_machine, machines

    flows = [(name, flow.title, list(paths.scenarios(name))) for name, flow in registry.flows().items()]
    if options.json:
        rows = [{"name": name, "title": title, "scenarios": scenarios} for name, title, scenarios in flows]
        known = [{"name": name, "title": load_machine(name).title} for name in machines()]
        _write(json.dumps({"flows": rows, "machines": known}, indent=1))
        return OK
    for name, title, scenarios in flows:
        _write(f"{name}: {title}")
        for scenario in scenarios:
            _write(f"  {scenario}")
    _write("machines:")
    wide = max(map(len, machines()), default=0)
    for name in machines():
        _write(f"  {name:<{wide}}  {load_machine(name).title}")
    return OK


def _given(options: Namespace) -> tuple[registry.Flow, str, dict[str, Any]]:
    """Return the flow, the scenario's name and what the arguments set, the last word being the options'."""
    flow = registry.entry(options.flow).load()
    model = flow.Parameters
    base = registry.read_scenario(Path(options.file)) if options.file else {}
    base = base or registry.load_scenario(options.flow, options.scenario)
    name = options.scenario or (Path(options.file).stem if options.file else "")
    return flow, name, {**base, **choices.given(model, options)}


def _count(found: object) -> int:
    return len(found) if isinstance(found, Sized) else int(str(found))


def _health(run: Run) -> list[str]:
    found = run.conformance
    reached, documented = _count(found.steps_reached), _count(found.steps_documented)
    return [
        f"documented steps: {reached} of {documented} reached, {_count(found.violations)} violations",
        f"page content: {run.integrity.pages_checked} pages checked, {run.integrity.lost} lost",
        *(f"error: {text}" for text in run.errors),
    ]


def _metrics(metrics: dict[str, float]) -> Iterable[str]:
    wide = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        yield f"{name:<{wide}}  {value:.6g}" if isinstance(value, float) else f"{name:<{wide}}  {value}"


def _export(run: Run, option: str, file: Path) -> None:
    if option == "--json":
        file.write_text(run.to_json(), "utf-8")
    elif option == "--events":
        from kit.report.events import write_events_csv

        write_events_csv(run, file)
    elif option == "--perfetto":
        from kit.report.perfetto import write_perfetto

        write_perfetto(run, file)
    else:
        from kit.report.nsys_sqlite import write_nsys_sqlite

        write_nsys_sqlite(run, file)


def _check_exports(flow: str, targets: dict[str, str]) -> None:
    """Raise when an export is asked for that the flow has nothing to put into."""
    from kit.report.flow_report import report_for

    able = {option for option in EXPORTS if option not in FLOW_EXPORTS or option in report_for(flow).exports}
    for option, target in targets.items():
        if option not in able:
            allowed = ", ".join(sorted(able))
            raise ParameterError(option, target, f"an export of {flow}: {allowed}")


def _run(options: Namespace) -> int:
    targets = {option: value for option in EXPORTS if (value := getattr(options, option[2:])) is not None}
    _check_exports(options.flow, targets)
    check_targets(targets, piped=("--json", "--events"))
    flow, scenario, given = _given(options)
    parameters = registry.check(flow, given)
    begun = time.perf_counter()
    with ProgressLine(quiet=options.quiet) as progress:
        run = flow.run(parameters, scenario=scenario, progress=progress)
    wall = time.perf_counter() - begun
    publish({target: partial(_export, run, option) for option, target in targets.items()})
    if not options.quiet and STDOUT not in targets.values():
        _write(run.table(registry.entry(options.flow).table).to_text())
        if not options.summary:
            _write("\n".join(["", *_metrics(run.metrics), "", *_health(run), f"wall clock: {wall:.2f} s"]))
    return OK


def _check(options: Namespace) -> int:
    if options.all and (options.scenario or options.file):
        raise ParameterError("--all", True, "given alone, without -s and -f")
    flow, scenario, given = _given(options)
    if options.all:
        each = {name: {**registry.load_scenario(options.flow, name), **given} for name in paths.scenarios(options.flow)}
    else:
        each = {scenario: given}
    checked = {name: registry.check(flow, values) for name, values in each.items()}
    good = True
    for name, parameters in checked.items():
        with ProgressLine() as progress:
            run = flow.run(parameters, scenario=name, progress=progress)
        good &= not run.integrity.lost and not _count(run.conformance.violations)
        _write("\n  ".join([f"{options.flow} {name or 'defaults'}", *_health(run)]))
        violations = run.conformance.violations
        for violation in violations if isinstance(violations, list) else ():
            _write(f"  violation: {violation}")
    return OK if good else FAILED


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ParameterError(option, text, "a whole number at least 1")
    return int(text)


def _sweep(options: Namespace) -> int:
    from kit.batch.sweep import plan, run_sweep

    jobs = _whole("--jobs", options.jobs)
    folder = check_folder("--out", options.out)
    axes = choices.axes(registry.entry(options.flow).load().Parameters, options.parameter)
    options.parameter = []
    _flow, _name, given = _given(options)
    points = plan(options.flow, given, axes)
    with ProgressLine() as progress:
        file, failed = run_sweep(options.flow, points, list(axes), folder, jobs=jobs, progress=progress)
    _write(f"{len(points)} runs, {failed} failed: {file}")
    return FAILED if failed else OK


def _batch(options: Namespace) -> int:
    from kit.batch.runs import plan, run_batch

    folder = check_folder("--out", options.out)
    return FAILED if run_batch(plan(options.flow, options.scenario, options.all), folder) else OK


def _parameters(options: Namespace) -> int:
    model = registry.entry(options.flow).load().Parameters
    _write(json.dumps(list(model.rows()), indent=1) if options.json else choices.parameters_markdown(model))
    return OK


def _compile(options: Namespace) -> int:
    from kit.native import build, compiled

    if options.remove:
        build.remove()
        return OK
    if options.if_possible and compiled.unwanted():
        return OK
    if compiled.modules():
        if not options.if_possible:
            _write("everything is compiled already")
        return OK
    begun = time.perf_counter()
    try:
        build.check()
        sys.stderr.write("compiling the engine and the CUDA driver, about two minutes ...\n")
        _write(f"{build.build()} modules compiled in {time.perf_counter() - begun:.0f} s")
    except build.CompileError as wrong:
        if not options.if_possible:
            raise
        sys.stderr.write(f"kit: not compiled, the same results take twice the time: {wrong}\n")
    return OK


def _lab(options: Namespace) -> int:
    # Announcements and the update check are JupyterLab's only calls to the network.
    offline = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    folder = f"--ServerApp.root_dir={paths.notebooks()}"
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", folder, *offline, *options.rest])


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "list": _list,
    "run": _run,
    "check": _check,
    "sweep": _sweep,
    "batch": _batch,
    "parameters": _parameters,
    "compile": _compile,
    "lab": _lab,
}
