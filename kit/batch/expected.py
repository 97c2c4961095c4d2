"""Goldens: what every scenario of a flow gave when somebody last looked and agreed.

``scenarios/<flow>/expected.json`` changes only by this module's command, and the commit that carries
it says why::

    python -m kit.batch.expected [FLOW]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit import paths
from kit.flows import registry

__all__ = ["differences", "expected_file", "load", "pinned", "update"]


def expected_file(flow: str) -> Path:
    """Return where a flow's goldens are."""
    return paths.flow_file(flow).with_name("expected.json")


def pinned(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is held of a run's result: counts, bytes, steps, and simulated time to the microsecond."""
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, int)}
    return {
        "metrics": metrics,
        "simulated_us": round(result["metrics"]["simulated_us"]),
        "steps_reached": list(result["conformance"]["steps_reached"]),
        "violations": list(result["conformance"]["violations"]),
        "integrity": dict(result["integrity"]),
        "events": len(result["events"]),
    }


def differences(result: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Say, one line each, where a run's result is not the golden one."""
    found = pinned(result)
    flat = {**{k: v for k, v in found.items() if k != "metrics"}, **found["metrics"]}
    held = {**{k: v for k, v in expected.items() if k != "metrics"}, **expected["metrics"]}
    return [
        f"{key}: {flat.get(key)!r}, expected {held.get(key)!r}"
        for key in sorted({*flat, *held})
        if flat.get(key) != held.get(key)
    ]


def load(flow: str) -> dict[str, Any]:
    """Return the goldens of a flow by scenario."""
    found: dict[str, Any] = json.loads(expected_file(flow).read_text("utf-8"))
    return found


def update(flow: str) -> list[str]:
    """Run every scenario and write the goldens anew; return the scenarios whose golden changed."""
    file = expected_file(flow)
    old = load(flow) if file.exists() else {}
    new = {name: pinned(registry.run(flow, name).result()) for name in sorted(paths.scenarios(flow))}
    file.write_text(json.dumps(new, indent=1) + "\n", "utf-8")
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


if __name__ == "__main__":
    for each in sys.argv[1:] or list(registry.ENTRIES):
        changed = update(each)
        print(f"{each}: {len(changed)} golden(s) changed" + "".join(f"\n  {name}" for name in changed))
