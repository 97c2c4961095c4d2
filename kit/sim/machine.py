"""Machines: memories, processors and links as a graph, plus sourced constants.

A profile is a YAML file beside this module. Every constant says its value, its unit, where it
comes from and whether it was measured or estimated, so that a reader can tell the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Constant", "Curve", "Machine", "load_machine", "machines"]

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
        self._cache: dict[int, float] = {}

    def __call__(self, nbytes: int) -> float:
        """Return microseconds for `nbytes`."""
        found = self._cache.get(nbytes)
        if found is None:
            kib = nbytes / 1024
            if kib > self.kib[-1]:
                slope = (self.us[-1] - self.us[-2]) / (self.kib[-1] - self.kib[-2])
                found = self.us[-1] + slope * (kib - self.kib[-1])
            else:
                found = float(np.interp(kib, self.kib, self.us))
            self._cache[nbytes] = found
        return found


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
    """

    name: str
    title: str
    architecture: str
    constants: dict[str, Constant]
    curves: dict[str, Curve]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)

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


def machines() -> list[str]:
    """Return the names of the profiles, ascending."""
    folder = resources.files("kit.sim") / "machines"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@cache
def load_machine(name: str) -> Machine:
    """Read a profile.

    Raises
    ------
    ParameterError
        The name is not a profile's, with the closest one.
    """
    if name not in machines():
        raise ParameterError("machine", name, "one of " + ", ".join(machines()), did_you_mean(name, machines()))
    import yaml

    text = (resources.files("kit.sim") / "machines" / f"{name}.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    constants = {key: Constant(**facts) for key, facts in data["constants"].items()}
    wrong = [key for key, c in constants.items() if c.basis not in BASES or not c.source]
    if wrong:
        raise ParameterError("machine", name, "a profile whose constants all say source and basis: " + ", ".join(wrong))
    curves = {key: Curve(**facts) for key, facts in data["curves"].items()}
    return Machine(
        name, data["title"], data["architecture"], constants, curves, data.get("nodes", []), data.get("links", [])
    )
