"""What every flow's session is: stages in their order, each to its end, and a run that says what happened so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import kit
from kit.errors import KitError, ParameterError
from kit.flows import registry
from kit.flows.documented import Conformance
from kit.flows.parameters import Parameters
from kit.flows.registry import entry
from kit.flows.run import Integrity
from kit.flows.session import Session, StagedFlow
from kit.sim.engine import Thread

SMALL: dict[str, dict[str, Any]] = {
    "cuda_demand_paging": {"program": "three_lines", "buffer_bytes": 1 << 16},
    "hmm_mirror": {"bytes": 1 << 16},
    "mlx5_implicit_mr": {},
    "mlx5_odp_mr": {"bytes": 1 << 16, "message_bytes": 1 << 16},
    "rc_pingpong": {"iters": 10},
    "rdma_follows_migration": {},
}
flows = pytest.mark.parametrize("name", registry.ENTRIES)


@flows
def test_the_flow_offers_what_the_registry_promises(name: str) -> None:
    flow = entry(name).load()
    assert flow.name == name == flow.Parameters.flow and flow.title
    session = flow.open(flow.Parameters.check(SMALL[name]))
    assert isinstance(session, Session) and session.stages_of == flow.stages
    assert all(callable(getattr(session, stage)) for stage in flow.stages)


@flows
def test_stages_come_in_order_and_none_comes_twice(name: str) -> None:
    session, stages = kit.open(name, **SMALL[name]), entry(name).load().stages
    for at, stage in enumerate(stages):
        for other in {stages[-1], stages[0]} - {stage}:
            with pytest.raises(ParameterError, match=f"the next stage, {stage}"):
                getattr(session, other)()
        assert getattr(session, stage)() is session
        assert [done for done, _start, _end in session.run.stages] == list(stages[: at + 1])
    with pytest.raises(ParameterError, match="the next stage, none"):
        getattr(session, stages[-1])()


@flows
def test_a_run_is_the_same_all_at_once_and_stage_by_stage(name: str) -> None:
    session, told = kit.open(name, **SMALL[name]), []
    stages = entry(name).load().stages
    getattr(session, stages[0])()
    assert session.show().metrics["simulated_us"] == session.engine.now
    run = session.finish(lambda share, stage: told.append((share, stage)))
    assert run.to_json() == kit.run(name, **SMALL[name]).to_json()
    assert told == [*((at / len(stages), stage) for at, stage in enumerate(stages) if at), (1.0, "done")]


@flows
def test_every_stage_has_its_lane_and_its_time(name: str) -> None:
    run = kit.run(name, **SMALL[name])
    spans, words = run.trace.spans, run.trace
    programs = spans.column("step") == words.steps.ids["host_program"]
    found = zip(
        (words.causes.words[int(cause)] for cause in spans.column("cause")[programs]),
        spans.column("start")[programs], spans.column("end")[programs], strict=True,
    )  # fmt: skip
    assert list(found) == run.stages
    assert all(run.metrics[f"{stage}_us"] == end - start for stage, start, end in run.stages)


def test_threads_of_the_programs_catch_up_before_each_stage() -> None:
    class Two(Session):
        stages_of = ("first", "second")

        @property
        def programs(self) -> tuple[Thread, ...]:
            return (self.cpu,)

        def _first(self) -> Iterator[Any]:
            yield self.engine.env.timeout(5.0)

        def _second(self) -> Iterator[Any]:
            self.seen = self.cpu.now
            yield self.engine.env.timeout(1.0)

        def integrity(self) -> Integrity:
            return Integrity(0, 0)

        def metrics(self, conformance: Conformance, checked: Integrity) -> dict[str, float]:
            return {}

    session = Two(entry("hmm_mirror").load().Parameters.check({}))
    session.cpu = session.engine.thread("cpu")
    session.stage("first").stage("second")
    assert session.seen == 5.0 and session.stages == [("first", 0.0, 5.0), ("second", 5.0, 6.0)]


def test_want_of_memory_is_an_error_in_one_line() -> None:
    def open_session(parameters: Parameters, scenario: str) -> Any:
        raise MemoryError("Unable to allocate 64.0 GiB")

    flow = StagedFlow("a large one", entry("hmm_mirror").load().Parameters, open_session, ("only",))
    with pytest.raises(KitError, match=r"ENOMEM: this host has not the memory .* 64\.0 GiB"):
        flow.run(flow.Parameters.check({}))
