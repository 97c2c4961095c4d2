"""``import kit``: flows, run, open and explore by name."""

from __future__ import annotations

import fakes
import pytest

import kit
from kit.errors import ParameterError


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    fakes.install(monkeypatch, tmp_path_factory.mktemp("project"))


def test_flows_are_shown_one_a_line() -> None:
    assert repr(kit.flows()) == "fake_flow  A flow that does nothing"
    assert dict(kit.flows()) == {"fake_flow": fakes.FLOW}


def test_run_reads_the_scenario_first() -> None:
    assert kit.scenarios("fake_flow") == ["broken", "default"]
    assert kit.run("fake_flow").parameters["size"] == 4096
    assert kit.run("fake_flow", "default").parameters["size"] == 8192
    changed = kit.run("fake_flow", scenario="default", size=1, share=1)
    assert (changed.scenario, changed.parameters["size"], changed.parameters["share"]) == ("default", 1, 1.0)


def test_open_takes_the_same() -> None:
    scenario, parameters = kit.open("fake_flow", scenario="default", events=5)
    assert (scenario, parameters.size, parameters.events) == ("default", 8192, 5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kit.run("fake_flaw"), "flow = 'fake_flaw': allowed is one of fake_flow. Did you mean 'fake_flow'?"),
        (lambda: kit.flows()["fake_flaw"], "Did you mean 'fake_flow'?"),
        (lambda: kit.scenarios("fake_flaw"), "Did you mean 'fake_flow'?"),
        (lambda: kit.open("fake_flow", "defaults"), "Did you mean 'default'?"),
        (lambda: kit.run("fake_flow", sise=1), "Did you mean 'size'?"),
        (lambda: kit.run("fake_flow", size="1"), "size = '1': allowed is a whole number"),
        (lambda: kit.explore("fake_flow", size=0), "size = 0: allowed is a whole number"),
    ],
)
def test_a_wrong_name_or_value_is_explained(call, says: str) -> None:
    with pytest.raises(ParameterError) as wrong:
        call()
    assert says in str(wrong.value)


def test_flows_know_what_they_have() -> None:
    assert "fake_flow" in kit.flows()
    assert "fake_flaw" not in kit.flows()
    assert len(kit.flows()) == 1
