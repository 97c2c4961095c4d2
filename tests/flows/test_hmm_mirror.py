"""The HMM flow: its stages, what each parameter changes, and that nothing is lost whatever goes on beside it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kit
from kit.errors import ParameterError
from kit.flows.hmm_mirror.parameters import HmmParameters
from kit.flows.hmm_mirror.structure import Structure, rewritten
from kit.flows.run import Run
from kit.memory.types import Kind

SMALL: dict[str, Any] = {"bytes": 64 << 12, "children": 0, "explicit_copies": False}


def run(**changes: Any) -> Run:
    made = kit.run("hmm_mirror", **{**SMALL, **changes})
    assert made.integrity.lost == 0 and made.conformance.violations == []
    return made


def structure(**given: Any) -> Structure:
    return Structure(HmmParameters.check(given), np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["list", "tree", "graph"])
@pytest.mark.parametrize("order", ["sequential", "strided", "random"])
@pytest.mark.parametrize("pages", [1, 2, 7, 64])
def test_every_pointer_leads_to_a_node(kind: str, order: str, pages: int) -> None:
    made, base = structure(structure=kind, order=order, bytes=pages << 12), 1 << 30
    assert sorted(made.place.tolist()) == list(range(pages))
    words = made.words(base)
    targets = (words[words != 0].astype(np.int64) - base) >> 12
    assert ((targets >= 0) & (targets < pages)).all()
    assert len(made.walk()) == pages


def test_a_list_is_walked_along_its_pointers() -> None:
    made, base = structure(structure="list", order="random", bytes=40 << 12), 1 << 30
    words, walk = made.words(base), made.walk()
    followed = [int(walk[0])]
    while words[followed[-1]]:
        followed.append((int(words[followed[-1]]) - base) >> 12)
    assert followed == walk.tolist()


def test_a_tree_is_walked_from_leaves_to_the_root() -> None:
    made, base = structure(structure="tree", order="random", bytes=31 << 12), 1 << 30
    words, walk = made.words(base), made.walk().tolist()
    for here, then in pairwise(walk):
        if words[here]:
            assert (int(words[here]) - base) >> 12 == then


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 1 << 40).map(lambda n: n << 12), st.integers(0, 1 << 40).map(lambda n: n << 12)
)
def test_rewriting_there_and_back_gives_the_same_pointers(pages: int, old: int, new: int) -> None:
    words = structure(structure="graph", bytes=pages << 12).words(old + 4096) + np.uint64(5)
    again = rewritten(rewritten(words, old, new), new, old)
    assert (again == words).all()


def test_the_same_seed_gives_the_same_bytes() -> None:
    given = {**SMALL, "children": 2, "noise": "protect", "noise_interval": 30.0, "jitter": 0.3}
    assert kit.run("hmm_mirror", **given).to_json() == kit.run("hmm_mirror", **given).to_json()
    assert kit.run("hmm_mirror", **given).to_json() != kit.run("hmm_mirror", **given, seed=1).to_json()


def tables(made: Run, stage: str) -> Any:
    return next(each for each in made.views["tables"] if each.stage == stage)


def test_mirroring_moves_nothing_and_migration_moves_what_is_visited() -> None:
    made = run()
    mirror, migrate = tables(made, "mirror"), tables(made, "migrate")
    assert (mirror.cpu == Kind.PRESENT).all() and (mirror.device > 0).all() and not mirror.near.any()
    assert (migrate.cpu == Kind.DEVICE_PRIVATE).all() and migrate.near.all()
    assert made.metrics["migrate_moved_pages"] >= 64 and made.metrics["htod_bytes"] >= 64 << 12
    assert run(placement="mirror").metrics["bytes_moved"] == 0


def test_the_device_may_write_only_where_the_cpu_may_or_the_page_is_the_devices() -> None:
    made = run(children=2, noise="protect", noise_interval=20.0)
    for each in made.views["tables"]:
        writes = each.device == 2
        assert (each.writable | (each.cpu == Kind.DEVICE_PRIVATE))[writes].all(), each.stage


def test_the_cpu_brings_home_what_it_touches_and_nothing_else() -> None:
    made = run(cpu_fraction=0.25)
    after = tables(made, "cpu_touch")
    assert int((after.cpu == Kind.PRESENT).sum()) == 16
    assert not after.device[after.cpu == Kind.PRESENT].any(), "the mirror forgets what went home"


def test_a_coherent_device_needs_no_fault_to_be_read() -> None:
    made = run(device_type="coherent")
    assert (tables(made, "cpu_touch").cpu == 9).all()
    assert made.metrics["faults_home"] == 0


def test_a_huge_page_moves_as_one() -> None:
    small, huge = (kit.run("hmm_mirror", **{**SMALL, "bytes": 2 << 20, "thp": thp}) for thp in (False, True))
    assert huge.integrity.lost == 0 and huge.conformance.violations == []
    assert small.metrics["htod_copies"] >= 512 and huge.metrics["htod_copies"] * (2 << 20) == huge.metrics["htod_bytes"]
    assert huge.metrics["migrate_us"] < small.metrics["migrate_us"]


def test_eviction_keeps_pages_and_hands_them_over_without_a_copy() -> None:
    kept = run(oversubscription=2.0, cpu_fraction=1.0, evict_pages=8, fault_pages=8)
    assert kept.metrics["evicted_pages"] >= 32 and kept.metrics["handed_over_pages"] > 0
    copied = kept.metrics["dtoh_bytes"] >> 12
    assert copied == kept.metrics["evicted_pages"] + kept.metrics["faults_home"] - kept.metrics["handed_over_pages"]
    moved = run(oversubscription=2.0, cpu_fraction=1.0, evict_pages=8, fault_pages=8, eviction="migrate")
    assert moved.metrics["handed_over_pages"] == 0
    assert moved.metrics["faults_home"] < kept.metrics["faults_home"]


def test_pinned_pages_stay_where_they_are() -> None:
    made = run(pinned_pages=16)
    assert int((tables(made, "migrate").cpu == Kind.PRESENT).sum()) == 16


def test_an_invalidation_in_between_throws_the_answer_away() -> None:
    quiet = run(bytes=512 << 12, placement="mirror")
    noisy = run(bytes=512 << 12, placement="mirror", noise="unrelated", noise_interval=1.0)
    assert quiet.metrics["range_retries"] == 0 < noisy.metrics["range_retries"]


def test_without_hmm_every_pointer_is_rewritten_twice_and_a_large_structure_does_not_fit() -> None:
    made = run(explicit_copies=True, structure="list")
    assert made.metrics["pointers_rewritten"] == 2 * 63
    assert made.metrics["explicit_bytes"] == 2 * (64 << 12)
    assert run(explicit_copies=True, oversubscription=2.0).metrics["explicit_bytes"] == 0


CHANGES: dict[str, Any] = {
    "structure": "graph", "bytes": 128 << 12, "order": "sequential", "visits": 9, "write_fraction": 0.9,
    "explicit_copies": True, "placement": "mirror", "cpu_fraction": 0.75, "cpu_write_fraction": 0.0, "rounds": 3,
    "children": 2, "device_type": "coherent", "device_memory_bytes": 32 << 12, "oversubscription": 2.0,
    "pageout_fraction": 0.5, "pinned_pages": 8, "fault_pages": 8, "noise": "protect",
    "seed": 3, "jitter": 0.5,
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "thp": {"bytes": 2 << 20, "thp": True},
    "child_fraction": {"children": 1, "child_fraction": 0.5},
    "noise_interval": {"noise": "protect", "noise_interval": 20.0},
    "evict_pages": {"oversubscription": 2.0, "fault_pages": 8, "evict_pages": 4},
    "eviction": {"oversubscription": 2.0, "eviction": "migrate"},
    "left_fraction": {"evict_pages": 4, "left_fraction": 0.25},
}


@pytest.mark.parametrize("name", [*CHANGES, *BESIDE])
def test_every_parameter_changes_something(name: str) -> None:
    changed = BESIDE.get(name, {name: CHANGES.get(name)})
    before = {key: value for key, value in changed.items() if key != name}
    assert run(**changed).metrics != run(**before).metrics


def test_the_list_of_changes_is_complete() -> None:
    silent = {"machine", "payload_bytes"}  # one profile; more content of the same pages
    assert set(HmmParameters.model_fields) == {*CHANGES, *BESIDE, *silent}


@pytest.mark.parametrize("payload", [64, 4096])
def test_pages_may_carry_more(payload: int) -> None:
    assert run(payload_bytes=payload, children=1).metrics == run(children=1).metrics


@pytest.mark.parametrize(
    "given",
    [
        {"oversubscription": 2.0, "device_memory_bytes": 1 << 20},
        {"fault_pages": 24},
        {"pinned_pages": 65},
        {"placement": "mirror", "oversubscription": 2.0},
        {"bytes": 1 << 40},
        {"machine": "t4"},
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        kit.run("hmm_mirror", **{**SMALL, **given})


@settings(max_examples=12, deadline=None)
@given(
    st.fixed_dictionaries({
        "structure": st.sampled_from(["list", "tree", "graph"]),
        "bytes": st.integers(1, 96).map(lambda n: n << 12),
        "write_fraction": st.sampled_from([0.0, 0.5, 1.0]),
        "cpu_fraction": st.sampled_from([0.0, 0.5, 1.0]),
        "children": st.integers(0, 2),
        "device_type": st.sampled_from(["private", "coherent"]),
        "eviction": st.sampled_from(["hand_over", "migrate"]),
        "oversubscription": st.sampled_from([0.0, 1.0]),
        "left_fraction": st.sampled_from([0.0, 0.5, 1.0]),
        "fault_pages": st.sampled_from([1, 8, 512]),
        "noise": st.sampled_from(["none", "protect", "unrelated"]),
        "rounds": st.integers(1, 2),
        "seed": st.integers(0, 5),
    })
)  # fmt: skip
def test_nothing_is_lost_and_nothing_departs_from_the_documented_steps(given: dict[str, Any]) -> None:
    made = kit.run("hmm_mirror", **given, noise_interval=30.0)
    assert (made.integrity.lost, made.conformance.violations) == (0, [])
