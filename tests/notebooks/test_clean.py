"""Notebooks as they are stored: clean, in the agreed order, with the model's own parameters cell."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import nbformat
import pytest

from kit import paths
from kit.flows import registry
from kit.lab.parameters_cell import parameters_cell

NOTEBOOKS = sorted(paths.notebooks().glob("*.ipynb"))


def test_every_flow_has_its_notebook() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(registry.ENTRIES)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    found = nbformat.read(request.param, as_version=nbformat.NO_CONVERT)
    found.metadata["stem"] = request.param.stem
    return found


def test_it_is_valid_and_holds_no_outputs_counts_or_widget_state(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_is_stored_the_way_the_generator_writes_it() -> None:
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


def test_the_one_parameters_cell_is_the_models(notebook: Any) -> None:
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    model = registry.entry(notebook.metadata.stem).load().Parameters
    assert [cell.source for cell in tagged] == [parameters_cell(model)]


def test_cells_come_in_the_agreed_order_and_code_is_introduced(notebook: Any) -> None:
    ids = [cell.id for cell in notebook.cells]
    stages = [name.replace("_", "-") for name in registry.entry(notebook.metadata.stem).load().stages]
    order = ["parameters", "check", *stages, "checks", "result", "controls"]
    places = [ids.index(each) for each in order]
    assert places == sorted(places) and ids[-1] == "controls"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for name in order:
        assert notebook.cells[ids.index(name) - 1].cell_type == "markdown"


def test_the_advice_on_what_to_try_names_real_parameters_and_values(notebook: Any) -> None:
    flow = registry.entry(notebook.metadata.stem).load()
    text = next(cell.source for cell in notebook.cells if cell.source.startswith("## What to try"))
    said: dict[str, Any] = {}
    count = 0
    for row in text.splitlines():
        tries = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+) = ([^`]+)`", row)}
        if not row.startswith("| the same with"):
            said = tries  # what the next rows may go on from
        registry.check(flow, {**said, **tries})
        count += len(tries)
    assert count >= 5


def test_nothing_is_loaded_from_the_network(notebook: Any) -> None:
    assert "http" not in "".join(cell.source for cell in notebook.cells)
