"""Page masks against sets of page numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kit.memory.table import pagemask

PAGES = st.sets(st.integers(0, 511))


def mask_of(pages: set[int]) -> int:
    return sum(1 << page for page in pages)


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
    mask, first = mask_of(pages), min(pages, default=0)
    count = sum(page - 1 not in pages for page in pages)
    assert pagemask.run_count(mask) == count
    if count == 1:
        assert pagemask.run_of(mask) == slice(first, first + len(pages))
    elif count:
        assert pagemask.run_of(mask) is None
