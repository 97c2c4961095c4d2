"""Costs: every name that is charged has one value, and no other name has."""

from __future__ import annotations

import pytest

from kit.errors import ParameterError
from kit.sim.costs import Costs


def test_costs_are_the_values_given() -> None:
    costs = Costs(("push", "fetch"), {"push": 2, "fetch": 0.5})
    assert (costs.push, costs.fetch) == (2.0, 0.5)


def test_without_values_everything_is_free() -> None:
    costs = Costs({"push": "one push", "fetch": "one fetch"})
    assert (costs.push, costs.fetch) == (0.0, 0.0)


def test_an_unknown_cost_is_named_with_a_suggestion() -> None:
    with pytest.raises(ParameterError, match=r"push.*") as error:
        Costs(("push", "fetch"), {"pussh": 1.0, "push": 1.0, "fetch": 1.0})
    assert "pussh" in str(error.value)


def test_a_missing_cost_is_named() -> None:
    with pytest.raises(ParameterError, match="fetch has none"):
        Costs(("push", "fetch"), {"push": 1.0})
