"""The strict check, and the parameters cell that it reads, as papermill itself sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import nbformat
import papermill
import pytest

from kit.errors import ParameterError
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.parameters import Parameters
from kit.lab import collect
from kit.lab.parameters_cell import parameters_cell, write

MODELS = [CudaParameters, fakes.FakeParameters]


def executed(*cells: str) -> dict[str, Any]:
    """Return a notebook's globals after these cells."""
    namespace: dict[str, Any] = {"In": [""]}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


@pytest.mark.parametrize("model", MODELS)
def test_the_cell_gives_back_the_models_defaults(model: type[Parameters]) -> None:
    given = collect(executed(parameters_cell(model)))
    assert given == {row["name"]: row["default"] for row in model.rows()}
    assert model.check(given) == model.check({})


@pytest.mark.parametrize("model", MODELS)
def test_papermill_reads_every_line_of_the_cell(
    model: type[Parameters], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = nbformat.v4.new_code_cell(parameters_cell(model), metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    found = papermill.inspect_notebook(str(tmp_path / "a.ipynb"))
    assert set(found) == {*(row["name"] for row in model.rows()), "result_path"}
    wordless = [row["name"] for row in model.rows() if not found[row["name"]]["help"]]
    assert all(f"# {name}: " in parameters_cell(model) for name in wordless)  # the words stand above the line
    assert "Unable to parse" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("model", MODELS)
def test_lines_fit_a_notebook(model: type[Parameters]) -> None:
    assert max(map(len, parameters_cell(model).splitlines())) <= 120


def test_injected_values_win_and_unknown_ones_are_refused() -> None:
    space = executed(parameters_cell(CudaParameters), "# Parameters\nprefetch_threshold = 75\nresult_path = 'x'\n")
    given = collect(space)
    assert given["prefetch_threshold"] == 75 and "result_path" not in given
    space = executed(parameters_cell(CudaParameters), "# Parameters\nprefetch_treshold = 75\n")
    with pytest.raises(ParameterError, match=r"prefetch_treshold = 75: .* Did you mean 'prefetch_threshold'"):
        CudaParameters.check(collect(space))


def test_a_misspelt_line_of_the_cell_is_refused_until_it_is_mended() -> None:
    cell = parameters_cell(CudaParameters)
    space = executed(cell.replace("\nseed = 0", "\nsede = 0"))
    with pytest.raises(ParameterError, match="sede"):
        CudaParameters.check(collect(space))
    space["In"].append(cell)
    exec(cell, space)
    assert CudaParameters.check(collect(space)) == CudaParameters.check({})


def test_variables_of_other_cells_are_nobodys_business() -> None:
    space = executed(parameters_cell(CudaParameters), "import os\nanswer = 42\n_x = 1")
    assert "answer" not in collect(space)


def test_without_a_history_every_plain_public_name_counts() -> None:
    space = {"n": 4, "_hidden": 1, "kit": pytest, "answr": [1], "result_path": ""}
    assert collect(space) == {"n": 4, "answr": [1]}


def test_write_changes_only_the_tagged_cell(tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("old = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("flow = 1"),
    ]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert write(CudaParameters, path) is True
    assert write(CudaParameters, path) is False
    after = nbformat.read(path, 4)
    assert [c.source for c in after.cells] == ["# Title", parameters_cell(CudaParameters), "flow = 1"]
