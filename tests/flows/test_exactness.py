"""What a CUDA run says about its own exactness, against what other seeds give."""

from __future__ import annotations

from typing import Any

import pytest

import kit

CASES: list[tuple[dict[str, Any], str, bool]] = [
    ({"n": 4096, "grid": 1, "block": 1}, "One access at a time", True),
    ({"n": 1 << 17, "grid": 1, "block": 256}, "One thread block", True),
    ({"n": 1 << 20, "grid": 4096, "block": 256}, "Many thread blocks", False),
    ({"n": 1 << 18, "grid": 1024, "block": 256, "machine": "k80"}, "This GPU cannot fault", True),
    ({"n": 1 << 18, "grid": 1024, "block": 256, "prefetch": "to_gpu"}, "No access of the kernel faulted", True),
    ({"program": "unit_touch"}, "One access at a time", True),
    ({"program": "stream", "pattern": "random"}, "The list of accesses is drawn from the seed", False),
    ({"program": "stream"}, "which touches write is drawn from the seed", True),
    ({"program": "stream", "lanes": 64}, "64 misses outstanding", True),
    ({"program": "stream", "lanes": 1, "write_fraction": 0.0}, "One access at a time, in the order that", True),
    (
        {"program": "stream", "lanes": 1},
        "One access at a time, in the order of a list. The pages come in a fixed",
        True,
    ),
    (
        {"program": "stream", "lanes": 1, "pattern": "random", "touches": 20, "buffer_bytes": 1 << 20},
        "drawn from",
        False,
    ),
    ({"program": "three_lines"}, "The list of accesses is fixed", True),
    ({"program": "stream", "lanes": 1, "cpu_touches": 50}, "The CPU touches the same pages meanwhile", True),
    ({"n": 4096, "jitter": 0.1}, "times are those of this seed", True),
]


@pytest.mark.parametrize(("given", "words", "same"), CASES, ids=lambda value: str(value)[:60])
def test_what_is_called_exact_does_not_change_with_the_seed(given: dict[str, Any], words: str, same: bool) -> None:
    counts, said = [], ""
    for seed in range(3):
        flow = kit.open("cuda_demand_paging", seed=seed, **given)
        flow.allocate().first_touch().kernel()
        said = flow.why
        counts.append({name: value for name, value in flow.finish().metrics.items() if isinstance(value, int)})
    assert words in " ".join(said.split())
    assert all(len(line) <= 88 for line in said.splitlines())
    assert (counts[0] == counts[1] == counts[2]) is same
    if "every count and every address is exact" in " ".join(said.split()).lower():
        assert same
