"""The result cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest

from kit.flows import registry
from kit.flows.run import Run
from kit.lab import show_result
from kit.lab.result import MIME


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENTRIES", {"fake_flow": registry.Entry("fake_flow", "fakes")})


def result_of(events: int = 2, **given: Any) -> Run:
    return fakes.FLOW.run(fakes.FakeParameters.check({"events": events, **given}))


def test_the_result_is_shown_as_json_and_in_words() -> None:
    run = result_of(lost=3)
    bundle = show_result(run)._repr_mimebundle_()
    assert bundle[MIME] == run.result() and json.loads(json.dumps(bundle[MIME])) == run.result()
    assert "7 pages checked, 3 lost" in bundle["text/plain"]
    assert "2 of 3 documented steps reached, 0 violations" in bundle["text/plain"]


def test_the_file_holds_the_whole_result_and_the_notebook_its_first_events(tmp_path: Path) -> None:
    run = result_of(events=1500)
    shown = show_result(run, str(tmp_path / "new" / "result.json"))
    assert len(shown.data["events"]) == 1000 and "first 1,000 of 1,500 events" in shown.text
    assert (tmp_path / "new" / "result.json").read_text("utf-8") == run.to_json()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["result.json"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        show_result(result_of(), str(tmp_path / "taken"))
