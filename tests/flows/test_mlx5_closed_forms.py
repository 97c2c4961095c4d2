"""Events, walks, work requests and counters of every shipped scenario, each as the sum that it has to be.

A registration, a child, a fault, an invalidation and a deregistration each cost a known number of UMR work requests and
walks. A scenario is one line that says how many of each there are, from its own parameters; what only the order of a
race decides is held to what must be true of it in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kit import paths
from kit.flows import registry

FLOWS = ("mlx5_implicit_mr", "mlx5_odp_mr", "rc_pingpong", "rdma_follows_migration")
CHUNK = (1 << 20) - 64  # bytes of translations in one request, MLX5_MAX_UMR_CHUNK
REVOKE = 1


def wqes(entries: int, size: int = 8) -> int:
    """UMR work requests for so many translations of `size` bytes."""
    return -(-entries * size // CHUNK)


KSM, CHILD = wqes(1 << 17, 16), wqes(1 << 18)  # an implicit parent, and a child: every entry empty
PINNED = 1 + REVOKE  # a small pinned region, such as the requester's buffer, from its registration to its end


def explicit(faults: int, zaps: int = 0, entries: int = 1) -> int:
    """A region on demand: its snapshot, a request for each fault and each zap, its revocation."""
    return wqes(entries) + faults + zaps + REVOKE


def implicit(children: int, faults: int, zaps: int = 0, freed: int = 0, slots: int | None = None) -> int:
    """An implicit region: the parent, its children and an update of its slots for each; a freed child two more."""
    alive = children - freed
    updates = children if slots is None else slots
    return KSM + children * CHILD + updates + faults + zaps + freed * 2 + (alive + 1) * REVOKE


def bug(pages: int) -> int:
    """How kernels from 5.19 to 6.14 count the invalidation of a run: 1 + 2 + 3 ..."""
    return pages * (pages + 1) // 2


@dataclass(frozen=True)
class Sums:
    """What a scenario comes to: page-fault events, walks, UMR work requests, and the regions' counters by name."""

    eqes: int
    walks: int
    wqes: int
    counters: dict[str, int] = field(default_factory=dict)
    failed: int = 0  # events that are resumed with an error


def on_demand(region: str, faults: int, invalidations: int = 0, prefetch: int = 0) -> dict[str, int]:
    """A region's counters: pages."""
    return {
        f"{region}_page_faults": faults, f"{region}_page_invalidations": invalidations,
        f"{region}_page_prefetch": prefetch,
    }  # fmt: skip


BUFFER = 1  # the requester's own registration, which nobody deregisters
# What a message without its length brings: a packet's page, and from the second fault on as much as had come before
BLIND_FAULTS, BLIND_WALKS, BLIND_PAGES = 1 + 4, 1 + 2 * 4, 1 + sum(1 + 2**n for n in range(4))

SUMS = {
    # area and message sizes are the scenarios': pages touched / messages, in two rounds unless they say one
    "mlx5_implicit_mr": {
        "default": Sums(2, 2, BUFFER + implicit(2, 2, zaps=1, freed=1), on_demand("implicit", 2 * 2)),
        "worked_trace": Sums(1, 1, BUFFER + implicit(1, 1, zaps=1, freed=1), on_demand("implicit", 2)),
        "unmapped": Sums(2, 2, BUFFER + implicit(2, 1, zaps=1, freed=1), on_demand("implicit", 2), failed=1),
        "across_a_gigabyte": Sums(
            2, 4, BUFFER + implicit(4, 4, zaps=2, freed=2, slots=2), on_demand("implicit", 2 * 16)
        ),
        "eight_gigabytes": Sums(
            2 * 8 * 16, 2 * 8 * 16, BUFFER + implicit(16, 256, zaps=8, freed=8), on_demand("implicit", 2 * 8 * 64)
        ),
        "length_unknown": Sums(
            2 * BLIND_FAULTS, 2 * BLIND_WALKS, BUFFER + implicit(2, 2 * BLIND_WALKS, zaps=1, freed=1),
            on_demand("implicit", 2 * BLIND_PAGES),
        ),
        "many_queue_pairs": Sums(64, 64, 64 * BUFFER + implicit(64, 64), on_demand("implicit", 64 * 4)),
        "memory_scheme": Sums(
            8, 8, BUFFER + implicit(2, 8, zaps=1, freed=1),
            {**on_demand("implicit", 2 * 64), "implicit_page_faults_handled": 8},
        ),
        "remote_reads": Sums(8, 8, BUFFER + implicit(2, 8, zaps=1, freed=1), on_demand("implicit", 2 * 64)),
        "resident": Sums(32, 32, BUFFER + implicit(2, 32, zaps=1, freed=1), on_demand("implicit", 2 * 256)),
        # every other of 256 pages goes, each by itself; the child keeps the others
        "reclaimed": Sums(32, 32, BUFFER + implicit(1, 32, zaps=128), on_demand("implicit", 2 * 256)),
        "packet_damming": Sums(3, 3, BUFFER + implicit(1, 3), on_demand("implicit", 3 * 2)),
    },
    "mlx5_odp_mr": {
        "default": Sums(
            4, 1 + 4, BUFFER + PINNED + explicit(2, zaps=1) + implicit(2, 2, zaps=1, freed=1),
            {**on_demand("explicit", 2 * 1024, bug(1024)), **on_demand("implicit", 2 * 1024)},
        ),
        # since 6.16 each translation that is written anew is counted as one more page, so the child is never found empty
        "linux_7": Sums(
            16, 1 + 16, BUFFER + PINNED + explicit(8, zaps=1) + implicit(1, 8, zaps=1),
            {
                **on_demand("explicit", 2 * 256, 256), **on_demand("implicit", 2 * 256),
                "explicit_page_faults_handled": 8, "explicit_page_invalidations_handled": 1,
                "implicit_page_faults_handled": 8,
            },
        ),
        "resident": Sums(
            1, 1 + 1, BUFFER + PINNED + explicit(0) + implicit(1, 1),
            {**on_demand("explicit", 0), **on_demand("implicit", 1024)},
        ),
        # eight messages of 1 MiB: the snapshot finds the first huge page, which serves the first two
        "transparent_huge_pages": Sums(
            6 + 8, 1 + 14, BUFFER + PINNED + explicit(6) + implicit(1, 8),
            {**on_demand("explicit", 6 * 256), **on_demand("implicit", 8 * 256)},
        ),
        "hugetlb": Sums(4, 1 + 4, BUFFER + explicit(4), on_demand("explicit", 4 * 512)),
        "memory_lock_limit": Sums(
            2, 1 + 2, BUFFER + explicit(1) + implicit(1, 1),
            {**on_demand("explicit", 1024), **on_demand("implicit", 1024)},
        ),
        "minor_fault_4_kib": Sums(1, 1 + 1, BUFFER + explicit(1, zaps=1), on_demand("explicit", 1, bug(1))),
        "minor_fault_4_mib": Sums(1, 1 + 1, BUFFER + explicit(1, zaps=1), on_demand("explicit", 1024, bug(1024))),
        "prefetched": Sums(
            0, 1 + 2, BUFFER + PINNED + explicit(1) + implicit(1, 1),
            {**on_demand("explicit", 0, prefetch=1024), **on_demand("implicit", 0, prefetch=1024)},
        ),
        "prefetched_in_background": Sums(
            0, 1 + 2, BUFFER + PINNED + explicit(1) + implicit(1, 1),
            {**on_demand("explicit", 0, prefetch=1024), **on_demand("implicit", 0, prefetch=1024)},
        ),
        # every other page is there; a fault brings what a message of 16 pages has from its first missing page on
        "prefetched_without_faults": Sums(
            2 * 16, 1 + 2 + 32, BUFFER + PINNED + explicit(1 + 16) + implicit(1, 1 + 16),
            {**on_demand("explicit", 16 * 15, prefetch=256), **on_demand("implicit", 16 * 15, prefetch=256)},
        ),
        "larger_than_the_cache": Sums(
            4, 1 + 4, BUFFER + explicit(4, entries=(17 << 30) // 4096), on_demand("explicit", 892)
        ),
        "deregister_10000": Sums(0, 10_000, 10_000 * explicit(0), on_demand("explicit", 0)),
        "deregister_10000_srcu": Sums(0, 10_000, 10_000 * explicit(0), on_demand("explicit", 0)),
        "deregister_10000_pinned": Sums(0, 0, 10_000 * PINNED),
    },
    # both hosts have one region
    "rc_pingpong": {
        "default": Sums(0, 0, 2 * PINNED),
        "odp": Sums(0, 2, 2 * explicit(0), {**on_demand("client", 0), **on_demand("server", 0)}),
        "reclaimed": Sums(
            10, 2 + 10, explicit(0) + explicit(10, zaps=10),
            {**on_demand("client", 0), **on_demand("server", 10 * 16, 10 * bug(16))},
        ),
        "iodp": Sums(2, 2, 2 * implicit(1, 1), {**on_demand("client", 1), **on_demand("server", 1)}),
        "inline": Sums(2, 2, 2 * implicit(1, 1), {**on_demand("client", 1), **on_demand("server", 1)}),
        "iodp_prefetch": Sums(
            0, 2, 2 * implicit(1, 1), {**on_demand("client", 0, prefetch=1), **on_demand("server", 0, prefetch=1)}
        ),
        "half_a_gigabyte": Sums(
            0, 2, 2 * implicit(1, 1),
            {**on_demand("client", 0, prefetch=122_071), **on_demand("server", 0, prefetch=122_071)},
        ),
    },
    # 16 pages, four messages; two moves, each followed by the messages
    "rdma_follows_migration": {
        # a walk that finds a page on the GPU brings it home and looks again
        "default": Sums(
            8, 1 + 2 * 8, BUFFER + explicit(8, zaps=2), on_demand("explicit", 2 * 16, 2 * bug(16))
        ),
        "file_system": Sums(8, 1 + 8, BUFFER + explicit(8, zaps=2), on_demand("explicit", 2 * 16, 2 * bug(16))),
        "implicit": Sums(
            12, 4 + 2 * 8, BUFFER + implicit(3, 12, zaps=2, freed=2), on_demand("implicit", 3 * 16)
        ),
        "pinned": Sums(0, 0, BUFFER + PINNED),
        "file_system_pinned": Sums(0, 0, BUFFER + PINNED),
        # one page on demand lies beside the dma-buf: its snapshot is the one walk
        "dma_buf": Sums(4, 1, BUFFER + explicit(0) + explicit(4, zaps=4)),
        "dma_buf_no_peer": Sums(2, 1, BUFFER + explicit(0) + explicit(2, zaps=2)),
        "dma_buf_pinned": Sums(0, 1, BUFFER + explicit(0) + explicit(0)),
    },
}  # fmt: skip
# Who comes first decides how many there are; what they come to is checked with the numbers of the run.
RACES = {
    "mlx5_implicit_mr": {"every_byte", "no_fault_objects", "racing"},
    "mlx5_odp_mr": {"prefetched_read_only"},  # copy-on-write takes the pages back under the walks
    "rc_pingpong": set[str](),
    "rdma_follows_migration": {"gpu_during", "file_system_during", "dma_buf_during"},
}
# Nothing comes of their one event: no page is counted.
FAILURES = {"mlx5_implicit_mr": {"dead_owner": 0, "umr_error": 1}}  # and walks


@pytest.mark.parametrize("flow", FLOWS)
def test_every_shipped_scenario_has_its_sums(flow: str) -> None:
    assert {*SUMS[flow], *RACES[flow], *FAILURES.get(flow, {})} == set(paths.scenarios(flow))


@pytest.mark.parametrize(("flow", "scenario"), [(flow, name) for flow in FLOWS for name in SUMS[flow]])
def test_a_scenario_comes_to_its_sums(flow: str, scenario: str) -> None:
    m, sums = registry.run(flow, scenario).metrics, SUMS[flow][scenario]
    assert m["eqes"] == m["faults"] == m["resumes"] == sums.eqes
    assert bool(sums.eqes) <= m["interrupts"] <= sums.eqes  # events that come together share one
    assert m["resumes_in_error"] == sums.failed
    assert m["hmm_walks"] == sums.walks
    assert m["umr_wqes"] == sums.wqes
    counted = ("_page_faults", "_page_invalidations", "_page_prefetch", "_handled")
    assert {name: value for name, value in m.items() if name.endswith(counted) and value} == {
        name: value for name, value in sums.counters.items() if value
    }
    assert m["lost_pages"] == m["stale_dma"] == 0


@pytest.mark.parametrize(("flow", "scenario"), [(flow, name) for flow in FLOWS for name in sorted(RACES[flow])])
def test_a_race_ends_with_every_event_resumed_once_and_nothing_lost(flow: str, scenario: str) -> None:
    m = registry.run(flow, scenario).metrics
    assert m["eqes"] == m["faults"] == m["resumes"] > 0
    assert m["hmm_walks"] >= m["faults"] or scenario.startswith("dma_buf")
    assert m["resumes_in_error"] == m["lost_pages"] == m["stale_dma"] == 0


@pytest.mark.parametrize(("scenario", "walks"), FAILURES["mlx5_implicit_mr"].items())
def test_a_failure_is_one_event_resumed_with_an_error(scenario: str, walks: int) -> None:
    m = registry.run("mlx5_implicit_mr", scenario).metrics
    assert m["eqes"] == m["faults"] == m["resumes"] == m["resumes_in_error"] == 1
    assert m["hmm_walks"] == walks
    assert m["implicit_page_faults"] == m["lost_pages"] == m["stale_dma"] == 0


@pytest.mark.parametrize("scenario", sorted(RACES["mlx5_implicit_mr"]))
def test_whoever_comes_first_the_work_requests_add_up(scenario: str) -> None:
    """A child that loses the race to its slot has been filled and enabled, is revoked, and its slot written once more."""
    run = registry.run("mlx5_implicit_mr", scenario)
    m, trace = run.metrics, run.trace
    made, freed = int(m["children_created"]), int(m["children_destroyed"])
    losers = int((trace.spans.column("step") == trace.steps.ids["implicit_get_child_mr"]).sum()) - made
    wanted = implicit(made, int(m["hmm_walks"]), zaps=int(m["invalidations"]), freed=freed)
    assert m["umr_wqes"] == run.parameters["qps"] * BUFFER + wanted + losers * (CHILD + 1 + REVOKE)
    assert (losers > 0) == (run.parameters["qps"] > 1)


def test_a_random_reclaim_is_one_invalidation_for_each_run_of_pages() -> None:
    run = registry.run("mlx5_implicit_mr", "every_byte")
    moves = run.trace.moves.array()
    assert run.metrics["invalidations"] == int((moves[:, 5] == 0).sum())
