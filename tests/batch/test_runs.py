"""Notebooks executed in batch: what is under ``out/`` afterwards, and what is not."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fakes
import nbformat
import numpy as np
import pytest
from matplotlib import image

from kit import cli, paths
from kit.batch import reports
from kit.batch.index import index_html
from kit.batch.runs import Job, events_csv, plan, run_batch
from kit.errors import ParameterError
from kit.report.events import event_records, write_events_csv
from kit.report.figures.figure import Figure


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    fakes.install(monkeypatch, tmp_path_factory.mktemp("project"))


class Page(HTMLParser):
    """What a page links to and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.alts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag != "a":
            self.loaded += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.alts.append(found.get("alt", ""))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return ``out/`` after one batch of a scenario that works and one that does not, and the count of failures."""
    out = tmp_path_factory.mktemp("batch") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(patch, tmp_path_factory.mktemp("module"))
        failed = run_batch(plan(everything=True), out, progress=False)
    return out, failed


def test_a_batch_leaves_whole_sets_of_files(done: tuple[Path, int]) -> None:
    out, failed = done
    assert failed == 1
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == [
        "fake_flow/default.events.csv", "fake_flow/default.html", "fake_flow/default.ipynb", "fake_flow/default.json",
        "index.html", "runs.json",
    ]  # fmt: skip
    assert json.loads((out / "fake_flow/default.json").read_text())["metrics"]["bytes_moved"] == 8192
    assert next(csv.DictReader((out / "fake_flow/default.events.csv").open()))["kind"] == "GPU_PAGE_FAULT"
    executed = nbformat.read(out / "fake_flow/default.ipynb", as_version=4)
    (injected,) = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", ())]
    assert "size = 8192" in injected.source
    assert f'result_path = "{out}/fake_flow/default.json"' in injected.source
    assert ".building" not in (out / "fake_flow/default.ipynb").read_text()


def test_pages_load_nothing_from_a_network(done: tuple[Path, int]) -> None:
    out, _ = done
    for file in (out / "index.html", out / "fake_flow/default.html"):
        text = file.read_text("utf-8")
        assert [each for each in Page(text).loaded if not each.startswith("data:")] == []
        assert reports.network_references(text) == []


def test_the_index_leads_to_everything(done: tuple[Path, int]) -> None:
    out, _ = done
    page = Page((out / "index.html").read_text("utf-8"))
    assert all((out / link).is_file() for link in page.links)
    assert {Path(link).suffix for link in page.links} == {".html", ".ipynb", ".json", ".csv"}
    assert page.alts == ["a <map>"]
    text = (out / "index.html").read_text("utf-8")
    for figure in ("2500.000 ms", "8.00 KiB", "2 of 3", "0 of 7"):
        assert figure in text


def test_the_summary_names_every_scenario(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["batch", "--all", "--out", str(tmp_path / "out")]) == 1
    seen = capfd.readouterr()
    head, _rule, broken, default, *_ = seen.out.splitlines()
    assert head.split("  ")[0] == "flow"
    for column in ("scenario", "wall s", "simulated s", "faults", "bytes moved", "steps reached", "lost pages"):
        assert column in head
    assert broken.split()[1] == "broken"
    assert broken.split()[-1] == "failed"
    assert default.split()[3:] == ["2.500000", "3", "8,192", "2/3", "0"]
    assert "kit: error: fake_flow broken: cell [3]: ValueError: the driver fails\n" in seen.err


def test_lost_pages_fail_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("fake_flow", "default", paths.notebook("fake_flow"), {"lost": 2})
    assert run_batch([job], tmp_path, progress=False) == 1
    assert "fake_flow default: 2 pages lost" in capsys.readouterr().err


def test_a_batch_that_fails_altogether_leaves_no_folder(tmp_path: Path) -> None:
    assert run_batch(plan("fake_flow", "broken"), tmp_path / "deep" / "out", progress=False) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_without_result_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = paths.notebook("fake_flow")
    book = nbformat.read(notebook, as_version=4)
    book.cells = book.cells[:2]
    nbformat.write(book, notebook)
    assert run_batch(plan(), tmp_path / "out", progress=False) == 1
    assert "the notebook wrote no result" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_everything_is_validated_before_anything_runs(tmp_path: Path) -> None:
    (paths.root() / "scenarios" / "fake_flow" / "zz.yaml").write_text("sise: 1\n")
    assert cli.main(["batch", "--all", "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []
    paths.notebook("fake_flow").unlink()
    with pytest.raises(ParameterError, match="notebook"):
        plan()


def test_the_events_file_is_that_of_a_run(tmp_path: Path) -> None:
    run = fakes.FLOW.run(fakes.FakeParameters(events=3))
    write_events_csv(run, tmp_path / "events.csv")
    assert events_csv(event_records(run)) == (tmp_path / "events.csv").read_text()


def _png(wide: int, high: int) -> bytes:
    file = io.BytesIO()
    image.imsave(file, np.zeros((high, wide, 3)), format="png")
    return file.getvalue()


def _book(*figures: Figure) -> nbformat.NotebookNode:
    """Return an executed notebook of figures, one a cell, as a kernel leaves it."""
    outputs = [nbformat.v4.new_output("display_data", data=each._repr_mimebundle_()) for each in figures]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[each]) for each in outputs])


def test_the_index_shows_the_largest_picture_and_of_equals_the_last() -> None:
    sizes = [(40, 40), (960, 480), (960, 480), (50, 50)]
    found = reports.thumbnail(_book(*[Figure("any", "", str(i), _png(*size)) for i, size in enumerate(sizes)]))
    assert found is not None
    small = image.imread(io.BytesIO(base64.b64decode(found[0].partition(",")[2])))
    assert (found[1], small.shape[:2]) == ("2", (240, 480))
    assert reports.thumbnail(nbformat.v4.new_notebook()) is None


def test_the_index_shows_the_run_and_no_picture_that_the_report_hides() -> None:
    hidden = Figure("documented_steps", "", "a tree", _png(900, 2000), html="<details></details>")
    steps = Figure("sequence_chart", "", "a talk", _png(900, 1500))
    stage, whole = (Figure("overview", "", alt, _png(600, 300)) for alt in ("a stage", "the run"))
    lanes = Figure("timeline", "", "lanes", _png(700, 300))
    for book, alt in (
        (_book(lanes, stage, steps, whole, hidden), "the run"),
        (_book(steps, lanes, hidden), "lanes"),
        (_book(steps, hidden), "a talk"),
    ):
        found = reports.thumbnail(book)
        assert found is not None and found[1] == alt
    assert reports.thumbnail(_book(hidden)) is None


def test_flows_with_one_run_share_a_grid() -> None:
    row = {
        "simulated s": None, "wall s": 1, "faults": None, "bytes moved": None, "steps reached": 0, "violations": 0,
        "steps documented": 0, "lost pages": 0, "pages checked": 0,
    }  # fmt: skip
    page = index_html([{"flow": flow, "scenario": name, **row} for flow, name in ("ax", "by", "cx", "cy")])
    heads = re.findall("<h2>(.*?)</h2>", page)
    cards = [grid.count("<article>") for grid in page.split('<div class="runs">')[1:]]
    assert (heads, cards) == (["One run a flow", "c"], [2, 2])


def test_a_narrow_report_cuts_nothing() -> None:
    page = reports.html_report(_book(Figure("any", "", "words", _png(4, 4))), "any")
    assert '<body class="jp-Notebook"' in page  # which the rules below lean on to count more than the theme's
    for rule in (
        r"body\.jp-Notebook \.highlight pre,[^{]*\{[^}]*pre-wrap[^}]*overflow-wrap: anywhere",
        r"body\.jp-Notebook \.jp-OutputArea-output,[^{]*\{[^}]*overflow-x: auto",
        r"body\.jp-Notebook \.jp-InputArea-editor \{[^}]*overflow-x: auto",
    ):
        assert re.search(rule, page)


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<link rel=stylesheet href=//cdn.example/x.css>",
        "<style>@import 'http://cdn.example/x.css';</style>",
        "<style>a { background: url(https://cdn.example/x.png) }</style>",
        '<script>import x from "https://cdn.example/x.mjs"</script>',
        '<script>await import("https://cdn.example/x.mjs")</script>',
    ],
)
def test_what_a_browser_would_fetch_is_found(html: str) -> None:
    assert len(reports.network_references(html)) == 1


def test_a_link_to_follow_is_not_fetched() -> None:
    assert reports.network_references('<a href="https://example.org/">see</a> url(data:image/png;base64,AA==)') == []
