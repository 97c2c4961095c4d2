"""The HMM flow's tables and pictures: everything named exists, and says what the run held."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import kit
from kit.drivers.dmirror_types import COSTS as DEVICE_COSTS
from kit.flows import registry
from kit.flows.run import Run
from kit.memory.costs import COSTS
from kit.report import figures, table, table_names
from kit.report.flow_report import named, report_for
from kit.report.hmm import figures as hmm
from kit.report.hmm.measured import PUBLISHED, simulated
from kit.sim.machine import BASES, load_machine, machines

OWN = (hmm.page_tables, hmm.migration_phases, hmm.sequence_numbers)


@pytest.fixture(scope="module")
def run() -> Run:
    return kit.run("hmm_mirror", bytes=256 << 12, pinned_pages=8, evict_pages=16)


@pytest.fixture(scope="module")
def untouched() -> Run:
    return kit.open("hmm_mirror").run


@pytest.mark.parametrize("flow", registry.ENTRIES)
def test_everything_that_a_report_names_exists(flow: str) -> None:
    report = report_for(flow)
    references = [report.events, report.headlines, *report.views.values(), *(t.maker for t in report.tables.values())]
    assert all(callable(named(each)) for each in references)
    assert set(report.shown) <= set(table_names(flow))
    assert registry.entry(flow).table in table_names(flow)


@pytest.mark.parametrize("name", list(table_names("hmm_mirror")))
def test_every_table_prints(run: Run, name: str) -> None:
    made = table(run, name)
    assert made.rows and made.caption
    assert made.to_text().strip() and made.to_csv().count("\n") == len(made.rows) + 1
    assert "<table" in made._repr_html_()


@pytest.mark.parametrize("draw", OWN)
def test_pictures_have_pixels_caption_and_words(run: Run, draw: Callable[[Run], figures.Figure]) -> None:
    figure = draw(run)
    assert figure.png is not None and figure.caption
    assert re.search(r"\d", figure.alt) and len(figure.alt) > 60
    assert figure.png == draw(run).png


@pytest.mark.parametrize("draw", OWN)
def test_a_picture_with_nothing_to_show_says_so(untouched: Run, draw: Callable[[Run], figures.Figure]) -> None:
    figure = draw(untouched)
    assert figure.png is None and len(figure.alt.split()) > 5


def test_pictures_say_what_happened(run: Run) -> None:
    assert "device: 100% no entry" in hmm.page_tables(run, "build").alt
    assert "after setup: src 8 nothing, 248 VALID, MIGRATE, WRITE" in hmm.migration_phases(run).alt
    words = figures.overview(run).alt
    assert "1 MiB first appear in host memory" in words and "At the end: 100% nowhere" in words


def test_three_ways_tell_the_difference(run: Run) -> None:
    rows = {row["the walk"]: row for row in table(run, "three_ways").records()}
    assert rows["copies, without HMM"]["pointers rewritten"] > 0 == rows["mirrored"]["bytes copied"]
    assert rows["mirrored"]["of them in device memory"] == 0
    assert rows["migrated on fault"]["of them in device memory"] == 248


def test_events_are_records_of_the_run(run: Run) -> None:
    kinds = {event["kind"] for event in run.events()}
    assert {"page_fault_user", "device_page_fault", "hmm_range_fault", "migrate_to_ram", "copy"} <= kinds
    times = [event["time_us"] for event in run.events()]
    assert times == sorted(times)


@pytest.mark.parametrize("name", machines("hmm"))
def test_a_profile_prices_everything(name: str) -> None:
    machine = load_machine(name)
    assert set(COSTS) <= set(machine.constants)
    assert set(DEVICE_COSTS) - {"dma_page", "copy_setup"} <= set(machine.constants)
    assert all(c.basis in BASES and c.source and c.value >= 0 for c in machine.constants.values())


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}, {row[1]}" if isinstance(row, tuple) else "")
def test_simulated_times_are_near_the_published_ones(row: tuple[str, str, float, bool, str]) -> None:
    pages, quantity, value, used, _origin = row
    found = simulated(pages.startswith("2"))[quantity]
    if used:
        assert found == pytest.approx(value, rel=0.02)
    elif quantity in ("fault", "migrate"):
        assert found == pytest.approx(value, rel=0.2)
    else:  # the test driver has no huge entries, which a real one has
        assert found > value
