"""Scenarios executed as notebooks through papermill: all of a scenario's files, or none of them."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import paths
from kit.batch.index import load_rows, write_index
from kit.batch.summary import figures, summary_table
from kit.errors import KitError, ParameterError
from kit.flows import registry
from kit.outputs import staged

__all__ = ["Job", "ScenarioError", "execute", "plan", "run_batch"]


class ScenarioError(KitError):
    """A scenario whose notebook did not come to its end."""


@dataclass(frozen=True)
class Job:
    """One notebook to execute.

    Attributes
    ----------
    flow, scenario : str
        Names.
    notebook : Path
        The flow's notebook.
    parameters : dict
        What the scenario sets, already validated.
    """

    flow: str
    scenario: str
    notebook: Path
    parameters: dict[str, Any]


def plan(flow: str = "", scenario: str = "", everything: bool = False) -> list[Job]:
    """Return what is to be executed, every parameter validated, before anything runs.

    Parameters
    ----------
    flow : str
        Only this flow; all of them when empty.
    scenario : str
        Only this scenario of `flow`; the default one when empty.
    everything : bool
        Every scenario instead of the default one.

    Raises
    ------
    ParameterError
        An unknown name, a value that is not allowed, or a notebook that is missing.
    """
    if scenario and not flow:
        raise ParameterError("scenario", scenario, "given together with a flow")
    if scenario and everything:
        raise ParameterError("--all", True, "given without a scenario")
    jobs = []
    for name in [registry.entry(flow).name] if flow else registry.ENTRIES:
        found = registry.entry(name)
        chosen = list(paths.scenarios(name)) if everything else [scenario or found.default]
        for each in chosen:
            given = registry.load_scenario(name, each)
            flow_of = found.load()
            flow_of.open(registry.check(flow_of, given))  # finds what only a machine or a file can tell is wrong
            jobs.append(Job(name, each, paths.notebook(name), given))
    missing = [str(job.notebook) for job in jobs if not job.notebook.is_file()]
    if missing:
        raise ParameterError("notebook", missing[0], "a file that exists")
    return jobs


def execute(job: Job, folder: Path, place: Path, progress: bool = True) -> dict[str, Any]:
    """Execute one job, leave its files in `folder`, and return its row of the summary.

    The files are ``<scenario>.ipynb``, ``.html``, ``.json`` (result) and ``.events.csv``. What they
    say of their own paths holds once they are in `place`.

    Raises
    ------
    ScenarioError
        A cell raised, the kernel died, or the notebook wrote no result.
    """
    import papermill
    from papermill.exceptions import PapermillException
    from traitlets.config import Config

    from kit.batch.reports import html_report, thumbnail

    logging.getLogger("papermill").setLevel(logging.WARNING)  # what it says of progress is on the terminal already
    folder = folder.resolve()
    target, result = folder / f"{job.scenario}.ipynb", folder / f"{job.scenario}.json"
    begun = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(job.notebook),
            str(target),
            parameters={**job.parameters, "result_path": str(result)},
            progress_bar={"desc": f"{job.flow} {job.scenario}", "file": sys.stderr} if progress else False,
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # ipykernel warns of plain TCP
        )
    except (PapermillException, RuntimeError, OSError) as wrong:  # nbclient's dead kernels and timeouts are the latter
        raise ScenarioError(f"{job.flow} {job.scenario}: {_reason(wrong)}") from wrong
    wall = time.perf_counter() - begun
    if not result.is_file():
        raise ScenarioError(f"{job.flow} {job.scenario}: the notebook wrote no result to its result_path")
    outcome = json.loads(result.read_text("utf-8"))
    target.write_text(target.read_text("utf-8").replace(str(folder), str(place)), "utf-8")
    notebook = papermill.iorw.load_notebook_node(str(target))
    (folder / f"{job.scenario}.events.csv").write_text(events_csv(outcome["events"]), "utf-8")
    (folder / f"{job.scenario}.html").write_text(html_report(notebook, f"{job.flow}: {job.scenario}"), "utf-8")
    picture = thumbnail(notebook)
    row = {"flow": job.flow, "scenario": job.scenario, "wall s": wall, **figures(outcome), "error": ""}
    return {**row, "picture": picture[0] if picture else "", "alt": picture[1] if picture else ""}


def _reason(wrong: BaseException) -> str:
    """Return what went wrong in the notebook in one line: a cell's error, not papermill's page about it."""
    from papermill.exceptions import PapermillExecutionError

    if isinstance(wrong, PapermillExecutionError):
        text = f"cell [{wrong.exec_count}]: {wrong.ename}: {wrong.evalue}"
    else:
        text = f"{type(wrong).__name__}: {wrong}"
    return " ".join(text.split())


def events_csv(events: Iterable[Mapping[str, Any]]) -> str:
    """Return a result's events as the CSV that ``kit run --events`` writes."""
    from kit.report.events import EVENT_COLUMNS

    form = "{:.3f},{:.3f},{},{},{},{},{}\n".format
    rows = (form(*(event[column] for column in EVENT_COLUMNS)) for event in events)
    return ",".join(EVENT_COLUMNS) + "\n" + "".join(rows)


def run_batch(jobs: Sequence[Job], out: Path, progress: bool = True) -> int:
    """Execute jobs, publish what succeeded under `out`, print the summary, and return how many failed.

    A scenario's files go into ``out/<flow>/`` once all of them exist. ``out/index.html`` leads to
    every scenario under `out`, earlier batches' included.
    """
    rows: list[dict[str, Any]] = []
    for job in jobs:
        begun = time.perf_counter()
        with staged(out) as building:
            try:
                row = execute(job, building, out / job.flow, progress)
            except ScenarioError as wrong:
                row = {"flow": job.flow, "scenario": job.scenario, "wall s": time.perf_counter() - begun}
                row["error"] = str(wrong)
            else:
                place = out / job.flow
                place.mkdir(exist_ok=True)
                for file in sorted(building.iterdir()):
                    file.replace(place / file.name)
        rows.append(row)
    if any(not row["error"] for row in rows):
        write_index(out, load_rows(out), rows)
    sys.stdout.write(summary_table(rows) + "\n")
    wrong_rows = [row for row in rows if row["error"] or row["lost pages"] or row["violations"]]
    for row in wrong_rows:
        sys.stderr.write(f"kit: error: {row['error'] or _unsound(row)}\n")
    if len(wrong_rows) < len(rows):
        sys.stdout.write(f"\nReports: {out / 'index.html'}\n")
    return len(wrong_rows)


def _unsound(row: Mapping[str, Any]) -> str:
    lost, violations = row["lost pages"], row["violations"]
    return f"{row['flow']} {row['scenario']}: {lost} pages lost, {violations} departures from the documented steps"
