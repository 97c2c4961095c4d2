"""Stretches of columns, in both forms, against loops over their rows."""

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
ROWS = 40
KINDS = st.sampled_from([np.uint8, np.bool_, np.int32, np.int64, np.uint64])
STRETCH = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(lambda ends: (min(ends), max(ends)))


def some(kind: Any, wide: bool = False) -> NDArray[Any]:
    drawn = np.random.default_rng(5).integers(0, 2 if kind is np.bool_ else 60, ROWS).astype(kind)
    return drawn[:, None].copy() if wide else drawn


@both
@given(kind=KINDS, wide=st.booleans(), ends=STRETCH, value=st.integers(0, 1))
def test_each_row_is_set_added_to_or_counted(
    form: ModuleType, kind: Any, wide: bool, ends: tuple[int, int], value: int
) -> None:
    first, stop = ends
    for name in ("fill", "ramp", "add"):
        if kind is np.bool_ and name != "fill":
            continue
        column, wanted = some(kind, wide), some(kind, wide)
        getattr(form, name)(column, first, stop, value)
        for row in range(first, stop):
            wanted[row] = {"fill": value, "ramp": value + row - first, "add": wanted[row] + value}[name]
        assert (column == wanted).all()
    column = some(kind)
    assert form.count(column, first, stop, value) == sum(row == value for row in column[first:stop].tolist())


@both
@given(kind=KINDS, wide=st.booleans(), ends=STRETCH, value=st.integers(0, 9), at=st.integers(0, ROWS))
def test_only_marked_rows_are_counted_up(
    form: ModuleType, kind: Any, wide: bool, ends: tuple[int, int], value: int, at: int
) -> None:
    first, stop = ends
    marks = np.random.default_rng(7).random(2 * ROWS) < 0.5
    column, wanted = some(kind, wide), some(kind, wide)
    form.ramp_where(column, first, stop, value, marks, at)
    for row in range(first, stop):
        if marks[at + row - first]:
            wanted[row] = value + row - first
    assert (column == wanted).all() or kind is np.bool_


@both
@given(marks=st.binary(max_size=ROWS).map(lambda drawn: bytearray(byte & 1 for byte in drawn)), ends=STRETCH)
def test_a_mark_is_found(form: ModuleType, marks: bytearray, ends: tuple[int, int]) -> None:
    first, stop = (min(end, len(marks)) for end in ends)
    assert form.marked(marks, first, stop) is (1 in marks[first:stop])


@both
@given(kind=KINDS, words=st.integers(1, 3), ends=STRETCH, to=st.integers(0, ROWS))
def test_rows_are_copied_whole(form: ModuleType, kind: Any, words: int, ends: tuple[int, int], to: int) -> None:
    first, stop = ends
    to = min(to, ROWS - (stop - first))
    column = np.arange(ROWS * words).reshape(ROWS, words).astype(kind)
    into = np.zeros_like(column)
    form.copy(into, to, column, first, stop)
    for row in range(ROWS):
        inside = to <= row < to + stop - first
        assert (into[row] == (column[row - to + first] if inside else 0)).all()


def test_large_numbers_are_whole() -> None:
    for form in FORMS:
        column = np.zeros(4, np.uint64)
        form.ramp(column, 1, 3, 5 << 36)
        form.add(column.view(np.int64), 0, 4, -1 << 40)
        assert column.view(np.int64).tolist() == [-1 << 40, (5 << 36) - (1 << 40), (5 << 36) + 1 - (1 << 40), -1 << 40]


@both
@pytest.mark.parametrize(("first", "stop"), [(-1, 2), (3, 2), (2, ROWS + 1)])
def test_rows_that_do_not_exist_are_an_error_and_nothing_is_done(form: ModuleType, first: int, stop: int) -> None:
    column, marks = some(np.int32), np.ones(ROWS, dtype=bool)
    before = column.copy()
    for ask in (
        lambda: form.fill(column, first, stop, 1),
        lambda: form.ramp(column, first, stop, 1),
        lambda: form.add(column, first, stop, 1),
        lambda: form.count(column, first, stop, 1),
        lambda: form.copy(column, 0, column, first, stop),
        lambda: form.ramp_where(column, first, stop, 1, marks, 0),
        lambda: form.marked(bytearray(ROWS), first, stop),
        lambda: form.ramp_where(column, 0, 5, 1, marks, ROWS - 4),
        lambda: form.copy(column, ROWS - 4, column, 0, 5),
    ):
        with pytest.raises(IndexError, match=f"rows .* of a column of {ROWS}"):
            ask()
    assert (column == before).all()


def test_what_is_no_column_is_refused_in_c() -> None:
    form = kit.memory.columns
    if form.__file__.endswith(".py"):
        return
    column = np.zeros(ROWS, np.int32)
    with pytest.raises(ValueError, match="no gaps"):
        form.fill(column[::2], 0, 2, 1)
    column.flags.writeable = False
    with pytest.raises(ValueError, match="may be written"):
        form.fill(column, 0, 2, 1)
    for wrong in (np.zeros(ROWS, np.int16), np.zeros(ROWS), [0, 1, 2]):
        with pytest.raises(TypeError, match="a column"):
            form.fill(wrong, 0, 2, 1)
    with pytest.raises(TypeError, match="marks are a bytearray"):
        form.marked(column, 0, 2)
    with pytest.raises(TypeError, match="4 arguments"):
        form.fill(column, 0, 2)
    with pytest.raises(TypeError, match="same type"):
        form.copy(np.zeros(ROWS, np.int64), 0, column, 0, 2)


def test_both_forms_offer_the_same() -> None:
    one, other = FORMS
    assert one.__all__ == other.__all__
