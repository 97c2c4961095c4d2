"""The same scenario and seed give the same bytes, in whatever process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest

import kit

SCENARIOS: dict[str, dict[str, Any]] = {
    "grid": {"program": "vector_add", "n": 1 << 18, "grid": 1024, "block": 256, "seed": 3},
    "oversubscribed": {
        "program": "stream",
        "buffer_bytes": 8 << 20,
        "pattern": "zipf",
        "touches": 5000,
        "oversubscription": 1.5,
    },
    "jitter": {"program": "stream", "buffer_bytes": 4 << 20, "pattern": "random", "jitter": 0.5, "seed": 7},
    "fight": {
        "program": "stream",
        "buffer_bytes": 8192,
        "touches": 20_000,
        "lanes": 1,
        "cpu_touches": 5000,
        "jitter": 0.1,
    },
    "cancel": {"program": "three_lines", "stray_bytes": 1 << 22},
    "lite": {"program": "vector_add", "machine": "k80", "n": 1 << 18},
}
SCRIPT = """
import hashlib, json, sys, kit
for line in sys.stdin:
    name, parameters = json.loads(line)
    print(name, hashlib.sha256(kit.run("cuda_demand_paging", **parameters).to_json().encode()).hexdigest())
"""


def elsewhere(hash_seed: str) -> dict[str, str]:
    lines = "".join(json.dumps([name, parameters]) + "\n" for name, parameters in SCENARIOS.items())
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, env=environment, check=True
    )
    return dict(line.split() for line in done.stdout.splitlines())


def test_two_processes_with_different_hash_seeds_agree_with_this_one() -> None:
    here = {
        name: hashlib.sha256(kit.run("cuda_demand_paging", **parameters).to_json().encode()).hexdigest()
        for name, parameters in SCENARIOS.items()
    }
    assert elsewhere("1") == elsewhere("2") == here


@pytest.mark.parametrize("name", ["jitter", "grid"])
def test_another_seed_is_another_run(name: str) -> None:
    one = kit.run("cuda_demand_paging", **SCENARIOS[name])
    other = kit.run("cuda_demand_paging", **{**SCENARIOS[name], "seed": 1234})
    assert one.events() != other.events()
    assert one.integrity.lost == other.integrity.lost == 0


def test_jitter_explores_other_interleavings_and_loses_nothing() -> None:
    seen = set()
    for seed in range(5):
        run = kit.run("cuda_demand_paging", **{**SCENARIOS["fight"], "seed": seed})
        assert run.integrity.lost == 0 and not run.conformance.violations
        seen.add(run.metrics["simulated_us"])
    assert len(seen) == 5
