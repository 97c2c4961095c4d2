"""The radix page table against a dictionary, in every geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.memory.table.pagetable import GEOMETRIES, PageTable

BASE = 0x7F00_0000_0


@pytest.mark.parametrize(("name", "bits", "levels"), [("x86_64", 48, 4), ("pascal", 49, 5), ("hopper", 57, 6)])
def test_geometries_are_the_documented_ones(name: str, bits: int, levels: int) -> None:
    geometry = GEOMETRIES[name]
    assert (geometry.va_bits, len(geometry.bits), geometry.leaf) == (bits, levels, 512)


@pytest.mark.parametrize("name", list(GEOMETRIES))
@settings(max_examples=40)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["map", "unmap", "protect"]), st.integers(0, 1400), st.integers(1, 99), st.integers(1, 3)
        )
    )
)
def test_it_translates_like_a_dictionary(name: str, operations: list[tuple[str, int, int, int]]) -> None:
    table, model = PageTable(GEOMETRIES[name]), {}
    slot = table.reserve(BASE, 1500)
    for number, (what, first, count, right) in enumerate(operations):
        if what == "map":
            table.map(slot + first, count, 1000 * number, right)
            model.update({first + i: (right, 1000 * number + i) for i in range(count)})
        elif what == "unmap":
            table.unmap(slot + first, count)
            for page in range(first, first + count):
                model.pop(page, None)
        else:
            mapped = [page for page in range(first, first + count) if page in model]
            for page in mapped:
                table.protect(slot + page, 1, right)
                model[page] = (right, model[page][1])
    rights, frames = table.lookup(BASE + np.arange(1500))
    expected = [model.get(page, (0, -1)) for page in range(1500)]
    assert list(zip(rights.tolist(), frames.tolist(), strict=True)) == expected


def test_pages_without_tables_are_not_mapped() -> None:
    table = PageTable(GEOMETRIES["pascal"])
    assert table.lookup(np.array([0, 5, 1 << 36]))[0].tolist() == [0, 0, 0]
    table.reserve(BASE, 10)
    assert table.walk(np.array([BASE - 1000, BASE + 100_000, -1, 1 << 60])).tolist() == [-1] * 4


def test_tables_are_counted_level_by_level() -> None:
    table = PageTable(GEOMETRIES["pascal"])
    table.reserve(BASE, 1025)  # three leaf tables under one table of each of the four levels above
    assert table.tables == 4 + 3


def test_a_page_outside_the_address_is_refused() -> None:
    with pytest.raises(ValueError, match="49 bits"):
        PageTable(GEOMETRIES["pascal"]).reserve(1 << 37, 1)


@pytest.mark.parametrize("leaves", [1, 16, 17, 33])
def test_slot_minus_one_reads_as_no_right_however_full_the_table_is(leaves: int) -> None:
    table = PageTable(GEOMETRIES["pascal"])
    start = table.reserve(0, 512 * leaves)
    table.map(start, 512 * leaves, 0, 3)
    assert table.rights.reshape(-1)[-1] == 0
    assert table.walk(np.array([512 * leaves])).tolist() == [-1]
