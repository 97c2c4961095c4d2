"""Page masks against sets of page numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kit.memory.table import pagemask

PAGES = st.sets(st.integers(0, 511))


def mask_of(pages: set[int]) -> int:
    return sum(1 << page for page in pages)


@given(PAGES)
def test_runs_are_the_maximal_runs_of_the_set(pages: set[int]) -> None:
    found = list(pagemask.runs(mask_of(pages)))
    assert sorted(page for first, count in found for page in range(first, first + count)) == sorted(pages)
    for (first, count), (after, _) in pairwise(found):
        assert first + count < after  # a gap between two runs, or they would be one


@given(PAGES)
def test_conversions_agree_with_the_set(pages: set[int]) -> None:
    mask = mask_of(pages)
    assert set(pagemask.pages_of(mask).tolist()) == pages
    assert set(np.flatnonzero(pagemask.bools(mask, 512)).tolist()) == pages
    assert pagemask.from_pages(np.array(sorted(pages), dtype=np.int64)) == mask
    assert pagemask.first_page(mask) == min(pages, default=-1)


@given(st.lists(st.integers(0, 511), min_size=1))
def test_duplicates_count_once(pages: list[int]) -> None:
    assert pagemask.from_pages(np.array(pages, dtype=np.int64)).bit_count() == len(set(pages))


@given(st.integers(0, 500), st.integers(0, 12))
def test_a_region_is_its_pages(first: int, count: int) -> None:
    assert pagemask.region(first, count) == mask_of(set(range(first, first + count)))


@given(PAGES)
def test_one_run_is_a_slice_and_several_are_none(pages: set[int]) -> None:
    mask = mask_of(pages)
    found = list(pagemask.runs(mask))
    assert pagemask.run_count(mask) == len(found)
    if len(found) == 1:
        ((first, count),) = found
        assert pagemask.run_of(mask) == slice(first, first + count)
    elif found:
        assert pagemask.run_of(mask) is None


@given(st.one_of(PAGES, st.sets(st.integers(0, 20))))
def test_positions_are_the_pages_in_order(pages: set[int]) -> None:
    found = pagemask.positions(mask_of(pages))
    assert found == sorted(pages) and all(type(page) is int for page in found)


@given(st.one_of(PAGES, st.sets(st.integers(0, 20))), PAGES)
def test_cuts_are_runs_cut_at_the_other_pages(pages: set[int], apart: set[int]) -> None:
    split = [*pagemask.runs(mask_of(pages - apart)), *pagemask.runs(mask_of(pages & apart))]
    first, ends = pagemask.cuts(mask_of(pages), mask_of(apart))
    found = list(zip(pagemask.positions(first), pagemask.positions(ends), strict=True))
    assert [(page, end - page) for page, end in found] == sorted(split)
    assert pagemask.lengths(first, ends) == [end - page for page, end in found]
