"""Costs: the microseconds that a machine's profile gives for each thing that a floor charges time for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kit.errors import ParameterError, did_you_mean

__all__ = ["Costs"]


class Costs:
    """Named costs as attributes.

    Parameters
    ----------
    names : iterable of str
        What there is to pay for: the one list of whoever charges it.
    values : mapping of str to float
        A value for each; None makes everything free (a model without time).

    Raises
    ------
    ParameterError
        A name that is unknown, or a cost that has no value.
    """

    def __init__(self, names: Iterable[str], values: Mapping[str, float] | None = None) -> None:
        known = tuple(names)
        given = dict.fromkeys(known, 0.0) if values is None else values
        for name in given:
            if name not in known:
                raise ParameterError("cost", name, f"one of {', '.join(known)}", did_you_mean(name, known))
        for name in known:
            if name not in given:
                raise ParameterError("costs", sorted(given), f"a value for each cost; {name} has none")
        for name in known:
            setattr(self, name, float(given[name]))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float: ...
        def __setattr__(self, name: str, value: float) -> None: ...
