"""The controls: parameters, and beside or below them the same pictures and tables as in the notebook."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from kit.errors import KitError
from kit.flows import registry
from kit.lab.inputs import make_controls
from kit.lab.parameters_cell import grouped_rows
from kit.lab.style import SHEET, headline_sheet
from kit.lab.views import headlines, headlines_html, view_html, view_titles
from kit.report import figures
from kit.report.language import INK, MUTED, VERMILION

if TYPE_CHECKING:
    from kit.flows.parameters import Parameters
    from kit.flows.registry import Flow
    from kit.flows.run import Run

__all__ = ["Panel"]


class Panel:
    """Controls and views of a flow.

    Parameters
    ----------
    flow : Flow
        What is run; its parameter model is the only list of parameters.
    parameters : Parameters, optional
        Where the controls start; the defaults when left out.
    run : Run, optional
        A run to show at once and to compare the first one with.

    Attributes
    ----------
    widget : ipywidgets.Widget
        What JupyterLab displays.
    controls : dict of str to Control
        By parameter name.
    run : Run or None
        The run shown.
    """

    def __init__(self, flow: Flow, parameters: Parameters | None = None, run: Run | None = None) -> None:
        self.flow, self.run = flow, run
        self._previous: Run | None = None
        self._quiet = True  # while many controls change at once
        self.controls = make_controls(
            [row for rows in grouped_rows(flow.Parameters).values() for row in rows], self._changed,
            flow.Parameters.system,
        )  # fmt: skip
        self._groups: list[tuple[str, widgets.HTML]] = []
        self.run_button = widgets.Button(description="Run", button_style="primary", layout=widgets.Layout(width="96px"))
        self.reset_button = widgets.Button(description="Reset all", layout=widgets.Layout(width="84px"))
        self.count = widgets.HTML()
        self.message = widgets.HTML()
        self.headline, self.overview = widgets.HTML(), widgets.HTML()
        self.stage = widgets.ToggleButtons(options=[("whole run", "")], style={"button_width": "auto"})
        self.stage.layout.display = "none"
        self.stage.observe(lambda _change: self._show_overview(), names="value")
        self._titles = view_titles(flow.name)
        self.tabs = widgets.Tab([widgets.HTML() for _ in self._titles], titles=self._titles, selected_index=0)
        self.run_button.on_click(lambda _button: self.start())
        self.reset_button.on_click(lambda _button: self.reset())
        self.tabs.observe(lambda _change: self._show_tab(), names="selected_index")
        if parameters is not None:
            self.set(parameters.model_dump())
        self.widget = self._lay_out()
        self._quiet = False
        self._changed()
        if run is not None:
            self._show()

    def values(self) -> dict[str, Any]:
        """Return every parameter as the controls show it; hidden ones keep their defaults.

        Raises
        ------
        ParameterError
            A list that cannot be read.
        """
        return {c.name: c.value if self._shown(c.name) else c.row["default"] for c in self.controls.values()}

    def set(self, values: dict[str, Any]) -> None:
        """Show `values`, by parameter name."""
        self._quiet = True
        for name, value in values.items():
            self.controls[name].value = value
        self._quiet = False
        self._changed()

    def reset(self) -> None:
        """Go back to every default; what was said of other values no longer holds."""
        self.message.value = ""
        self.set({name: control.row["default"] for name, control in self.controls.items()})

    def start(self) -> None:
        """Run with what the controls show, and show the run; an error becomes one message."""
        self.run_button.disabled, self.run_button.description = True, "Running…"
        self.message.value = ""
        try:
            parameters = registry.check(self.flow, self.values())
            made = self.flow.run(parameters, progress=self._progress())
        except KitError as wrong:
            self._complain(str(wrong))
        else:
            self.run, self._previous = made, self.run
            self.message.value = ""
            self._show()
        finally:
            self.run_button.disabled, self.run_button.description = False, "Run"

    def _progress(self) -> registry.Progress:
        """Return a progress callback that writes at most ten times a second."""
        last = 0.0

        def tell(share: float, stage: str) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                words = escape(stage.replace("_", " "))
                self.message.value = f'<span style="color:{MUTED}">{words}: {share:.0%}</span>'

        return tell

    def _complain(self, words: str) -> None:
        self.message.value = (
            f'<div role="alert" style="border-left:4px solid {VERMILION};background:#fdf0e8;color:{INK};'
            f'padding:6px 12px;line-height:1.4">{escape(words)}</div>'
        )

    def _shown(self, name: str) -> bool:
        program = self.controls.get("program")
        return program is None or self.controls[name].read_by(program.value)

    def _changed(self) -> None:
        """Show the parameters that the chosen program reads, and how many differ from their defaults."""
        if self._quiet:
            return
        for name, control in self.controls.items():
            control.box.layout.display = "" if self._shown(name) else "none"
        for group, heading in self._groups:
            names = [name for name, control in self.controls.items() if control.row["group"] == group]
            heading.layout.display = "" if any(map(self._shown, names)) else "none"
        count = sum(self._shown(name) and not control.is_default for name, control in self.controls.items())
        self.count.value = f'<span style="color:{MUTED};font-size:12px">{count} changed</span>'

    def _show(self) -> None:
        """Render the headline, the overview and the open tab; the other tabs wait until they are opened."""
        if self.run is None:
            return
        self.headline.value = headline_sheet(len(headlines(self.run))) + headlines_html(self.run, self._previous)
        chosen = self.stage.value
        stages = [name for name, _start, _end in self.run.stages]
        self._quiet = True  # new options reset the choice, which is drawn once, below
        self.stage.options = [("whole run", ""), *((name.replace("_", " "), name) for name in stages)]
        self.stage.value = chosen if chosen in stages else ""
        self.stage.layout.display = ""
        self._quiet = False
        self._show_overview()
        for child in self.tabs.children:
            child.value = ""
        self._show_tab()

    def _show_overview(self) -> None:
        """Draw the overview of the chosen stage."""
        if self.run is not None and not self._quiet:
            self.overview.value = figures.overview(self.run, self.stage.value or "")._repr_html_()

    def _show_tab(self) -> None:
        at = self.tabs.selected_index
        if self.run is not None and at is not None and not self.tabs.children[at].value:
            self.tabs.children[at].value = view_html(self.run, self._titles[at])

    def _lay_out(self) -> widgets.Widget:
        """Return the controls and the views; the style sheet says whether beside or above each other."""
        groups: dict[str, list[widgets.Widget]] = {}
        for control in self.controls.values():
            groups.setdefault(control.row["group"], []).append(control.box)
        left: list[widgets.Widget] = []
        for group, boxes in groups.items():
            heading = _classed(widgets.HTML(f'<div class="farfault-group">{escape(group)}</div>'), "farfault-heading")
            self._groups.append((group, heading))
            left += [heading, *boxes]
        buttons = _classed(widgets.HBox([self.run_button, self.reset_button, self.count]), "farfault-buttons")
        side = widgets.VBox([buttons, _classed(widgets.VBox(left), "farfault-controls")])
        _classed(self.headline, "farfault-headline")
        _classed(self.overview, "farfault-overview")
        views = widgets.VBox([self.message, self.headline, self.stage, self.overview, self.tabs])
        body = [_classed(side, "farfault-side"), _classed(views, "farfault-views")]
        sheet = widgets.HTML(SHEET, layout=widgets.Layout(height="0", margin="0"))
        return _classed(
            widgets.VBox([sheet, _classed(widgets.Box(body), "farfault-body")]),
            "farfault-panel",
        )


def _classed(widget: widgets.DOMWidget, name: str) -> widgets.DOMWidget:
    """Return the widget with the class by which the style sheet knows it."""
    widget.add_class(name)
    return widget
