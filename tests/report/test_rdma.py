"""Pictures and tables of the flows over mlx5: what they say is what the run holds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import kit
from kit.flows.run import Run
from kit.report import figures, rdma, table
from kit.report.figures.costs import driver_costs
from kit.report.language import say_time
from kit.report.rdma.layers import layer_pages
from kit.report.rdma.queue import levels
from kit.report.rdma.sequence import arrows_of


@cache
def run() -> Run:
    return kit.run(
        "mlx5_implicit_mr", areas=2, area_bytes=1 << 16, touch_pages=4, rounds=1, page_out_pattern="alternate"
    )


@cache
def pinned() -> Run:
    return kit.run("rc_pingpong", iters=2)


def test_the_layers_agree_from_the_top_down() -> None:
    held, moment = layer_pages(run(), "rdma_write")
    assert moment == "rdma write"
    pages = {name: {p for first, count in runs for p in range(first, first + count)} for name, runs in held.items()}
    assert pages["hardware MTT"] <= pages["dma_list"] <= pages["CPU page table"]
    assert len(held["hardware KSM"]) == 2
    assert len(pages["hardware MTT"]) == 2 * 4


def test_a_zap_takes_neighbours_of_the_same_sixty_four_bytes_from_the_hardware_only() -> None:
    held, _ = layer_pages(run(), "page_out")
    mapped, usable = (int(held[name][:, 1].sum()) for name in ("dma_list", "hardware MTT"))
    assert mapped == 2 * 2, "every other page has left, the others are mapped"
    assert usable < mapped, "and some of those lost their entry in the adapter"


def test_before_anything_is_touched_the_picture_is_a_sentence() -> None:
    from kit.flows.mlx5_implicit_mr.flow import FLOW

    session = FLOW.open(FLOW.Parameters.check({})).open_device()
    assert rdma.address_layers(session.run).png is None


def test_the_conversation_starts_with_the_message_and_ends_with_the_resumption() -> None:
    found = arrows_of(run(), 0)
    assert found is not None
    _number, window, lines = found
    words = [text for _time, _arrow, text in lines]
    assert words[0].startswith("RDMA_WRITE") and "resume" in words
    order = [words.index(w) for w in ("page-fault event", "make a 1 GiB child", "resume")]
    assert order == sorted(order)
    assert window.length > 200


def test_a_run_without_faults_says_so_in_words() -> None:
    assert "no conversation" in rdma.sequence_chart(pinned()).alt
    assert "stayed empty" in rdma.queue_depth(pinned()).alt
    assert "No sequence number" in rdma.notifier_chart(pinned()).alt


@pytest.mark.parametrize(
    "figure", ["address_layers", "notifier_chart", "queue_depth", "sequence_chart", "steps_of_era"]
)
def test_every_picture_has_a_caption_and_words_for_those_who_cannot_see_it(figure: str) -> None:
    made = getattr(rdma, figure)(run())
    assert made.caption and len(made.alt) > 40


def test_levels_count_open_intervals() -> None:
    times, level = levels(np.array([0.0, 1.0, 5.0]), np.array([2.0, 3.0, 6.0]))
    assert times.tolist() == [0, 1, 2, 3, 5, 6] and level.tolist() == [1, 2, 1, 0, 1, 0]


def test_the_tables_hold_what_the_metrics_say() -> None:
    m = run().metrics
    (row,) = table(run(), "rdma_stat").records()
    assert row["page_faults"] == m["implicit_page_faults"] and row["region"] == "implicit"
    assert sum(r["WQEs"] for r in table(run(), "umr").records()) == m["umr_wqes"]
    assert len(table(run(), "page_faults").rows) == m["faults"]
    assert "page_faults" in table(run(), "rdma_stat").to_text()


def test_the_kinds_stand_side_by_side() -> None:
    rows = table(kit.run("mlx5_odp_mr", bytes=65536, message_bytes=65536), "kinds").records()
    assert [row["Region"] for row in rows] == ["pinned", "explicit", "implicit"]
    assert rows[0]["Pinned (B)"] == 65536 and rows[1]["Lists (B)"] == 16 * 16


def test_pingpong_prints_what_the_program_prints() -> None:
    assert table(pinned(), "pingpong").to_text().startswith("16384 bytes in 0.00 seconds = ")


def test_the_records_are_faults_invalidations_and_work_requests() -> None:
    kinds = {event["kind"] for event in run().events()}
    assert {"PAGE_FAULT", "INVALIDATION", "UMR_WQE", "MESSAGE"} <= kinds


def test_programs_that_wait_are_not_counted_as_the_drivers_time() -> None:
    spent = driver_costs(pinned())
    programs = {name: spent[name] for name in ("programs wait for completions", "programs set up and connect")}
    assert list(spent)[-2:] == sorted(programs, key=lambda name: -programs[name])
    words = figures.cost_breakdown(pinned()).alt
    own = say_time(sum(spent.values()) - sum(programs.values()))
    assert f"the driver's own time: {own}" in words
    assert f"the programs' own time, waiting included: {say_time(sum(programs.values()))}" in words
