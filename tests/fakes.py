"""A tiny flow for the tests of what stands around flows: registry, command line, batch."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest

from kit import paths
from kit.errors import DriverError, ParameterError
from kit.flows import registry
from kit.flows.documented import Conformance
from kit.flows.parameters import Parameters, parameter
from kit.flows.run import Allocation, Integrity, Run
from kit.sim.machine import Machine
from kit.sim.trace import Trace

# One red pixel.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


class FakeParameters(Parameters):
    flow: ClassVar[str] = "fake_flow"

    size: int = parameter(4096, "bytes touched", unit="B", ge=1, le=1 << 40)
    share: float = parameter(0.5, "share of writes", ge=0, le=1)
    eager: bool = parameter(True, "prefetch", group="Driver policy", documented="fake_eager")
    order: str = parameter("up", "order | direction", choices=("up", "down"))
    units: list[int] = parameter([1, 2], "units touched")
    events: int = parameter(2, "events, named like an option of kit run", ge=0)
    lost: int = parameter(0, "pages lost", ge=0)
    strays: int = parameter(0, "departures from the documented steps", ge=0)
    broken: bool = parameter(False, "the driver fails")

    def contradictions(self) -> None:
        if self.order == "down" and self.size == 1:
            raise ParameterError("order", self.order, "up when size is 1")


class FakeFlow:
    name = "fake_flow"
    title = "A flow that does nothing"
    Parameters = FakeParameters

    def run(self, parameters: Any, scenario: str = "", progress: registry.Progress | None = None) -> Run:
        if parameters.broken:
            raise DriverError(12, "NV_ERR_NO_MEMORY", "uvm_fake")
        trace = Trace()
        for i in range(parameters.events):
            trace.span("UvmEventTypeCpuFault", "cpu", i, i, va=4096 * (1 + i), value=i, cause="write")
        if progress is not None:
            progress(0.5, "half")
            progress(1.0, "done")
        metrics = {
            "simulated_us": 1500.0 * parameters.size,
            "faults": parameters.events,
            "bytes_moved": parameters.size,
        }
        steps = Conformance(["a", "b"], 3, ["a calls c"] * parameters.strays, {"c": "never"})
        return Run(
            self.name, scenario, parameters.model_dump(), metrics, trace, steps, Integrity(7, parameters.lost),
            Machine("fake", "A machine", "none", {}, {}), [Allocation("x", 4096, 8192)], [("all", 0.0, 1.0)],
        )  # fmt: skip

    def open(self, parameters: Any, scenario: str = "") -> tuple[str, Any]:
        return scenario, parameters


FLOW = FakeFlow()
NOTEBOOK_CELLS = {
    "parameters": "size = 4096\nbroken = False\nlost = 0\nresult_path = ''",
    "check": "if broken:\n    raise ValueError('the driver\\nfails')",
    "figure": "from IPython.display import HTML, display\n"
    f'display(HTML(\'<figure><img alt="a &lt;map&gt;" src="data:image/png;base64,{base64.b64encode(PIXEL).decode()}"></figure>\'))',
    "result": "import json, pathlib\n"
    "result = {'flow': 'fake_flow', 'parameters': {}, 'metrics': {'simulated_us': 2500000.0, 'faults': 3, 'bytes_moved': size},\n"
    "  'conformance': {'steps_reached': ['a', 'b'], 'steps_documented': 3, 'violations': []},\n"
    "  'integrity': {'pages_checked': 7, 'lost': lost},\n"
    "  'events': [{'time_us': 1.5, 'duration_us': 0, 'kind': 'GPU_PAGE_FAULT', 'address': 0, 'bytes': 0, 'value': 3, 'cause': 'READ'}]}\n"
    "if result_path:\n    pathlib.Path(result_path).write_text(json.dumps(result))",
}


def install(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Make the fake flow the only one, with its scenarios and notebook under `root`."""
    scenarios, notebooks = root / "scenarios" / "fake_flow", root / "notebooks"
    scenarios.mkdir(parents=True)
    notebooks.mkdir()
    (scenarios / "flow.yaml").write_text("steps: []\n")
    (scenarios / "default.yaml").write_text("size: 8192\n")
    (scenarios / "broken.yaml").write_text("broken: true\n")
    cells = [nbformat.v4.new_markdown_cell("# A flow that does nothing\n\nMathematics: $x^2$")]
    for name, source in NOTEBOOK_CELLS.items():
        cells.append(
            nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]} if name == "parameters" else {})
        )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebooks / "fake_flow.ipynb")
    monkeypatch.setattr(paths, "root", lambda: root)
    monkeypatch.setattr(registry, "ENTRIES", {"fake_flow": registry.Entry("fake_flow", "fakes")})
