"""Sweeps in processes of their own."""

from __future__ import annotations

from pathlib import Path

from kit.batch import sweep


def test_outcomes_stand_in_the_plans_order_whatever_came_first(tmp_path: Path, monkeypatch) -> None:
    points = [{"size": size} for size in (1, 2, 3)]
    outcome = {"lost": 0, "violations": 0, "error": "", "steps_reached": 1, "pages_checked": 1}
    come = [(number, {"faults": number, **outcome}) for number in (2, 0, 1)]
    monkeypatch.setattr(sweep, "_results", lambda *_: iter(come))
    seen: list[float] = []
    file, failed = sweep.run_sweep(
        "any", points, ["size"], tmp_path, jobs=2, progress=lambda share, _text: seen.append(share)
    )
    assert failed == 0
    assert seen == [1 / 3, 2 / 3, 1]
    assert file.read_text().splitlines() == [
        "size,faults,steps_reached,violations,pages_checked,lost,error",
        "1,0,1,0,1,0,",
        "2,1,1,0,1,0,",
        "3,2,1,0,1,0,",
    ]
