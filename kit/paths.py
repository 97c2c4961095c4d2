"""Where notebooks and scenarios are: in the checkout, else in the installed package."""

from __future__ import annotations

from pathlib import Path

from kit.errors import ParameterError, did_you_mean

__all__ = ["flow_file", "notebook", "notebooks", "root", "scenario_file", "scenarios"]

_HERE = Path(__file__).resolve().parent
CHECKOUT = _HERE.parent
PACKAGED = _HERE / "_data"


def root() -> Path:
    """Return the folder that holds ``notebooks/`` and ``scenarios/``."""
    checkout = (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "scenarios").is_dir()
    return CHECKOUT if checkout else PACKAGED


def notebooks() -> Path:
    """Return the folder of the notebooks."""
    return root() / "notebooks"


def notebook(flow: str) -> Path:
    """Return the notebook of a flow."""
    return notebooks() / f"{flow}.ipynb"


def flow_file(flow: str) -> Path:
    """Return the file that lists a flow's documented steps."""
    return root() / "scenarios" / flow / "flow.yaml"


def scenarios(flow: str) -> dict[str, Path]:
    """Return a flow's scenario files by name, ascending."""
    files = sorted((root() / "scenarios" / flow).glob("*.yaml"))
    return {file.stem: file for file in files if file.name != "flow.yaml"}


def scenario_file(flow: str, name: str) -> Path:
    """Return the file of one scenario.

    Raises
    ------
    ParameterError
        No scenario has that name, with the closest one.
    """
    known = scenarios(flow)
    if name not in known:
        allowed = f"a scenario of {flow}: " + (", ".join(known) or "there are none yet")
        raise ParameterError("scenario", name, allowed, did_you_mean(name, known))
    return known[name]
