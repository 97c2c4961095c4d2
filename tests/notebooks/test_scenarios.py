"""Every scenario file, executed as a notebook through papermill, gives what its golden says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import paths
from kit.batch import expected, runs
from kit.flows import registry

SCENARIOS = [(flow, name) for flow in registry.ENTRIES for name in sorted(paths.scenarios(flow))]


@pytest.mark.parametrize(("flow", "scenario"), SCENARIOS, ids=[f"{f}-{s}" for f, s in SCENARIOS])
def test_a_scenario_gives_its_golden(flow: str, scenario: str, tmp_path: Path) -> None:
    assert runs.run_batch(runs.plan(flow, scenario), tmp_path / "out", progress=False) == 0
    result = json.loads((tmp_path / "out" / flow / f"{scenario}.json").read_text("utf-8"))
    assert expected.differences(result, expected.load(flow)[scenario]) == []
    assert result["conformance"]["violations"] == [] and result["integrity"]["lost"] == 0


@pytest.mark.parametrize("flow", registry.ENTRIES)
def test_every_golden_has_a_scenario(flow: str) -> None:
    assert sorted(expected.load(flow)) == sorted(paths.scenarios(flow))
