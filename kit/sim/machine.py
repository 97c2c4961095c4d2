"""Machines: memories, processors and links as a graph, plus sourced constants.

A profile is a YAML file beside this module. Every constant says its value, its unit, where it
comes from and whether it was measured or estimated, so that a reader can tell the two apart. A
profile may extend another: what it does not say itself it takes over, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Constant", "Curve", "Machine", "check_machine", "load_machine", "machines", "resolve"]

BASES = ("measured", "derived", "estimate", "specified")


@dataclass(frozen=True)
class Constant:
    """One number of a profile: value, unit, source, and how it was come by (one of `BASES`)."""

    value: float
    unit: str
    source: str
    basis: str


class Curve:
    """Time of a copy by its size, linear between measured points.

    Parameters
    ----------
    points : list of (KiB, microseconds)
        Ascending by size; beyond the last point the last slope goes on.
    source, basis : str
        As in `Constant`.
    """

    def __init__(self, points: list[list[float]], source: str, basis: str) -> None:
        self.kib = [float(p[0]) for p in points]
        self.us = [float(p[1]) for p in points]
        self.source, self.basis = source, basis
        self._known: dict[int, float] = {}
        self._slope = (self.us[-1] - self.us[-2]) / (self.kib[-1] - self.kib[-2]) if len(points) > 1 else 0.0

    def __call__(self, nbytes: int) -> float:
        """Return microseconds for `nbytes`."""
        found = self._known.get(nbytes)
        if found is None:
            found = self._known[nbytes] = float(self._of(np.array([nbytes / 1024]))[0])
        return found

    def by_pages(self, most: int) -> list[float]:
        """Return microseconds for 0 to `most` pages of 4 KiB."""
        found: list[float] = self._of(np.arange(most + 1, dtype=np.float64) * 4).tolist()
        return found

    def _of(self, kib: NDArray[np.float64]) -> NDArray[np.float64]:
        beyond = self.us[-1] + self._slope * (kib - self.kib[-1])
        return np.where(kib > self.kib[-1], beyond, np.interp(kib, self.kib, self.us))


@dataclass(frozen=True)
class Machine:
    """A machine profile.

    Attributes
    ----------
    name, title : str
        Profile name (the file's) and what it is in words.
    architecture : str
        GPU family, lower case (``pascal``); picks the driver's hardware layer.
    constants : dict of str to Constant
        ``machine["sms"]`` gives the bare value.
    curves : dict of str to Curve
        ``copy_htod`` and ``copy_dtoh``.
    nodes, links : list
        Plain rows from which `graph` is made.
    system : str
        Driver whose constants it has (``uvm``, ``hmm``, ...): which flows can run on it.
    """

    name: str
    title: str
    architecture: str
    constants: dict[str, Constant]
    curves: dict[str, Curve]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    system: str = "uvm"

    def __getitem__(self, name: str) -> float:
        try:
            return self.constants[name].value
        except KeyError:
            hint = did_you_mean(name, self.constants)
            raise ParameterError("constant", name, f"a constant of machine {self.name}", hint) from None

    def graph(self) -> nx.Graph[str]:
        """Return memories, processors and links as a networkx graph with their facts as attributes."""
        import networkx as nx

        graph: nx.Graph[str] = nx.Graph(name=self.name)
        for row in self.nodes:
            graph.add_node(row["id"], **{k: v for k, v in row.items() if k != "id"})
        for row in self.links:
            graph.add_edge(row["ends"][0], row["ends"][1], **{k: v for k, v in row.items() if k != "ends"})
        return graph


def machines(system: str = "") -> list[str]:
    """Return the names of the profiles, ascending: of all, or of those with the constants of a driver."""
    folder = resources.files("kit.sim") / "machines"
    names = sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [name for name in names if load_machine(name).system == system] if system else names


def check_machine(name: str, system: str) -> None:
    """Raise `ParameterError` unless a profile of that name has the constants of the driver `system`."""
    if name not in machines() or load_machine(name).system != system:  # the others are read only for the message
        known = machines(system)
        raise ParameterError("machine", name, "one of " + ", ".join(known), did_you_mean(name, known))


@cache
def load_machine(name: str) -> Machine:
    """Read a profile, with what it takes over from the profiles that it extends.

    Raises
    ------
    ParameterError
        The name is not a profile's, with the closest one; or the profile is not in order.
    """
    if name not in machines():
        raise ParameterError("machine", name, "one of " + ", ".join(machines()), did_you_mean(name, machines()))
    data = resolve(name, _read)
    constants = {key: Constant(**facts) for key, facts in data["constants"].items()}
    curves = {key: Curve(**facts) for key, facts in data["curves"].items()}
    said: dict[str, Constant | Curve] = {**constants, **curves}
    wrong = [key for key, c in said.items() if c.basis not in BASES or not c.source]
    if wrong:
        raise ParameterError("machine", name, "a profile whose constants all say source and basis: " + ", ".join(wrong))
    return Machine(
        name, data["title"], data["architecture"], constants, curves, data.get("nodes", []), data.get("links", []),
        data.get("system", "uvm"),
    )  # fmt: skip


def resolve(name: str, read: Callable[[str], Mapping[str, Any]], extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a profile's data, completed from the profile that its ``extends`` names.

    Its own constants and curves win. What it inherits keeps its value, says in its source from where
    it was carried over, and is an estimate: it was found on another machine.

    Parameters
    ----------
    name : str
        The profile.
    read : callable
        Gives a profile's own data by its name.
    extended_by : tuple of str
        Profiles that led here.

    Raises
    ------
    ParameterError
        A profile that extends itself in the end, or one that does not exist.
    """
    chain = (*extended_by, name)
    if name in extended_by:
        raise ParameterError("extends", name, "a profile that does not lead back to itself: " + " -> ".join(chain))
    own = dict(read(name))
    above = own.pop("extends", None)
    if above is None:
        return own
    base = resolve(above, read, chain)
    for part in ("constants", "curves"):
        carried = {
            key: {**facts, "source": f"as {above}: {facts['source']}", "basis": "estimate"}
            for key, facts in base[part].items()
        }
        own[part] = {**carried, **own.get(part, {})}
    return {**base, **own}


def _read(name: str) -> dict[str, Any]:
    """Return a shipped profile's own data."""
    if name not in machines():
        raise ParameterError("extends", name, "one of " + ", ".join(machines()), did_you_mean(str(name), machines()))
    import yaml

    data: dict[str, Any] = yaml.safe_load((resources.files("kit.sim") / "machines" / f"{name}.yaml").read_text("utf-8"))
    return data
