"""The style sheet: every class that it speaks of is worn, and figures wrap into rows of one length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import fakes
import pytest
from synthetic import sequential_run

from kit.flows import registry
from kit.flows.cuda_demand_paging.flow import FLOW
from kit.lab.panel import Panel
from kit.lab.style import CELL, SHEET, headline_sheet


def parts(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def columns(count: int, width: int) -> int:
    """Return how many columns the sheet gives `count` figures in views `width` wide."""
    rules = re.findall(r"min-width: (\d+)px\) \{[^}]*--columns: (\d+);", headline_sheet(count))
    return max((int(columns) for least, columns in rules if int(least) <= width), default=1)


def test_every_class_of_the_sheet_is_worn_and_the_sheet_is_shown() -> None:
    found = list(parts(Panel(FLOW).widget))
    worn = {name for each in found for name in each._dom_classes}
    inside = {name for each in found for name in re.findall(r'class="([\w-]+)"', str(getattr(each, "value", "")))}
    asked = set(re.findall(r"\.(farfault-[\w-]+)", SHEET + headline_sheet(8)))
    assert asked <= worn | inside
    assert SHEET in [getattr(each, "value", "") for each in found]


def test_widths_are_left_to_the_sheet() -> None:
    """A width in a widget's layout goes before every sheet and would hold the columns apart."""
    panel = Panel(FLOW)
    boxes = [each for each in parts(panel.widget) if any(name.startswith("farfault-") for name in each._dom_classes)]
    placed = [each for each in boxes if "farfault-check" not in each._dom_classes]
    assert placed and all(each.layout.width is None and each.layout.flex is None for each in placed)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(368, 3), (568, 4), (680, 4), (848, 4), (1100, 8), (200, 1), (240, 2)],
)
def test_eight_figures_go_into_even_rows_that_have_room(width: int, expected: int) -> None:
    assert columns(8, width) == expected
    assert expected * CELL <= width or expected == 1


@pytest.mark.parametrize("count", range(1, 13))
def test_the_last_row_is_short_by_less_than_the_number_of_rows(count: int) -> None:
    for width in range(CELL, 14 * CELL, 17):
        across = columns(count, width)
        assert across * CELL <= max(width, CELL)
        rows = -(-count // across)
        assert rows * across - count < rows


def test_a_run_brings_the_sheet_for_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sequential_run()
    run.metrics["simulated_us"] = run.stages[-1][2]
    panel = Panel(FLOW, run=run)
    assert panel.headline.value.startswith(headline_sheet(8))
    monkeypatch.setattr(registry, "ENTRIES", {"fake_flow": registry.Entry("fake_flow", "fakes")})
    assert Panel(fakes.FakeFlow()).headline.value == ""
