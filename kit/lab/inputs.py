"""One control a parameter, made from the parameter model's rows and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets

from kit.errors import ParameterError
from kit.report.language import MUTED, VERMILION

__all__ = ["Control", "make_controls", "named_choices", "stops"]

_LINEAR = 1024  # a slider over more whole numbers than this goes by powers of two
_WIDE, _SLIDER, _BOX, _ALONE = "246px", "94px", "116px", "218px"


class Control:
    """A parameter's label and input.

    Parameters
    ----------
    row : dict
        A row of `Parameters.rows`.
    changed : callable
        Called without arguments after the value has changed.
    system : str
        Driver whose machines can be chosen; any when empty.
    """

    def __init__(self, row: dict[str, Any], changed: Callable[[], None], system: str = "") -> None:
        self.row, self.name = row, str(row["name"])
        self._changed = changed
        self._label = widgets.HTML(layout=widgets.Layout(width=_WIDE, height="22px", margin="3px 0 0 0"))
        self._input, inside = _input(row, system)
        self._input.observe(self._moved, names="value")
        self.box = widgets.VBox([self._label, inside], layout=widgets.Layout(overflow="visible"))
        self._draw_label()

    @property
    def value(self) -> Any:
        """The value as the model takes it.

        Raises
        ------
        ParameterError
            A list's text is not whole numbers with commas between.
        """
        value = self._input.value
        if not isinstance(self.row["default"], list):
            return value
        try:
            return [int(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise ParameterError(self.name, value, "whole numbers with commas between") from None

    @value.setter
    def value(self, value: Any) -> None:
        self._input.value = _words(value) if isinstance(value, list) else value

    @property
    def is_default(self) -> bool:
        """Whether the input shows the model's default."""
        default = self.row["default"]
        return bool(self._input.value == (_words(default) if isinstance(default, list) else default))

    def reset(self) -> None:
        """Go back to the default."""
        self.value = self.row["default"]

    def read_by(self, program: str) -> bool:
        """Whether `program` reads this parameter."""
        return not self.row["programs"] or program in self.row["programs"]

    def _moved(self, _change: object) -> None:
        self._draw_label()
        self._changed()

    def _draw_label(self) -> None:
        """Show the name, the documented name and help as a tooltip, and a dot when changed."""
        real = f" (documented as {self.row['documented']})" if self.row["documented"] else ""
        tip = escape(f"{self.row['help']}{real}; {self.row['allowed']}; default {self.row['default']}", quote=True)
        dot = f' <b style="color:{VERMILION}" title="changed">●</b>' if not self.is_default else ""
        words = escape(self.name.replace("_", " "))
        self._label.value = (
            f'<span title="{tip}" style="display:block;line-height:22px;padding-left:2px">{words}{dot}</span>'
        )


def make_controls(rows: list[dict[str, Any]], changed: Callable[[], None], system: str = "") -> dict[str, Control]:
    """Return the controls by parameter name, in the model's order."""
    return {row["name"]: Control(row, changed, system) for row in rows}


def stops(row: dict[str, Any]) -> list[float]:
    """Return where a slider for a bounded parameter can stop; empty when it is not bounded on both sides."""
    least, most = row["ge"], row["le"]
    if least is None or most is None:
        return []
    if isinstance(row["default"], float):
        return [least + (most - least) * i / 100 for i in range(101)]
    if most - least <= _LINEAR:
        return [float(i) for i in range(int(least), int(most) + 1)]
    powers = [float(1 << i) for i in range(int(most).bit_length()) if least < 1 << i < most]
    return [least, *powers, most]


def named_choices(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return each choice as it is shown, and the choice: with its name where the model's help gives it one.

    The help names a choice behind it, in capitals (``2 BATCH_FLUSH``) or in brackets (``8 (a stamp)``).
    """
    found = []
    for choice in row["choices"]:
        named = re.search(rf"(?<!\S){re.escape(str(choice))} (?:([A-Z][A-Z_]+)\b|\(([^()]*)\))", row["help"])
        found.append((f"{choice} · {named[1] or named[2]}" if named else str(choice), choice))
    return found


def _words(numbers: list[Any]) -> str:
    return ", ".join(map(str, numbers))


def _input(row: dict[str, Any], system: str) -> tuple[Any, Any]:
    """Return the widget that holds the value, and what is shown (itself, or itself with a slider and a unit)."""
    default, choices = row["default"], list(row["choices"])
    wide = widgets.Layout(width=_WIDE)
    if row["name"] == "machine" and not choices:
        from kit.sim.machine import machines

        choices = machines(system)
    if choices:
        options = named_choices({**row, "choices": choices})
        found: Any = widgets.Dropdown(options=options, value=default, layout=wide)
        return found, found
    if isinstance(default, bool):
        found = widgets.Checkbox(value=default, indent=False, description=row["help"], layout=wide)
        found.add_class("farfault-check")
        return found, found
    if isinstance(default, (str, list)):
        text = _words(default) if isinstance(default, list) else default
        found = widgets.Text(value=text, continuous_update=False, layout=wide)
        return found, found
    return _number(row)


def _number(row: dict[str, Any]) -> tuple[Any, Any]:
    """Return a number's box, and the box with its unit and, when bounded, a slider that follows it.

    The box takes any number: a value out of bounds is for the model to refuse by name, not to be
    changed without a word.
    """
    kind = widgets.FloatText if isinstance(row["default"], float) else widgets.IntText
    at = stops(row)
    box = kind(value=row["default"], layout=widgets.Layout(width=_BOX if at else _ALONE))
    unit = widgets.HTML(f'<span style="color:{MUTED};font-size:11px">{escape(row["unit"])}</span>')
    if not at:
        return box, widgets.HBox([box, unit])

    def nearest(value: float) -> int:
        return min(range(len(at)), key=lambda i: abs(at[i] - value))

    slider = widgets.IntSlider(
        value=nearest(box.value), min=0, max=len(at) - 1, readout=False, continuous_update=False,
        layout=widgets.Layout(width=_SLIDER, margin="2px 6px 2px 6px"),
    )  # fmt: skip

    def slid(change: dict[str, Any]) -> None:
        if nearest(box.value) != change["new"]:
            box.value = at[change["new"]] if kind is widgets.FloatText else int(at[change["new"]])

    def typed(change: dict[str, Any]) -> None:
        slider.value = nearest(change["new"])

    slider.observe(slid, names="value")
    box.observe(typed, names="value")
    return box, widgets.HBox([slider, box, unit])
