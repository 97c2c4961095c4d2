"""Machine profiles: complete, sourced, runnable; and what a profile takes over from another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.drivers.uvm.gpu import COSTS
from kit.errors import ParameterError
from kit.report.cupti import device_name
from kit.sim.machine import BASES, Curve, load_machine, machines, resolve

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"gtx1080ti_pcie3", "p100_pcie3", "v100", "t4", "k80"}


def facts_that_the_kit_reads() -> set[str]:
    """Every constant that the CUDA driver and its flow ask a machine for by name."""
    rooms = ("drivers/uvm", "flows/cuda_demand_paging")
    texts = [file.read_text("utf-8") for room in rooms for file in (ROOT / "kit" / room).rglob("*.py")]
    return {name for text in texts for name in re.findall(r'machine\["(\w+)"\]', text)}


def fact(value: float, source: str, basis: str = "measured") -> dict[str, Any]:
    return {"value": value, "unit": "us", "source": source, "basis": basis}


def test_the_required_machines_are_there() -> None:
    assert set(machines()) >= REQUIRED


@pytest.mark.parametrize("name", machines("uvm"))
def test_a_profile_says_everything_that_is_read(name: str) -> None:
    machine = load_machine(name)
    assert facts_that_the_kit_reads() | set(COSTS) <= set(machine.constants)
    assert set(machine.curves) == {"copy_htod", "copy_dtoh"}
    for constant in machine.constants.values():
        assert constant.basis in BASES and constant.source and constant.unit
        assert constant.value >= 0


@pytest.mark.parametrize("name", machines("uvm"))
def test_a_copy_takes_longer_the_more_it_carries(name: str) -> None:
    machine = load_machine(name)
    for curve in machine.curves.values():
        assert curve.kib == sorted(curve.kib) and curve.us == sorted(curve.us)
        rate = 2048 / (curve(2 << 20) - curve(4096)) * 1024 / 1000  # GB/s
        link = machine.graph().edges["cpu", "gpu0"]["gb_per_s"]
        assert 0.8 * link < rate < 1.25 * link


@pytest.mark.parametrize("name", machines("uvm"))
def test_a_program_runs_on_every_machine(name: str) -> None:
    run = kit.run("cuda_demand_paging", program="three_lines", machine=name)
    assert run.integrity.lost == 0
    assert device_name(run) == next(n["name"] for n in run.machine.nodes if n["id"] == "gpu0")
    assert run.metrics["htod_bytes"] == 2 << 20


def test_inherited_facts_keep_their_value_and_say_where_they_come_from() -> None:
    profiles: dict[str, dict[str, Any]] = {
        "old": {
            "title": "Old", "architecture": "pascal", "nodes": [{"id": "gpu0", "name": "Old"}],
            "constants": {"a": fact(1, "a trace"), "b": fact(2, "another", "specified")},
            "curves": {"copy_htod": {"points": [[4, 1], [8, 2]], "source": "a trace", "basis": "measured"}},
        },
        "new": {"extends": "old", "title": "New", "constants": {"b": fact(3, "its own")}},
    }  # fmt: skip
    data = resolve("new", profiles.__getitem__)
    assert data["title"] == "New" and data["architecture"] == "pascal"
    assert data["constants"] == {"a": fact(1, "as old: a trace", "estimate"), "b": fact(3, "its own")}
    curve = Curve(**data["curves"]["copy_htod"])
    assert (curve(6 << 10), curve.source, curve.basis) == (1.5, "as old: a trace", "estimate")
    assert curve.by_pages(3) == [curve(pages << 12) for pages in range(4)] == [1, 1, 2, 3]  # the last slope goes on
    assert "extends" not in data
    assert profiles["old"]["constants"]["a"] == fact(1, "a trace"), "the profile above is left as it was"


def test_a_chain_names_every_profile_on_the_way() -> None:
    top = {"title": "t", "architecture": "pascal", "constants": {"a": fact(1, "a trace")}, "curves": {}}
    profiles: dict[str, dict[str, Any]] = {"one": top, "two": {"extends": "one"}, "three": {"extends": "two"}}
    assert resolve("three", profiles.__getitem__)["constants"]["a"]["source"] == "as two: as one: a trace"


def test_a_cycle_is_refused_with_its_way() -> None:
    profiles = {"one": {"extends": "two"}, "two": {"extends": "three"}, "three": {"extends": "two"}}
    with pytest.raises(ParameterError, match=r"extends = 'two'.*one -> two -> three -> two"):
        resolve("one", profiles.__getitem__)


def test_an_unknown_profile_above_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.sim import machine

    shipped = machine._read
    monkeypatch.setattr(machine, "_read", lambda name: {"extends": "p100_pcie"} if name == "t4" else shipped(name))
    load_machine.cache_clear()
    with pytest.raises(ParameterError, match=r"extends = 'p100_pcie'.*Did you mean 'p100_pcie3'\?"):
        load_machine("t4")
    load_machine.cache_clear()


def test_an_unknown_machine_gets_a_suggestion() -> None:
    with pytest.raises(ParameterError, match=r"machine = 'v1000'.*Did you mean 'v100'\?"):
        load_machine("v1000")


@pytest.mark.parametrize(
    ("name", "sms", "tpcs", "threads", "ctas"),
    [
        ("p100_pcie3", 56, 28, 2048, 32),
        ("v100", 80, 40, 2048, 32),
        ("t4", 40, 20, 1024, 16),
        ("gtx1080ti_pcie3", 28, 28, 2048, 32),
        ("k80", 13, 13, 2048, 16),
        ("rtx8000", 72, 36, 1024, 16),
    ],
)
def test_processors_are_those_of_the_product(name: str, sms: int, tpcs: int, threads: int, ctas: int) -> None:
    machine = load_machine(name)
    found = [machine[each] for each in ("sms", "tpcs", "max_threads_per_sm", "max_ctas_per_sm")]
    assert found == [sms, tpcs, threads, ctas]
