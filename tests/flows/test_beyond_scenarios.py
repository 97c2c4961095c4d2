"""Parameters that no shipped scenario sets: such runs are as sound as the shipped ones."""

from __future__ import annotations

import pytest

from kit.drivers.mlx5.enums import AccessMode
from kit.flows import registry

HUGE_AND_RECLAIMED = [
    ("mlx5_odp_mr", "default", {"pages": "transparent"}),
    ("mlx5_odp_mr", "default", {"pages": "transparent", "era": "new", "regions": 4, "bytes": 1 << 20}),
    ("hmm_mirror", "noisy_neighbour", {"thp": True, "children": 1, "child_fraction": 0.787, "jitter": 1.396}),
]


@pytest.mark.parametrize(("flow", "scenario", "given"), HUGE_AND_RECLAIMED)
def test_huge_pages_are_split_as_documented(flow: str, scenario: str, given: dict[str, object]) -> None:
    run = registry.run(flow, scenario, given)
    assert "split_folio" in run.conformance.steps_reached
    assert not run.conformance.violations
    assert not run.integrity.lost


def test_a_machine_may_have_more_memory_than_the_one_that_simulates_it() -> None:
    """32 GiB of host and device memory with whole pages, of which the run writes a few hundred KiB."""
    run = registry.run("hmm_mirror", "", {"device_type": "coherent", "payload_bytes": 4096, "bytes": 65536})
    assert run.integrity.pages_checked
    assert not run.integrity.lost


def test_a_dead_adapter_ends_in_an_error_and_not_in_endless_retries() -> None:
    run = registry.run("mlx5_implicit_mr", "dead_owner", {"fail": "device", "timeout": 12, "jitter": 1.823})
    assert run.errors
    assert all("RETRY_EXC_ERR" in error or "WR_FLUSH_ERR" in error for error in run.errors), run.errors
    assert not run.integrity.lost


@pytest.mark.parametrize(("how", "stale"), [("reclaim", 0), ("madvise", 256), ("rewrite", 256)])
def test_a_pinned_region_does_not_follow_what_the_program_does_to_its_addresses(how: str, stale: int) -> None:
    """Reclaim passes pinned pages by; after MADV_DONTNEED the addresses get others, and nobody tells the adapter."""
    run = registry.run("mlx5_odp_mr", "", {"page_out": how, "kind": "pinned", "bytes": 1 << 20})
    assert run.metrics["stale_pages_detected"] == run.metrics["lost_pages"] == stale
    assert bool(run.errors) == bool(stale)
    assert all("stale data" in error for error in run.errors)
    followed = registry.run("mlx5_odp_mr", "", {"page_out": how, "kind": "explicit", "bytes": 1 << 20})
    assert followed.metrics["stale_pages_detected"] == followed.metrics["lost_pages"] == 0


@pytest.mark.parametrize("odp", [False, True])
def test_a_pinned_buffer_whose_pages_were_given_up_receives_messages_nobody_sees(odp: bool) -> None:
    run = registry.run("rc_pingpong", "", {"page_out": "madvise", "odp": odp})
    assert any("stale data" in error for error in run.errors) == (not odp)
    assert bool(run.integrity.lost) == (not odp)


def test_looking_at_a_table_does_not_fill_it() -> None:
    """A child's table has 2**18 entries, of which a run fills a few: the others cost nothing when the key goes."""
    session = registry.open("mlx5_implicit_mr", given={"areas": 3, "rounds": 2})
    session.finish()
    tables = [key for key in session.responder.dev.hca.mkeys.mkeys.values() if len(key.entries) == 1 << 18]
    children = [key for key in tables if key.mkc.access_mode == AccessMode.MTT]
    assert len(children) >= 3
    assert [key.filled for key in children if key.filled.stop - key.filled.start > 64] == []


@pytest.mark.parametrize("given", [{"area_bytes": 1 << 40}, {"host_memory_bytes": 1 << 44}])
def test_memory_that_nobody_touches_costs_nothing(given: dict[str, object]) -> None:
    """An area of 1 TiB of which four pages are written; a host with 16 TiB."""
    run = registry.run("mlx5_implicit_mr", "", given)
    assert not run.integrity.lost and not run.errors
    assert run.integrity.pages_checked == int(str(given.get("area_bytes", 16384))) // 4096
