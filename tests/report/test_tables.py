"""Tables by name, and their text, CSV and HTML."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest

from kit.errors import ParameterError
from kit.report import table, table_names
from kit.report.tables import ADDRESS, Table


@pytest.mark.parametrize("name", list(table_names()))
def test_every_table_has_text_csv_and_html_for_any_run(name, vector_add_run, empty_run):
    for run in (vector_add_run, empty_run):
        made = table(run, name)
        assert made.to_text()
        assert next(csv.reader(io.StringIO(made.to_csv()))) == list(made.columns)
        assert made._repr_html_().startswith("<table><caption>" if made.rows else "<p><b>")
        assert all(len(row) == len(made.columns) for row in made.rows)


def test_an_unknown_table_gets_a_suggestion(empty_run):
    with pytest.raises(ParameterError, match=r"um_total_sun.*Did you mean 'um_total_sum'"):
        table(empty_run, "um_total_sun")


@pytest.mark.parametrize("name", ["um_sum:rows=0", "um_sum:rows=x", "um_sum:lines=3", "nvprof:rows=3"])
def test_a_wrong_option_is_refused(name, empty_run):
    with pytest.raises(ParameterError, match="rows=N"):
        table(empty_run, name)


def test_numbers_are_grouped_in_text_and_plain_in_csv():
    made = Table("t", ("Virtual Address", "Size (MB)", "Name"), [(0x7F9C80000000, 3221.225472, "<a>"), (16, None, "b")],
                 formats=(ADDRESS, ",.3f", ""))  # fmt: skip
    assert made.to_text() == (
        " Virtual Address  Size (MB)  Name\n"
        " ---------------  ---------  ----\n"
        " 0x7F9C80000000   3,221.225  <a> \n"
        " 0x10                        b   \n"
    )
    assert made.to_csv() == "Virtual Address,Size (MB),Name\n0x7F9C80000000,3221.225,<a>\n0x10,,b\n"
    assert "&lt;a&gt;" in made._repr_html_()


def test_a_long_table_shows_its_first_rows_and_says_so():
    html = Table("t", ("n",), [(i,) for i in range(1000)])._repr_html_()
    assert html.count("<tr>") == 201
    assert "The first 200 of 1,000 rows." in html


def test_an_empty_table_is_a_sentence_without_headings():
    html = Table("t", ("n",), [], "Copies by size.")._repr_html_()
    assert html == "<p><b>t</b>: Copies by size. Nothing to show: no such records in this run.</p>"
    assert Table("t", ("n",), [], "Nobody knows.", nothing="")._repr_html_() == "<p><b>t</b>: Nobody knows.</p>"


def test_a_heading_stands_over_its_values():
    html = Table("t", ("Name", "Size"), [("a", 1)])._repr_html_()
    assert '<th scope="col" style="text-align:left">Name</th><th scope="col" style="text-align:right">Size</th>' in html
    assert '<td style="text-align:left">a</td><td style="text-align:right">1</td>' in html


def test_naming_the_tables_imports_no_table_code():
    code = "import sys, kit.report as r; r.table_names(); print([m for m in ('numpy', 'sqlite3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
