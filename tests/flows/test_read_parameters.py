"""Parameters that would change nothing are refused: another program's, and calls that the machine's GPU cannot take."""

from __future__ import annotations

from typing import Any

import pytest

from kit import paths
from kit.errors import ParameterError
from kit.flows import registry
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.parameters import extra
from kit.flows.rdma_follows_migration.parameters import FollowsParameters
from kit.sim.machine import machines


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"program": "unit_touch", "prefetch": "both"}, r"prefetch = 'both': .* program = unit_touch: .* vector_add"),
        (
            {"program": "stream", "n": 5},
            r"n = 5: .*default, 1048576, with program = stream: it is read with vector_add",
        ),
        ({"program": "stream", "readback": "none"}, r"readback = 'none': .* it is read with unit_touch"),
        ({"touch_units": [1]}, r"touch_units = \[1\]: .* program = vector_add"),
    ],
)
def test_a_parameter_of_another_program_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        CudaParameters.check(given)


@pytest.mark.parametrize("program", ["three_lines", "vector_add", "unit_touch", "stream", "trace"])
def test_defaults_of_other_programs_are_no_choice(program: str) -> None:
    """A notebook's cell gives every parameter."""
    everything = CudaParameters.check({}).model_dump()
    assert CudaParameters.check({**everything, "program": program}) == CudaParameters.check({"program": program})


def test_a_flow_may_choose_by_another_parameter() -> None:
    with pytest.raises(
        ParameterError, match=r"gpu_writes = False: .* with mover = file_system: it is read with gpu or"
    ):
        FollowsParameters.check({"mover": "file_system", "gpu_writes": False})


@pytest.mark.parametrize("flow", registry.ENTRIES)
def test_programs_are_values_of_the_choosing_parameter(flow: str) -> None:
    model = registry.entry(flow).load().Parameters
    listed = {program for info in model.model_fields.values() for program in extra(info)["programs"]}
    if listed:
        assert listed <= set(extra(model.model_fields[model.chooser])["choices"])


@pytest.mark.parametrize("way", ["to_gpu", "to_cpu", "both"])
def test_prefetch_calls_before_pascal_are_an_invalid_device(way: str) -> None:
    with pytest.raises(ParameterError, match=f"prefetch = '{way}': allowed is none on k80: cudaErrorInvalidDevice"):
        CudaParameters.check({"machine": "k80", "prefetch": way})


@pytest.mark.parametrize("advice", ["preferred_location_gpu", "accessed_by_gpu"])
def test_advice_for_a_gpu_before_pascal_is_an_invalid_device(advice: str) -> None:
    with pytest.raises(ParameterError, match=f"advice = '{advice}': allowed is none on k80: cudaErrorInvalidDevice"):
        CudaParameters.check({"machine": "k80", "advice": advice})
    CudaParameters.check({"machine": "p100_pcie3", "advice": advice})


@pytest.mark.parametrize("advice", ["read_mostly", "preferred_location_cpu", "accessed_by_cpu"])
def test_other_advice_before_pascal_is_taken(advice: str) -> None:
    CudaParameters.check({"machine": "k80", "advice": advice})


@pytest.mark.parametrize("name", ["p1000", "connectx5", "linux_pcie4"])
def test_a_machine_of_another_flow_gets_the_same_list_as_an_unknown_one(name: str) -> None:
    with pytest.raises(ParameterError) as wrong:
        CudaParameters.check({"machine": name})
    assert wrong.value.allowed == "one of " + ", ".join(machines("uvm"))


@pytest.mark.parametrize("flow", registry.ENTRIES)
def test_every_shipped_scenario_is_allowed(flow: str) -> None:
    model = registry.entry(flow).load().Parameters
    for name in paths.scenarios(flow):
        model.check(registry.load_scenario(flow, name))
