"""When a replay may let an access through: not before the page's copy and its entry (map after copy, replay after map)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kit
from kit.drivers.uvm.replays import BATCH, BATCH_FLUSH, BLOCK, ONCE
from kit.flows.run import Run

POLICIES = {"BLOCK": BLOCK, "BATCH": BATCH, "BATCH_FLUSH": BATCH_FLUSH, "ONCE": ONCE}
PROGRAMS: dict[str, dict[str, Any]] = {
    "zipf": {"program": "stream", "pattern": "zipf", "buffer_bytes": 9465856},
    "random": {"program": "stream", "pattern": "random", "buffer_bytes": 8 << 20},
    "one lane": {"program": "stream", "pattern": "random", "buffer_bytes": 4 << 20, "lanes": 1, "touches": 3000},
    "grid": {"program": "vector_add", "n": 1 << 18, "grid": 64, "block": 256},
}


def spans(run: Run, step: str) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of a step's spans."""
    table, words = run.trace.spans, run.trace.steps.words
    rows = table.column("step") == (words.index(step) if step in words else -1)
    return {name: table.column(name)[rows] for name in ("start", "end", "va", "pages", "cause", "actor", "value")}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_kernel_ends_after_the_copies_that_it_waited_for(program: str, policy: str) -> None:
    run = kit.run("cuda_demand_paging", fault_replay_policy=POLICIES[policy], **PROGRAMS[program])
    copies, end = spans(run, "UvmEventTypeMigration"), spans(run, "kernel")["end"].max()
    to_gpu = copies["actor"] == run.trace.actors.words.index("copy HtoD")
    wanted = to_gpu & (copies["cause"] == run.trace.causes.words.index("coherence"))
    assert wanted.sum() > 5 and copies["end"][wanted].max() <= end
    assert run.integrity.lost == 0 and not run.conformance.violations


@pytest.mark.parametrize("program", PROGRAMS)
def test_tools_are_told_of_every_fault_group_and_of_one_a_block_with_a_replay_a_block(program: str) -> None:
    for policy in POLICIES.values():
        run = kit.run("cuda_demand_paging", fault_replay_policy=policy, **PROGRAMS[program])
        groups, blocks = spans(run, "UvmEventTypeGpuFault"), spans(run, "service_fault_batch_block")
        served = spans(run, "service_fault_batch_block_locked")["pages"].sum()
        assert run.metrics["gpu_fault_groups"] == len(groups["va"]) > 0
        assert groups["pages"].sum() == served, "no memory is short: each fault is served in one try"
        if policy == BLOCK:
            assert len(groups["va"]) == len(blocks["va"]) and (groups["pages"] <= 512).all()
