"""Measure everything, each case in a process of its own, and print one table.

``python -m benchmarks`` measures all, ``python -m benchmarks random`` one case.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict

from benchmarks.figure import Figure, report, timed
from kit.native import compiled

CASES = (
    "imports", "touches", "sequential", "random", "oversubscribed", "notebook", "hmm_range_fault", "hmm_migration",
    "hmm_invalidations", "hmm_selftests", "hmm_schedules", "mlx5_faults", "mlx5_invalidations", "mlx5_registration",
    "mlx5_sparse", "mlx5_schedules",
)  # fmt: skip


def measure(case: str) -> list[Figure]:
    """Run one case in this process."""
    from benchmarks import hmm, mlx5, start, streams, touches

    cases = {
        "imports": start.imports, "touches": touches.measure, "sequential": streams.sequential,
        "random": streams.random, "oversubscribed": streams.oversubscribed, "notebook": start.notebook,
        "hmm_range_fault": hmm.range_fault, "hmm_migration": hmm.migration, "hmm_invalidations": hmm.invalidations,
        "hmm_selftests": hmm.selftests, "hmm_schedules": hmm.schedules,
        "mlx5_faults": mlx5.faults, "mlx5_invalidations": mlx5.invalidations, "mlx5_registration": mlx5.registration,
        "mlx5_sparse": mlx5.sparse, "mlx5_schedules": mlx5.schedules,
    }  # fmt: skip
    return cases[case]()


def measure_apart(case: str) -> list[Figure]:
    """Run one case in a new process: no case sees another's memory or caches."""
    command = [sys.executable, "-m", "benchmarks", "--json", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Figure(**row) for row in json.loads(done.stdout)]


def main(arguments: list[str]) -> int:
    """Print the table. A missed limit is a finding (status 0), a case that fails is not (1), nor one not known (2)."""
    json_wanted, chosen = "--json" in arguments, [a for a in arguments if a != "--json"] or list(CASES)
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        print(f"no case {unknown[0]!r}; there are: {', '.join(CASES)}", file=sys.stderr)
        return 2
    if json_wanted:
        print(json.dumps([asdict(figure) for case in chosen for figure in measure(case)]))
        return 0
    figures, failed = [], []
    for case in chosen:
        print(f"measuring {case} ...", file=sys.stderr, flush=True)
        try:
            figures += measure_apart(case)
        except subprocess.CalledProcessError:
            failed.append(case)
    loop = timed(lambda: [sum(range(1000)) for _ in range(1000)]) * 1e3
    how = "compiled" if compiled.modules() else "not compiled"
    print(f"\nPython {platform.python_version()}, {how}, {os.cpu_count()} cores, sum(range(1000)) in {loop:.1f} us\n")
    print(report(figures))
    missed = sum(figure.ratio < 1 for figure in figures)
    print(f"{len(figures) - missed} of {len(figures)} limits met.")
    if failed:
        print(f"Not measured, because it failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
