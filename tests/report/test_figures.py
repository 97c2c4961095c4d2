"""Figures against what the hand-made runs are known to hold, and against a page-at-a-time reading of the moves."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from synthetic import BASE, BLOCK, PAGE, empty_run, make_run, random_run, sequential_run

from kit.errors import ParameterError
from kit.flows.documented import Conformance, Documented
from kit.flows.run import Allocation, Run
from kit.report import figures
from kit.report.cuda import REPORT
from kit.report.figures.costs import driver_costs, hardware_costs
from kit.report.figures.residency import CHANNELS, shares
from kit.report.figures.steps import edges_of
from kit.report.figures.timeline import draw_lanes, timeline_words
from kit.report.figures.window import Pages, Window, busy, end_of, self_time, window_of, window_of_batch
from kit.report.language import PLACES, say_bytes, say_time, style, time_unit
from kit.sim.trace import Trace

RESIDENCE = {0: "nowhere", 1: "host", 2: "device", 3: "both", -1: "flight"}
ALL = ("residency_map", "timeline", "overview", "one_batch", "copy_sizes", "cost_breakdown")


def test_shares_agree_with_the_trace_page_by_page() -> None:
    run = sequential_run(blocks=3, gpu_blocks=2)
    pages, window = Pages.of(run), window_of(run)
    fine = shares(run, pages, window, rows=pages.total, columns=4000)
    first, step = BASE // PAGE, window.length / 4000
    for column in (0, 137, 700, 1500, 2222, 3100, 3999):
        middle = (column + 0.5) * step
        edges = {
            run.trace.residency_at(t, first, pages.total).tobytes()
            for t in (middle - step / 2, middle, middle + step / 2)
        }
        if len(edges) == 1:  # nothing changes inside this column
            where = run.trace.residency_at(middle, first, pages.total)
            expected = np.array([CHANNELS.index(RESIDENCE[int(w)]) for w in where])
            assert (fine[:, column].argmax(axis=1) == expected).all()
            assert fine[np.arange(pages.total), column, expected] == pytest.approx(1)


def test_shares_of_coarse_cells_are_exact_averages() -> None:
    run = sequential_run(blocks=2, gpu_blocks=2)
    pages, window = Pages.of(run), window_of(run)
    fine = shares(run, pages, window, rows=pages.total, columns=700)
    coarse = shares(run, pages, window, rows=pages.total // 64, columns=7)
    averaged = fine.reshape(pages.total // 64, 64, 7, 100, len(CHANNELS)).mean(axis=(1, 3))
    np.testing.assert_allclose(coarse, averaged, atol=1e-9)
    np.testing.assert_allclose(coarse.sum(axis=2), 1, atol=1e-9)


def test_shares_of_a_window_are_a_cut_of_the_whole() -> None:
    run = sequential_run(blocks=2, gpu_blocks=2)
    pages, whole = Pages.of(run), window_of(run)
    fine = shares(run, pages, whole, rows=64, columns=1000)
    cut = shares(run, pages, Window(whole.length * 0.4, whole.length * 0.7), rows=64, columns=300)
    np.testing.assert_allclose(cut, fine[:, 400:700], atol=1e-9)


def test_read_duplicated_pages_and_gaps_between_allocations() -> None:
    trace, first = Trace(), BASE // PAGE
    trace.move(0, 0, first, 8, 0, 1)
    trace.move(10, 20, first + 2, 6, 1, 3)  # reaches past the first allocation into the gap
    run = make_run(
        trace, [Allocation("a", BASE, 4 * PAGE), Allocation("b", BASE + 100 * PAGE, 4 * PAGE)], [("s", 0, 40)]
    )
    pages = Pages.of(run)
    assert (pages.names, pages.counts.tolist()) == (["a", "b"], [8, 4])  # four more pages of a's range have moved
    last = shares(run, pages, window_of(run), rows=12, columns=40)[:, -1].argmax(axis=1)
    assert [CHANNELS[i] for i in last] == ["host"] * 2 + ["both"] * 6 + ["nowhere"] * 4


def test_a_million_moves_are_drawn_within_two_seconds() -> None:
    run = random_run(200_000)
    run.trace.moves.rows.put(np.tile(run.trace.moves.array(), (5, 1)))
    assert len(run.trace.moves) == 1_000_000
    figures.residency_map(empty_run())
    begun = time.process_time()
    figure = figures.residency_map(run)
    assert time.process_time() - begun < 2
    assert figure.png is not None


@pytest.mark.parametrize("name", ALL)
def test_every_picture_has_pixels_caption_and_alt_text(name: str) -> None:
    figure = getattr(figures, name)(sequential_run())
    assert figure.png is not None
    pixels = np.asarray(Image.open(BytesIO(figure.png)).convert("RGB").resize((200, 100))).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10
    assert figure.caption and len(figure.alt) > 40 and re.search(r"\d", figure.alt)
    found = _images(figure._repr_html_())
    assert found == [figure.alt]
    assert set(figure._repr_mimebundle_()) == {"text/html", "text/plain", "image/png"}


@pytest.mark.parametrize("name", [*ALL, "documented_steps"])
def test_a_picture_with_nothing_to_show_says_so(name: str) -> None:
    figure = getattr(figures, name)(empty_run())
    assert figure.png is None
    assert len(figure.alt.split()) > 5
    assert "<img" not in figure._repr_html_() and figure.alt[:20] in figure._repr_html_()


@pytest.mark.parametrize("name", ALL)
def test_the_same_run_gives_the_same_bytes(name: str) -> None:
    draw = getattr(figures, name)
    assert draw(sequential_run()).png == draw(sequential_run()).png


def test_alt_texts_state_the_runs_figures() -> None:
    run = sequential_run(blocks=6, gpu_blocks=4)
    words = figures.overview(run).alt
    assert "12 MiB first appear in host memory" in words
    assert "12 MiB move to the GPU in 36 copies" in words  # 6 blocks of 6 growing copies
    assert "12 MiB move to the host in 6 copies" in words  # 2 evicted, 4 read back
    assert "At the end: 100% host memory" in words
    sizes = figures.copy_sizes(run).alt
    assert "36 copies host to device, 12 MiB in all, 64 KiB to 1 MiB" in sizes
    assert "6 copies device to host, 12 MiB in all, 2 MiB to 2 MiB" in sizes


def test_the_map_is_coloured_by_place() -> None:
    run = sequential_run(blocks=2, gpu_blocks=2)
    png = figures.residency_map(run).png
    assert png is not None
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB")).reshape(-1, 3)
    for key in ("nowhere", "host", "device", "flight"):
        colour = tuple(int(PLACES[key].colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == colour).all(axis=1).sum() > 500, key


def test_a_stage_can_be_shown_alone_and_a_wrong_one_is_named() -> None:
    run = sequential_run()
    assert "move to the GPU" not in figures.overview(run, stage="first_touch").alt
    with pytest.raises(ParameterError, match=r"stage = 'kernle': allowed is one of .* Did you mean 'kernel'"):
        figures.overview(run, stage="kernle")


@pytest.mark.parametrize("name", ["residency_map", "timeline", "overview"])
def test_a_stage_that_took_no_time_is_words_not_a_picture(name: str) -> None:
    run = sequential_run()
    run.stages += [("read_back", end_of(run), end_of(run)), ("other_stage", end_of(run), end_of(run))]
    run.stages = [stage for i, stage in enumerate(run.stages) if stage[0] not in {s[0] for s in run.stages[i + 1 :]}]
    figure = getattr(figures, name)(run, stage="read_back")
    assert (figure.png, figure.alt) == (None, REPORT.idle["read_back"])
    assert "Nothing happens in this run's stage “other stage”" in getattr(figures, name)(run, stage="other_stage").alt
    assert getattr(figures, name)(run, stage="kernel").png is not None


def test_times_late_in_a_run_are_written_out_without_an_offset() -> None:
    from matplotlib.figure import Figure

    with style():
        axes = Figure().subplots()
        axes.set_xlim(12711.2, 12711.3)
        axes.figure.canvas.draw()
        assert axes.xaxis.get_offset_text().get_text() == ""
        assert axes.xaxis.get_ticklabels()[0].get_text().startswith("12711.")


def _legend(run: Run) -> list[str]:
    """Return the legend's words under the lanes of `run`."""
    from matplotlib.figure import Figure

    drawn = Figure(layout="constrained")
    draw_lanes(drawn.subplots(), run, window_of(run))
    return [text.get_text() for legend in drawn.legends for text in legend.get_texts()]


def test_the_legend_names_the_bars_that_a_lanes_name_does_not_and_only_those_drawn() -> None:
    trace = Trace()
    trace.span("kernel", "gpu", 0.0, 100.0)
    assert _legend(make_run(trace, [], [])) == ["a kernel runs"]
    assert "GPU stalled" not in timeline_words(make_run(trace, [], []), Window(0, 100))
    assert "a kernel runs 1 span (100 µs)" in timeline_words(make_run(trace, [], []), Window(0, 100))
    trace.span("gpu_stall", "gpu", 20.0, 40.0)
    trace.span("UvmEventTypeMigration", "copy DtoH", 22.0, 25.0, cause="eviction")
    assert _legend(make_run(trace, [], [])) == ["a kernel runs", "GPU stalled", "copy of an eviction"]
    assert "GPU stalled" not in [lane.name for lane in REPORT.lanes]


def test_one_batch_shows_that_batch_only() -> None:
    run = sequential_run()
    assert "fault batch 2 spans" in figures.one_batch(run, batch=3).alt
    assert figures.one_batch(run, batch=36).png is None
    longest = window_of_batch(run)
    assert longest is not None and longest[0] % 6 == 5  # the sixth fault on a block brings half of it


@pytest.mark.parametrize(
    ("intervals", "cells", "expected"),
    [
        ([(0, 5)], 2, [1, 0]),
        ([(0, 4), (2, 6)], 1, [0.6]),
        ([(6, 8), (0, 1), (7, 7)], 5, [0.5, 0, 0, 1, 0]),
        ([(1, 3)], 5, [0.5, 0.5, 0, 0, 0]),
        ([], 3, [0, 0, 0]),
    ],
)
def test_busy_is_the_share_of_time_covered(
    intervals: list[tuple[float, float]], cells: int, expected: list[float]
) -> None:
    starts, ends = np.array(intervals, dtype=float).reshape(-1, 2).T
    assert busy(starts, ends, 10.0, cells).tolist() == pytest.approx(expected)


def test_self_time_leaves_out_the_steps_called_and_adds_up() -> None:
    trace = Trace()
    outer = trace.span("service_fault_batch", "UVM GPU0 BH", 0, 100)
    inner = trace.span("block_copy_push", "UVM GPU0 BH", 10, 50, parent=outer)
    trace.span("uvm_push_begin_acquire", "UVM GPU0 BH", 20, 30, parent=inner)
    trace.span("UvmEventTypeMigration", "copy HtoD", 40, 90, parent=inner, bytes=PAGE)
    run = make_run(trace, [Allocation("x", BASE, PAGE)], [])
    assert self_time(run, trace.spans.array()).tolist() == [60, 30, 10, 0]
    assert sum(driver_costs(run).values()) == pytest.approx(100)
    assert hardware_costs(run) == {"copies to the GPU": pytest.approx(50)}


def test_documented_steps_show_reached_and_unreached() -> None:
    documented = Documented({
        "flow": "f", "roots": ["a", "z"], "events": [], "hardware": [],
        "steps": [
            {"name": "a", "source": "dir/one.c @ 1", "line": 5, "calls": ["b", ["c"]], "when": ""},
            {"name": "b", "source": "dir/one.c @ 1", "line": 9, "calls": [], "when": ""},
            {"name": "c", "source": "dir/two.c @ 1", "line": 3, "calls": [], "when": "memory <is> full"},
            {"name": "z", "source": "dir/two.c @ 1", "line": 8, "calls": [], "when": "a call is made"},
        ],
    })  # fmt: skip
    trace = Trace()
    for start in (0, 20):
        a = trace.span("a", "cpu", start, start + 10)
        trace.span("b", "cpu", start + 1, start + 4, parent=a)
    run = make_run(
        trace, [], [], conformance=Conformance(["a", "b"], 4, [], {"c": "memory <is> full", "z": "a call is made"})
    )
    edges = edges_of(run)
    assert (edges[""]["a"].calls, edges["a"]["b"].calls, edges["a"]["b"].time) == (2, 2, 6)
    figure = figures.documented_steps(run, documented)
    assert figure.png is not None and "2 of 4 documented steps reached, 0 violations" in figure.alt
    assert "one.c 2 of 2" in figure.alt and "two.c 0 of 2" in figure.alt
    assert "memory &lt;is&gt; full" in figure.html and "a call is made" in figure.html
    assert 'title="dir/one.c @ 1:5"' in figure.html
    _Balanced().feed(figure.html)


def test_violations_are_shown() -> None:
    run = sequential_run()
    run.conformance = Conformance(["uvm_vm_fault"], 356, ["x does not call y"], {})
    figure = figures.documented_steps(run, Documented.load("cuda_demand_paging"))
    assert "1 violation" in figure.alt and "x does not call y" in figure.html


def test_the_language_of_axes_and_lanes() -> None:
    assert [say_time(t) for t in (12, 1234.5, 2.5e6)] == ["12 µs", "1.23 ms", "2.5 s"]
    assert [say_bytes(b) for b in (512, 65536, 12 << 20)] == ["512 B", "64 KiB", "12 MiB"]
    assert [time_unit(t).word for t in (900, 50_000, 3e6)] == ["µs", "ms", "s"]
    assert [REPORT.lane_of(actor) for actor in REPORT.actors] == list(range(len(REPORT.actors)))
    assert REPORT.lane_of("somebody") == len(REPORT.actors)
    assert len({place.colour for place in PLACES.values()}) == len(PLACES)


def test_end_of_a_run_without_time_is_not_zero() -> None:
    assert end_of(empty_run()) == 1
    assert Pages.of(empty_run()).total == 4 * BLOCK


def _images(html: str) -> list[str]:
    """Return the alt texts of the images in `html`, as a browser reads them."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                found.append(dict(attrs)["alt"] or "")

    Reader().feed(html)
    return found


class _Balanced(HTMLParser):
    """Fails on an end tag that does not match."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
