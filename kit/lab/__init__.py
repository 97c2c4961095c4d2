"""What notebooks use: the strict check, the result cell, the controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kit.lab.collect import collect
from kit.lab.result import show_result

if TYPE_CHECKING:
    from kit.flows.parameters import Parameters
    from kit.flows.registry import Flow
    from kit.flows.run import Run

__all__ = ["collect", "controls", "explore", "interactive", "show_result"]


def interactive() -> bool:
    """Return whether somebody sits in front of this kernel.

    Front ends that a person uses say with each cell that they could answer a question; papermill
    and nbconvert say that they cannot. Nobody who could answer means nobody to move a slider.
    """
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin", False))


def explore(flow: Flow, parameters: Parameters | None = None, run: Run | None = None) -> Any:
    """Return the controls of a flow; where nobody is there to use them, a sentence that says so.

    Parameters
    ----------
    flow : Flow
        What to explore.
    parameters : Parameters, optional
        Where the controls start; the defaults when left out.
    run : Run, optional
        A run to show at once and to compare the next one with.
    """
    if not interactive():
        from kit.report.figures.figure import nothing

        return nothing("controls", "Open this notebook in JupyterLab to change the parameters here and run again.")
    from kit.lab.panel import Panel

    return Panel(flow, parameters, run).widget


def controls(run: Run) -> Any:
    """Return the controls of the flow of `run`, set to its parameters and showing it."""
    from kit.flows import registry

    flow = registry.entry(run.flow).load()
    return explore(flow, registry.check(flow, run.parameters), run)
