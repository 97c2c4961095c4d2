"""Flows by name, imported on use, and the one way in which a scenario becomes parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kit import paths
from kit.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    from kit.flows.parameters import Parameters
    from kit.flows.run import Run

__all__ = [
    "ENTRIES",
    "Entry",
    "Flow",
    "Flows",
    "Progress",
    "check",
    "entry",
    "explore",
    "flows",
    "load_scenario",
    "open",
    "read_scenario",
    "run",
]

Progress = Callable[[float, str], None]
"""Called with the share done, 0 to 1, and the stage's name."""


class Flow(Protocol):
    """What a flow's module offers as ``FLOW``."""

    @property
    def name(self) -> str:
        """The flow's name, as in scenario folders."""

    @property
    def title(self) -> str:
        """The flow in one line."""

    @property
    def Parameters(self) -> type[Parameters]:
        """The parameter model."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The methods of what `open` returns, in order; the notebook has a cell for each."""

    def run(self, parameters: Any, scenario: str = "", progress: Progress | None = None) -> Run:
        """Run to the end."""

    def open(self, parameters: Any, scenario: str = "") -> Any:
        """Return an object with one method a stage."""


@dataclass(frozen=True)
class Entry:
    """Where a flow is.

    Attributes
    ----------
    name : str
        The flow's name.
    module : str
        Module whose ``FLOW`` it is.
    default : str
        Scenario that ``make run`` executes.
    table : str
        Report that ``kit run`` prints.
    report : str
        Module whose ``REPORT`` says what the flow brings to the reports (a room above: imported on use).
    """

    name: str
    module: str
    default: str = "default"
    table: str = "nvprof"
    report: str = "kit.report.cuda"

    def load(self) -> Flow:
        """Import the flow."""
        flow: Flow = import_module(self.module).FLOW
        return flow


ENTRIES: dict[str, Entry] = {
    each.name: each
    for each in (
        Entry("cuda_demand_paging", "kit.flows.cuda_demand_paging.flow"),
        Entry("hmm_mirror", "kit.flows.hmm_mirror.flow", "default", "strace", "kit.report.hmm.report"),
        Entry(
            "mlx5_implicit_mr", "kit.flows.mlx5_implicit_mr.flow", "default", "rdma_stat", "kit.report.rdma.implicit"
        ),
        Entry("mlx5_odp_mr", "kit.flows.mlx5_odp_mr.flow", "default", "kinds", "kit.report.rdma.odp_mr"),
        Entry("rc_pingpong", "kit.flows.rc_pingpong.flow", "default", "pingpong", "kit.report.rdma.pingpong"),
        Entry(
            "rdma_follows_migration",
            "kit.flows.rdma_follows_migration.flow",
            "default",
            "rdma_stat",
            "kit.report.rdma.follows",
        ),
    )
}


class Flows(Mapping[str, Flow]):
    """The flows by name, imported when taken; shown as one line each."""

    def __getitem__(self, name: str) -> Flow:
        return entry(name).load()

    def __iter__(self) -> Iterator[str]:
        return iter(ENTRIES)

    def __len__(self) -> int:
        return len(ENTRIES)

    def __contains__(self, name: object) -> bool:
        return name in ENTRIES

    def __repr__(self) -> str:
        wide = max(map(len, self), default=0)
        return "\n".join(f"{name:<{wide}}  {flow.title}" for name, flow in self.items())


def flows() -> Flows:
    """Return the flows by name."""
    return Flows()


def entry(name: str) -> Entry:
    """Return where a flow is.

    Raises
    ------
    ParameterError
        No flow has that name, with the closest one.
    """
    if name not in ENTRIES:
        raise ParameterError("flow", name, "one of " + ", ".join(ENTRIES), did_you_mean(name, ENTRIES))
    return ENTRIES[name]


def read_scenario(file: Path) -> dict[str, Any]:
    """Read a flat YAML file of parameters.

    Raises
    ------
    ParameterError
        The file cannot be read, is not a flat mapping of names to values, or names one twice.
    """
    import yaml

    try:
        text = file.read_text("utf-8")
        top, data = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as wrong:
        raise ParameterError("scenario file", str(file), f"a file that can be read ({wrong.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as wrong:
        detail = " ".join(str(wrong).split())
        raise ParameterError("scenario file", str(file), f"YAML text ({detail})") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ParameterError("scenario file", str(file), "a flat mapping of parameter names to values")
    names = [key.value for key, _value in top.value] if isinstance(top, yaml.MappingNode) else []
    twice = [name for name in data if names.count(name) > 1]
    if twice:
        raise ParameterError("scenario file", str(file), f"one value for each parameter; it has more for {twice[0]}")
    return data


def load_scenario(flow: str, name: str) -> dict[str, Any]:
    """Return what a named scenario sets; nothing for the empty name."""
    return read_scenario(paths.scenario_file(entry(flow).name, name)) if name else {}


def check(flow: Flow, given: Mapping[str, Any]) -> Parameters:
    """Validate parameters against the flow's model and the machines that it can run on."""
    return flow.Parameters.check(given)


def run(flow: str, scenario: str = "", given: Mapping[str, Any] | None = None, progress: Progress | None = None) -> Run:
    """Run a flow with a scenario's parameters, changed by `given`."""
    found = entry(flow).load()
    parameters = check(found, {**load_scenario(flow, scenario), **(given or {})})
    return found.run(parameters, scenario=scenario, progress=progress)


def open(flow: str, scenario: str = "", given: Mapping[str, Any] | None = None) -> Any:
    """Open a flow stage by stage with a scenario's parameters, changed by `given`."""
    found = entry(flow).load()
    return found.open(check(found, {**load_scenario(flow, scenario), **(given or {})}), scenario)


def explore(flow: str, scenario: str = "", given: Mapping[str, Any] | None = None) -> Any:
    """Return JupyterLab controls that start from a scenario's parameters, changed by `given`."""
    found = entry(flow).load()
    parameters = check(found, {**load_scenario(flow, scenario), **(given or {})})
    return import_module("kit.lab").explore(found, parameters)
