"""rc_pingpong: what becomes of the run when one of the two programs gives up."""

from __future__ import annotations

import pytest

from kit.flows import registry


@pytest.mark.parametrize(
    ("scenario", "given"),
    [
        ("reclaimed", {"fail": "dead_owner"}),
        ("odp", {"fail": "dead_owner", "page_out": "madvise"}),
        ("inline", {"era": "new", "rnr_retry": 2, "timeout": 27}),
        ("iodp_prefetch", {"fail": "dma_list", "page_out": "madvise"}),
    ],
)
def test_a_program_that_waits_for_a_partner_that_gave_up_is_stopped(scenario: str, given: dict[str, object]) -> None:
    run = registry.run("rc_pingpong", scenario, given)
    gave_up = [error for error in run.errors if "Failed status" in error or "Couldn't" in error]
    stopped = [error for error in run.errors if "cannot come any more" in error]
    assert gave_up, run.errors
    assert len(stopped) == 1, run.errors
    assert not run.integrity.lost
