"""Documented memory-fault paths, run step by step and at scale.

>>> import kit
>>> run = kit.run("cuda_demand_paging", scenario="default")  # doctest: +SKIP

Everything heavy is imported on use, so that ``import kit`` costs next to nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kit import flows
from kit.native import loader

if TYPE_CHECKING:
    from kit.flows.registry import Flows
    from kit.flows.run import Run

__all__ = ["__version__", "explore", "flows", "machines", "open", "run", "scenarios"]

__version__ = "0.1.0"


class _CallableFlows(ModuleType):
    """`kit.flows` is a package and, called, says which flows there are."""

    def __call__(self) -> Flows:
        """Return the flows by name; printed, one line each."""
        from kit.flows import registry

        return registry.flows()


loader.install()

# Importing a submodule binds its name here, so a function called `flows` would not last.
sys.modules["kit.flows"].__class__ = _CallableFlows


def run(flow: str, /, scenario: str = "", **parameters: Any) -> Run:
    """Run a flow to its end.

    Parameters
    ----------
    flow : str
        Name of the flow.
    scenario : str
        Name of one of its scenarios, read first; empty for the defaults.
    **parameters
        What differs from the scenario.

    Returns
    -------
    Run
        Metrics, trace, tables, conformance and integrity.

    Raises
    ------
    ParameterError
        An unknown name, or a value that is not allowed.
    """
    from kit.flows import registry

    return registry.run(flow, scenario, parameters)


def open(flow: str, /, scenario: str = "", **parameters: Any) -> Any:
    """Open a flow to be taken stage by stage; the arguments are those of `run`."""
    from kit.flows import registry

    return registry.open(flow, scenario, parameters)


def explore(flow: str, /, scenario: str = "", **parameters: Any) -> Any:
    """Return controls and live views of a flow for JupyterLab; the arguments are those of `run`."""
    from kit.flows import registry

    return registry.explore(flow, scenario, parameters)


def machines() -> list[str]:
    """Return the names of the machine profiles."""
    from kit.sim import machine

    return machine.machines()


def scenarios(flow: str, /) -> list[str]:
    """Return the names of a flow's scenarios."""
    from kit import paths
    from kit.flows import registry

    return list(paths.scenarios(registry.entry(flow).name))
