"""Runs of page masks, in both forms, against sets of page numbers."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from forms import read
from hypothesis import given
from hypothesis import strategies as st

import kit.memory.table.mask_runs
import kit.native.mask_runs

FORMS = [read("memory/table/mask_runs.py"), kit.native.mask_runs]
both = pytest.mark.parametrize("form", [*FORMS, kit.memory.table.mask_runs], ids=["whole", "words", "in use"])
# Any pages, a few, and stretches that begin and end around the ends of words.
PAGES = st.one_of(
    st.sets(st.integers(0, 511)),
    st.sets(st.integers(0, 20)),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 80)), max_size=4).map(
        lambda found: {page for first, count in found for page in range(first, min(first + count, 512))}
    ),
)


def mask_of(pages: set[int]) -> int:
    return sum(1 << page for page in pages)


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
def test_runs_are_the_maximal_runs_of_the_set(form: ModuleType, pages: set[int]) -> None:
    found = form.runs(mask_of(pages))
    assert found == tuple(cut(pages, set()))
    for (first, count), (after, _) in pairwise(found):
        assert first + count < after  # a gap between two runs, or they would be one


@both
@given(pages=PAGES, apart=PAGES)
def test_cut_runs_are_cut_at_the_other_pages(form: ModuleType, pages: set[int], apart: set[int]) -> None:
    found = form.cut_runs(mask_of(pages), mask_of(apart))
    assert found == cut(pages, apart) and all(type(number) is int for run in found for number in run)


@both
@given(asked=st.lists(st.tuples(PAGES.filter(bool), st.sampled_from([512, 600])), max_size=6))
def test_a_selection_picks_the_pages(form: ModuleType, asked: list[tuple[set[int], int]]) -> None:
    for pages, count in asked:
        picked = form.selection(mask_of(pages), count)
        assert set(np.arange(count)[picked].tolist()) == pages
        assert isinstance(picked, slice) == (len(form.runs(mask_of(pages))) == 1)
        assert isinstance(picked, slice) or (len(picked) == count and not picked.flags.writeable)


def test_both_forms_offer_the_same() -> None:
    one, other = FORMS
    assert one.__all__ == other.__all__
