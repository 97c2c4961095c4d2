"""Rows of columns by runs of pages, in both forms, against loops over their rows."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from forms import read
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kit.memory.columns

FORMS = [read("memory/columns.py"), kit.memory.columns]
both = pytest.mark.parametrize("form", FORMS, ids=["read", "in use"])
ROWS, PAGES = 60, 40
KINDS = st.sampled_from([np.uint8, np.bool_, np.int32, np.int64, np.uint64])
AT = st.integers(0, ROWS - PAGES)
Runs = tuple[tuple[int, int], ...]


def run_of_pages(marks: list[bool]) -> Runs:
    """The runs of a mask: as long as they can be, ascending."""
    found, first = [], 0
    for page, (here, after) in enumerate(zip(marks, [*marks[1:], False], strict=True)):
        if here and (page == 0 or not marks[page - 1]):
            first = page
        if here and not after:
            found.append((first, page + 1 - first))
    return tuple(found)


RUNS = st.lists(st.booleans(), min_size=PAGES, max_size=PAGES).map(run_of_pages)


def pages_of(runs: Runs) -> list[int]:
    return [page for first, count in runs for page in range(first, first + count)]


def some(kind: Any, wide: bool = False) -> NDArray[Any]:
    drawn = np.random.default_rng(5).integers(0, 2 if kind is np.bool_ else 60, ROWS).astype(kind)
    return drawn[:, None].copy() if wide else drawn


@both
@given(kind=KINDS, wide=st.booleans(), at=AT, runs=RUNS, value=st.integers(0, 1))
def test_each_row_is_set_added_to_or_counted(
    form: ModuleType, kind: Any, wide: bool, at: int, runs: Runs, value: int
) -> None:
    for name in ("fill", "ramp", "add"):
        if kind is np.bool_ and name != "fill":
            continue
        column, wanted = some(kind, wide), some(kind, wide)
        getattr(form, name)(column, at, runs, value)
        for page in pages_of(runs):
            wanted[at + page] = {"fill": value, "ramp": value + page, "add": wanted[at + page] + value}[name]
        assert (column == wanted).all()
    column = some(kind)
    assert form.count(column, at, runs, value) == sum(column[at + page] == value for page in pages_of(runs))


@both
@given(kind=KINDS, wide=st.booleans(), at=AT, runs=RUNS, value=st.integers(0, 9), there=st.integers(0, ROWS))
def test_only_marked_rows_are_counted_up(
    form: ModuleType, kind: Any, wide: bool, at: int, runs: Runs, value: int, there: int
) -> None:
    marks = np.random.default_rng(7).random(ROWS + PAGES) < 0.5
    column, wanted = some(kind, wide), some(kind, wide)
    form.ramp_where(column, at, runs, value, marks, there)
    for page in pages_of(runs):
        if marks[there + page]:
            wanted[at + page] = value + page
    assert (column == wanted).all() or kind is np.bool_


@both
@given(marked=st.sets(st.integers(0, ROWS - 1)), at=AT, runs=RUNS)
def test_a_mark_is_found(form: ModuleType, marked: set[int], at: int, runs: Runs) -> None:
    marks = bytearray(row in marked for row in range(ROWS))
    assert form.marked(marks, at, runs) is any(at + page in marked for page in pages_of(runs))


@both
@given(kind=KINDS, words=st.integers(1, 3), at=AT, to=AT, runs=RUNS)
def test_rows_are_copied_whole(form: ModuleType, kind: Any, words: int, at: int, to: int, runs: Runs) -> None:
    column = np.arange(ROWS * words).reshape(ROWS, words).astype(kind)
    into, wanted = np.zeros_like(column), np.zeros_like(column)
    form.copy(into, to, column, at, runs)
    for page in pages_of(runs):
        wanted[to + page] = column[at + page]
    assert (into == wanted).all()


@both
@given(
    kind=st.sampled_from([np.uint8, np.bool_]),
    width=st.sampled_from([np.int32, np.int64]),
    rows=st.lists(st.tuples(st.integers(-ROWS, ROWS - 1), st.integers(0, 255))),
)
def test_rows_are_looked_up_by_number(form: ModuleType, kind: Any, width: Any, rows: list[tuple[int, int]]) -> None:
    column = some(kind)
    at, limits = (np.array([each[which] for each in rows], dtype) for which, dtype in ((0, width), (1, np.uint8)))
    assert form.count_below(column, at, limits) == sum(column[row] < limit for row, limit in rows)
    marks, wanted = bytearray(ROWS), bytearray(ROWS)
    form.mark(marks, at)
    for row, _ in rows:
        wanted[row] = 1
    assert marks == wanted


@both
@pytest.mark.parametrize("row", [ROWS, -ROWS - 1, 1 << 40, -1 << 63])
def test_a_row_that_does_not_exist_is_an_error_and_none_is_marked(form: ModuleType, row: int) -> None:
    rows, marks = np.array([3, row], np.int64), bytearray(ROWS)
    with pytest.raises(IndexError):
        form.count_below(some(np.uint8), rows, np.zeros(2, np.uint8))
    with pytest.raises(IndexError):
        form.mark(marks, rows)
    assert not any(marks)


def test_large_numbers_are_whole() -> None:
    for form in FORMS:
        column = np.zeros(4, np.uint64)
        form.ramp(column, 1, ((0, 2),), 5 << 36)
        form.add(column.view(np.int64), 0, ((0, 4),), -1 << 40)
        assert column.view(np.int64).tolist() == [-1 << 40, (5 << 36) - (1 << 40), (5 << 36) + 1 - (1 << 40), -1 << 40]


@both
@pytest.mark.parametrize(("at", "run"), [(-1, (0, 2)), (3, (-4, 2)), (3, (0, -1)), (2, (0, ROWS - 1)), (ROWS, (1, 0))])
def test_rows_that_do_not_exist_are_an_error_and_nothing_is_done(
    form: ModuleType, at: int, run: tuple[int, int]
) -> None:
    column, marks, runs = some(np.int32), np.ones(ROWS, dtype=bool), ((5, 2), run)
    before = column.copy()
    for ask in (
        lambda: form.fill(column, at, runs, 1),
        lambda: form.ramp(column, at, runs, 1),
        lambda: form.add(column, at, runs, 1),
        lambda: form.count(column, at, runs, 1),
        lambda: form.copy(column, 0, column, at, runs),
        lambda: form.copy(column, at, column, 0, runs),
        lambda: form.ramp_where(column, at, runs, 1, marks, 0),
        lambda: form.marked(bytearray(ROWS), at, runs),
        lambda: form.ramp_where(column, 0, ((0, 5),), 1, marks, ROWS - 4),
    ):
        with pytest.raises(IndexError, match=f"rows .* of a column of {ROWS}"):
            ask()
    assert (column == before).all()


def test_what_is_no_column_is_refused_in_c() -> None:
    form = kit.memory.columns
    if form.__file__.endswith(".py"):
        return
    column, runs = np.zeros(ROWS, np.int32), ((0, 2),)
    with pytest.raises(ValueError, match="no gaps"):
        form.fill(column[::2], 0, runs, 1)
    with pytest.raises(TypeError, match="list or a tuple"):
        form.fill(column, 0, iter(runs), 1)
    for pair in ([0, 2], (0, 2, 3), 7):
        with pytest.raises(TypeError, match="a run is"):
            form.fill(column, 0, [pair], 1)
    with pytest.raises(TypeError, match="int"):
        form.fill(column, 0, [(0, "2")], 1)
    column.flags.writeable = False
    with pytest.raises(ValueError, match="may be written"):
        form.fill(column, 0, runs, 1)
    for wrong in (np.zeros(ROWS, np.int16), np.zeros(ROWS), [0, 1, 2]):
        with pytest.raises(TypeError, match="a column"):
            form.fill(wrong, 0, runs, 1)
    with pytest.raises(TypeError, match="marks are a bytearray"):
        form.marked(column, 0, runs)
    rows, limits = np.zeros(2, np.int64), np.zeros(2, np.uint8)
    for wrong in (rows.astype(np.int16), rows[None], np.zeros(4, np.int64)[::2], [0, 0]):
        with pytest.raises(TypeError, match="numbers of rows"):
            form.mark(bytearray(ROWS), wrong)
        with pytest.raises(TypeError, match="numbers of rows"):
            form.count_below(limits, wrong, limits)
    for wrong in (limits[None], limits.astype(np.int32), np.zeros(4, np.uint8)[::2], b"ab"):
        with pytest.raises(TypeError, match="column of bytes"):
            form.count_below(wrong, rows, limits)
        with pytest.raises(TypeError, match="column of bytes"):
            form.count_below(limits, rows, wrong)
    with pytest.raises(TypeError, match="a limit for each"):
        form.count_below(limits, rows, limits[:1])
    with pytest.raises(TypeError, match="marks are a bytearray"):
        form.mark(limits, rows)
    with pytest.raises(TypeError, match="4 arguments"):
        form.fill(column, 0, runs)
    with pytest.raises(TypeError, match="same type"):
        form.copy(np.zeros(ROWS, np.int64), 0, column, 0, runs)


def test_both_forms_offer_the_same() -> None:
    one, other = FORMS
    assert one.__all__ == other.__all__
