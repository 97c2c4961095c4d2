"""The controls: made from the model, honest about errors, showing what was run."""

from __future__ import annotations

import re
from typing import Any

import fakes
import pytest
from synthetic import empty_run, sequential_run

import kit.lab
from kit.errors import ParameterError
from kit.flows import registry
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.run import Run
from kit.lab.inputs import Control, named_choices, stops
from kit.lab.panel import Panel
from kit.lab.style import SHEET
from kit.lab.views import headlines, headlines_html


class Recorded:
    """A flow that gives prepared runs back and remembers what it was asked to run."""

    name, title, Parameters = "cuda_demand_paging", "A flow", CudaParameters

    def __init__(self, *runs: Run) -> None:
        self.runs, self.asked = list(runs), list[Any]()

    def run(self, parameters: Any, scenario: str = "", progress: Any = None) -> Run:
        self.asked.append(parameters)
        progress(0.5, "first_touch")
        return self.runs.pop(0)

    def open(self, parameters: Any) -> Any:
        raise AssertionError("the panel runs whole flows, it does not open them")


def ready(blocks: int = 2, gpu_blocks: int = 2) -> Run:
    run = sequential_run(blocks, gpu_blocks)
    run.metrics["simulated_us"] = run.stages[-1][2]
    return run


def shown(panel: Panel) -> set[str]:
    return {name for name, control in panel.controls.items() if control.box.layout.display != "none"}


def test_there_is_a_control_for_each_parameter_with_its_default() -> None:
    panel = Panel(Recorded())
    assert set(panel.controls) == set(CudaParameters.model_fields)
    assert panel.values() == CudaParameters.check({}).model_dump()
    assert CudaParameters.check(panel.values()) == CudaParameters.check({})


@pytest.mark.parametrize("program", ["three_lines", "vector_add", "unit_touch", "stream", "trace"])
def test_only_what_the_program_reads_is_shown(program: str) -> None:
    panel = Panel(Recorded())
    panel.controls["program"].value = program
    expected = {r["name"] for r in CudaParameters.rows() if not r["programs"] or program in r["programs"]}
    assert shown(panel) == expected


def test_a_model_without_programs_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENTRIES", {"fake_flow": registry.Entry("fake_flow", "fakes")})
    panel = Panel(fakes.FakeFlow())
    assert shown(panel) == set(fakes.FakeParameters.model_fields)


def test_what_differs_from_the_default_is_marked_and_reset_clears_it() -> None:
    panel = Panel(Recorded(), CudaParameters.check({"n": 4096, "init": "gpu"}))
    assert "2 changed" in panel.count.value
    marked = {name for name, c in panel.controls.items() if 'title="changed"' in c._label.value}
    assert marked == {"n", "init"}
    panel.reset_button.click()
    assert "0 changed" in panel.count.value
    assert panel.values() == CudaParameters.check({}).model_dump()


def test_run_runs_what_the_controls_show_and_compares_with_the_run_before() -> None:
    flow = Recorded(ready(2, 2), ready(3, 2))
    panel = Panel(flow)
    panel.controls["prefetch_threshold"].value = 75
    panel.run_button.click()
    assert flow.asked[0].prefetch_threshold == 75
    assert not panel.run_button.disabled and panel.message.value == ""
    assert "12</b>" in panel.headline.value and "no change" not in panel.headline.value
    panel.run_button.click()
    assert "18</b>" in panel.headline.value and ">+6<" in panel.headline.value  # six more fault groups
    assert panel.overview.value.count("<img alt=") == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefetch_threshold", 400, "prefetch_threshold = 400: allowed is a whole number at least 1 and at most 100"),
        ("oversubscription", -1.0, "oversubscription = -1.0"),
        ("gpu_memory_bytes", -5, "gpu_memory_bytes = -5"),
    ],
)
def test_a_value_out_of_bounds_is_one_message_and_nothing_runs(name: str, value: Any, message: str) -> None:
    flow = Recorded(ready())
    panel = Panel(flow)
    panel.controls[name].value = value
    panel.run_button.click()
    assert message in panel.message.value and flow.asked == []
    assert not panel.run_button.disabled and panel.run_button.description == "Run"


def test_a_list_that_cannot_be_read_is_named() -> None:
    panel = Panel(Recorded())
    panel.controls["program"].value = "unit_touch"
    panel.controls["touch_units"]._input.value = "1, two"
    panel.run_button.click()
    assert "touch_units = &#x27;1, two&#x27;: allowed is whole numbers" in panel.message.value
    panel.controls["touch_units"]._input.value = "3,1 ,2,"
    assert panel.controls["touch_units"].value == [3, 1, 2]


def test_a_stage_can_be_looked_at_alone_and_stays_chosen() -> None:
    panel = Panel(Recorded(ready()), run=ready())
    whole = panel.overview.value
    panel.stage.value = "kernel"
    assert panel.overview.value != whole and "first appear" not in panel.overview.value
    panel.run_button.click()
    assert panel.stage.value == "kernel" and "first appear" not in panel.overview.value


def test_tabs_are_rendered_when_they_are_opened() -> None:
    panel = Panel(Recorded(), run=ready())
    assert [bool(child.value) for child in panel.tabs.children] == [True, False, False, False]
    panel.tabs.selected_index = 2
    assert "How big" in panel.tabs.children[2].value or "<img alt=" in panel.tabs.children[2].value


def test_sliders_follow_their_box_and_the_box_its_slider() -> None:
    rows = {row["name"]: row for row in CudaParameters.rows()}
    control = Control(rows["n"], lambda: None)
    slider = control.box.children[1].children[0]
    control.value = 1 << 12
    assert stops(rows["n"])[slider.value] == 1 << 12
    slider.value += 1
    assert control.value == 1 << 13
    control.value = 5000  # between two stops: the box keeps it
    assert control.value == 5000 and stops(rows["n"])[slider.value] == 4096
    assert stops(rows["prefetch_threshold"]) == [float(i) for i in range(1, 101)]
    assert stops(rows["seed"]) == []


def test_headlines_count_what_the_trace_holds() -> None:
    run = ready(6, 4)
    words = {h.label: h.text for h in headlines(run)}
    assert (words["GPU fault groups"], words["CPU faults"], words["chunks evicted"]) == ("36", "40", "2")
    assert (words["host to device"], words["device to host"]) == ("12 MiB", "12 MiB")
    run.conformance.violations.append("x does not call y")
    assert "documented steps, 1 violation<" in headlines_html(run)


def test_nothing_is_computed_where_nobody_can_move_a_slider() -> None:
    assert not kit.lab.interactive()
    found = kit.lab.explore(Recorded(), None, empty_run())
    assert "JupyterLab" in str(found) and found.png is None


def test_a_wrong_list_raises_with_the_parameters_name() -> None:
    row = next(r for r in CudaParameters.rows() if r["name"] == "touch_units")
    control = Control(row, lambda: None)
    control._input.value = "x"
    with pytest.raises(ParameterError, match="touch_units"):
        _ = control.value


def test_reset_takes_the_error_of_other_values_away() -> None:
    panel = Panel(Recorded())
    panel.controls["prefetch_threshold"].value = 400
    panel.run_button.click()
    assert "prefetch_threshold = 400" in panel.message.value
    panel.reset_button.click()
    assert panel.message.value == ""


def test_values_with_names_are_shown_with_them_and_run_as_values() -> None:
    flow = Recorded(ready())
    panel = Panel(flow)
    policy = panel.controls["fault_replay_policy"]
    labels = [label for label, _value in policy._input.options]
    assert labels == ["0 · BLOCK", "1 · BATCH", "2 · BATCH_FLUSH", "3 · ONCE"]
    assert policy._input.label == "2 · BATCH_FLUSH" and policy.value == 2
    policy.value = 3
    panel.run_button.click()
    assert flow.asked[0].fault_replay_policy == 3


def test_values_without_names_are_shown_alone() -> None:
    rows = {row["name"]: row for row in CudaParameters.rows()}
    assert dict(named_choices(rows["payload_bytes"])) == {
        "8 · a stamp": 8,
        "64": 64,
        "512": 512,
        "4096 · all of it": 4096,
    }
    assert dict(named_choices(rows["init"])) == {word: word for word in rows["init"]["choices"]}


@pytest.mark.parametrize("flow", list(registry.ENTRIES))
def test_named_choices_hold_every_choice_of_every_model(flow: str) -> None:
    for row in registry.entry(flow).load().Parameters.rows():
        assert [value for _label, value in named_choices(row)] == list(row["choices"])


def test_the_words_beside_a_check_box_are_whole() -> None:
    control = Panel(Recorded()).controls["fault_coalesce"]
    assert control._input.description == "merge duplicate faults while fetching"
    assert "farfault-check" in control._input._dom_classes
    assert re.search(r"\.farfault-check label \{[^}]*white-space: normal;", SHEET)
    assert re.search(r"\.farfault-check \{[^}]*height: auto;", SHEET)
