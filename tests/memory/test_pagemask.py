"""Page masks, in both forms, against sets of page numbers."""

from __future__ import annotations

import operator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from forms import read
from hypothesis import given
from hypothesis import strategies as st

import kit.memory.table.pagemask
import kit.native.pagemask

FORMS = [read("memory/table/pagemask.py"), kit.native.pagemask]
both = pytest.mark.parametrize("form", [*FORMS, kit.memory.table.pagemask], ids=["whole", "words", "in use"])
PAGE, COUNT = 512, st.integers(0, 512)
ALL = set(range(PAGE))
# Any pages, a few, and stretches that begin and end around the ends of words.
PAGES = st.one_of(
    st.sets(st.integers(0, 511)),
    st.sets(st.integers(0, 20)),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 80)), max_size=4).map(
        lambda found: {page for first, count in found for page in range(first, min(first + count, 512))}
    ),
    st.sets(st.sampled_from([0, 31, 32, 62, 63, 64, 127, 128, 447, 448, 510, 511])),
    st.just(ALL),
)


def mask_of(form: ModuleType, pages: set[int]) -> Any:
    return form.from_bools(np.isin(np.arange(PAGE), sorted(pages)))


def pages_in(form: ModuleType, mask: Any) -> set[int]:
    return {page for page in range(PAGE) if int(mask) >> page & 1}


def cut(pages: set[int], apart: set[int]) -> list[tuple[int, int]]:
    """Return the runs page by page."""
    found: list[list[int]] = []
    before = -2
    for page in sorted(pages):
        if page != before + 1 or (page in apart) != (before in apart):
            found.append([page, 0])
        found[-1][1] += 1
        before = page
    return [(first, count) for first, count in found]


@both
@given(pages=PAGES)
def test_conversions_agree_with_the_set(form: ModuleType, pages: set[int]) -> None:
    mask = mask_of(form, pages)
    assert pages_in(form, mask) == pages
    assert set(form.pages_of(mask).tolist()) == pages == {page for page in ALL if form.holds(mask, page)}
    assert set(np.flatnonzero(form.bools(mask, PAGE)).tolist()) == pages
    assert form.from_pages(np.array(sorted(pages), dtype=np.int64)) == mask == form.from_pages(sorted(pages))
    assert form.first_page(mask) == min(pages, default=-1)
    assert mask.bit_count() == len(pages) and mask.bit_length() == max(pages, default=-1) + 1
    assert bool(mask) == bool(pages) and (mask == form.EMPTY) == (not pages)


@both
@given(one=PAGES, other=PAGES)
def test_operations_are_those_of_sets(form: ModuleType, one: set[int], other: set[int]) -> None:
    a, b = mask_of(form, one), mask_of(form, other)
    for name in ("and_", "or_", "xor"):
        operation = getattr(operator, name)
        assert pages_in(form, operation(a, b)) == operation(one, other)
    assert pages_in(form, a & ~b) == one - other
    assert (a == b) == (one == other) and (a != b) == (one != other)
    assert len({a, b}) == 1 + (one != other)


@both
@given(pages=PAGES, by=st.integers(0, 511))
def test_shifted_pages_keep_their_distance(form: ModuleType, pages: set[int], by: int) -> None:
    mask = mask_of(form, pages)
    assert pages_in(form, mask >> by) == {page - by for page in pages if page >= by}
    kept = {page for page in pages if page + by < PAGE}
    assert pages_in(form, mask_of(form, kept) << by) == {page + by for page in kept}


@both
@given(pages=st.lists(st.integers(0, 511), min_size=1))
def test_duplicates_count_once(form: ModuleType, pages: list[int]) -> None:
    assert form.from_pages(np.array(pages, dtype=np.int64)).bit_count() == len(set(pages))


@both
@given(pages=PAGES, first=COUNT, count=COUNT)
def test_a_region_is_its_pages(form: ModuleType, pages: set[int], first: int, count: int) -> None:
    count = min(count, PAGE - first)
    there = set(range(first, first + count))
    assert pages_in(form, form.region(first, count)) == there
    assert form.region_weight(mask_of(form, pages), first, count) == len(pages & there)
    assert first == PAGE or pages_in(form, form.bit(first)) == {first}


@both
@given(pages=PAGES)
def test_units_are_sixteen_pages_together(form: ModuleType, pages: set[int]) -> None:
    mask, aligned = mask_of(form, pages), [set(range(at, at + 16)) for at in range(0, PAGE, 16)]
    assert pages_in(form, form.units(mask)) == set().union(*(unit for unit in aligned if unit & pages))
    assert pages_in(form, form.whole_units(mask)) == set().union(*(unit for unit in aligned if unit <= pages))


@both
def test_there_is_no_page_below_the_first(form: ModuleType) -> None:
    for ask in (lambda: form.holds(form.region(0, 9), -1), lambda: form.bit(-1), lambda: form.region(-2, 4)):
        with pytest.raises(ValueError, match="negative"):
            ask()


@both
@given(pages=PAGES)
def test_one_run_is_a_slice_and_several_are_none(form: ModuleType, pages: set[int]) -> None:
    mask, first = mask_of(form, pages), min(pages, default=0)
    count = sum(page - 1 not in pages for page in pages)
    assert form.run_count(mask) == count
    if count == 1:
        assert form.run_of(mask) == slice(first, first + len(pages))
    elif count:
        assert form.run_of(mask) is None


@both
@given(pages=PAGES)
def test_runs_are_the_maximal_runs_of_the_set(form: ModuleType, pages: set[int]) -> None:
    found = form.runs(mask_of(form, pages))
    assert found == tuple(cut(pages, set()))
    for (first, count), (after, _) in pairwise(found):
        assert first + count < after  # a gap between two runs, or they would be one


@both
@given(pages=PAGES, apart=PAGES)
def test_cut_runs_are_cut_at_the_other_pages(form: ModuleType, pages: set[int], apart: set[int]) -> None:
    found = form.cut_runs(mask_of(form, pages), mask_of(form, apart))
    assert found == cut(pages, apart) and all(type(number) is int for run in found for number in run)
    counts = form.cut_counts(mask_of(form, pages), mask_of(form, apart))
    assert counts == [count for _, count in found] and all(type(count) is int for count in counts)


def test_both_forms_offer_the_same() -> None:
    one, other = FORMS
    assert one.__all__ == other.__all__
