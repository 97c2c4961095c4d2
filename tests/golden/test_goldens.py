"""The flow against public recordings of real systems: the counts, sizes and records that they published."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import kit

Record = int | list[int]
TABLE = Path(__file__).with_name("cuda_demand_paging.yaml")
KINDS = {
    "CPU_PAGE_FAULT_COUNT": "cpu_fault",
    "GPU_PAGE_FAULT": "gpu_fault",
    "BYTES_TRANSFER_HTOD": "htod",
    "BYTES_TRANSFER_DTOH": "dtoh",
}
LISTS = tuple(KINDS.values())
NUMBERS = {"cpu_faults", "gpu_fault_groups"} | {
    f"{d}_{n}" for d in ("htod", "dtoh") for n in ("count", "bytes", "min", "max")
}
FIELDS = {
    "name", "origin", "hardware", "program", "note", "parameters", "exact", "published", "band", "band_why",
    "measured_us", "cannot_express",
}  # fmt: skip


def read_table() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(TABLE.read_text())
    return entries


ENTRIES = {entry["name"]: entry for entry in read_table()}
RUN = [name for name, entry in ENTRIES.items() if "cannot_express" not in entry]
LISTED = [name for name in RUN if any(key in LISTS for key in ENTRIES[name]["exact"])]
BANDED = [name for name in RUN if "band" in ENTRIES[name]]


def numbers_of(records: dict[str, list[Record]]) -> dict[str, int]:
    """The numbers that a profiler's summary shows, from its records."""
    found = {"cpu_faults": len(records["cpu_fault"]), "gpu_fault_groups": len(records["gpu_fault"])}
    for way in ("htod", "dtoh"):
        sizes = [record[1] for record in records[way] if isinstance(record, list)]
        found |= {f"{way}_count": len(sizes), f"{way}_bytes": sum(sizes)}
        if sizes:
            found |= {f"{way}_min": min(sizes), f"{way}_max": max(sizes)}
    return found


@cache
def observed(name: str) -> dict[str, list[Record]]:
    """Run an entry's parameters once; return its records by kind, in order of time."""
    records: dict[str, list[Record]] = defaultdict(list)
    for event in kit.run("cuda_demand_paging", **ENTRIES[name]["parameters"]).events():
        kind = KINDS.get(event["kind"])
        if kind in ("cpu_fault", "gpu_fault"):
            records[kind].append(int(event["address"]))
        elif kind:
            records[kind].append([int(event["address"]), int(event["bytes"])])
    return records


def readable(records: list[Record]) -> list[str]:
    """Addresses in hexadecimal and sizes in KiB, so that a difference can be read."""
    return [f"{r[0]:#x} {r[1] / 1024:g} KiB" if isinstance(r, list) else f"{r:#x}" for r in records]


@pytest.mark.parametrize("name", RUN)
def test_numbers_are_the_published_ones(name: str) -> None:
    wanted = {key: value for key, value in ENTRIES[name]["exact"].items() if key in NUMBERS}
    found = numbers_of(observed(name))
    assert {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", LISTED)
def test_records_are_the_published_ones_in_order(name: str) -> None:
    for kind in LISTS:
        if kind in ENTRIES[name]["exact"]:
            assert readable(observed(name)[kind]) == readable(ENTRIES[name]["exact"][kind]), kind


@pytest.mark.parametrize("name", BANDED)
def test_scheduling_keeps_within_the_published_band(name: str) -> None:
    found = numbers_of(observed(name))
    outside = {
        key: f"{found.get(key)} not in {low}..{high}"
        for key, (low, high) in ENTRIES[name]["band"].items()
        if key not in found or not low <= found[key] <= high
    }
    assert not outside, ENTRIES[name]["band_why"]


def test_what_the_flow_cannot_say_carries_its_reason() -> None:
    silent = {name: entry for name, entry in ENTRIES.items() if name not in RUN}
    assert silent
    for name, entry in silent.items():
        assert len(entry["cannot_express"].split()) >= 4, name
        assert entry["parameters"] == {}, f"{name}: an entry with parameters has to run"


def test_every_entry_is_complete() -> None:
    assert len(ENTRIES) == len(read_table()), "two entries have the same name"
    for name, entry in ENTRIES.items():
        assert set(entry) <= FIELDS, name
        assert entry["origin"] and entry["hardware"] and entry["program"] and entry["exact"], name
        assert set(entry["exact"]) <= NUMBERS | set(LISTS), name
        assert ("band" in entry) == ("band_why" in entry), name
        for low, high in entry.get("band", {}).values():
            assert low < high, name


@pytest.mark.parametrize("name", ENTRIES)
def test_published_records_agree_with_the_published_numbers(name: str) -> None:
    exact = ENTRIES[name]["exact"]
    found = numbers_of({kind: exact.get(kind, []) for kind in LISTS})
    covers = {"cpu_faults": "cpu_fault", "gpu_fault_groups": "gpu_fault"}
    for key, value in exact.items():
        kind = covers.get(key, key.split("_")[0])
        if key in NUMBERS and kind in exact:
            assert found[key] == value, key
