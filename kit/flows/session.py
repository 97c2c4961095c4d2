"""A session: a flow on one machine as an object with one method a stage, and the run that it has made so far."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from kit.errors import KitError, ParameterError
from kit.flows.documented import Conformance, Documented
from kit.flows.parameters import Parameters
from kit.flows.registry import Progress
from kit.flows.run import Allocation, Integrity, Run
from kit.sim.engine import Engine, Thread
from kit.sim.machine import load_machine

__all__ = ["Session", "StagedFlow"]


class RunParameters(Protocol):
    """What a session itself reads of its parameters; every flow's model has it."""

    @property
    def flow(self) -> str:
        """The flow's name."""

    @property
    def machine(self) -> str:
        """Machine profile."""

    @property
    def seed(self) -> int:
        """Seed of the engine's jitter."""

    @property
    def jitter(self) -> float:
        """Latency jitter, as a share."""

    def model_dump(self) -> dict[str, Any]:
        """Return every parameter as a plain type."""


class Session(ABC):
    """A flow as an object with one method a stage; each returns the session.

    A flow's own class names its stages and has, for each of them, the method that people call and the generator
    ``_<stage>`` that does the work on the engine.

    Parameters
    ----------
    parameters : Parameters
        The flow's, checked.
    scenario : str
        Name of the scenario, for the report.

    Attributes
    ----------
    machine : Machine
    engine : Engine
        Clock and trace of the run.
    allocations : list of Allocation
    stages : list of (str, float, float)
        Stages that have run: name, start and end in microseconds.
    errors : list of str
        What went wrong in the program, in words.
    wall_s : float
        Wall-clock seconds in stages.
    """

    stages_of: ClassVar[tuple[str, ...]]
    actor: ClassVar[str] = "cpu"  # whose lane in the trace shows the stages
    parameters: RunParameters

    def __init__(self, parameters: RunParameters, scenario: str = "") -> None:
        self.parameters, self.scenario = parameters, scenario
        self.machine = load_machine(parameters.machine)
        self.engine = Engine(parameters.seed, parameters.jitter)
        self.allocations: list[Allocation] = []
        self.stages: list[tuple[str, float, float]] = []
        self.errors: list[str] = []
        self.wall_s = 0.0

    # -- what a flow says ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def programs(self) -> tuple[Thread, ...]:
        """Threads of the programs, one a process: no stage starts before they have caught up with the run."""

    @abstractmethod
    def integrity(self) -> Integrity:
        """Compare what memory holds with what was last written to it."""

    @abstractmethod
    def metrics(self, conformance: Conformance, checked: Integrity) -> dict[str, float]:
        """Return what the run counted, by flat names; times in microseconds, sizes in bytes."""

    def documented(self) -> Documented:
        """Return the documented steps that the run is held against."""
        return Documented.load(self.parameters.flow)

    def views(self) -> dict[str, Any]:
        """Return what the flow's own pictures show beside the trace, for `Run.views`."""
        return {}

    # -- stages ----------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> Self:
        """Run the next stage, which must be `name`.

        Raises
        ------
        ParameterError
            Another stage is due.
        """
        due = (*self.stages_of, "none")[len(self.stages)]
        if name != due:
            raise ParameterError("stage", name, f"the next stage, {due}")
        began, start = time.perf_counter(), self.engine.now
        self.catch_up()
        self.work(name)
        self.close(name, start)
        self.wall_s += time.perf_counter() - began
        return self

    def catch_up(self) -> None:
        """Bring the programs' clocks to the run's."""
        for thread in self.programs:
            thread.now = max(thread.now, self.engine.now)

    def work(self, stage: str) -> None:
        """Run the engine to the end of a stage."""
        self.engine.run(self.engine.start(getattr(self, f"_{stage}")()))

    def close(self, stage: str, start: float) -> None:
        """Write down that a stage has ended; a flow may add what its tables hold now."""
        self.engine.trace.span("host_program", self.actor, start, self.engine.now, cause=stage)
        self.stages.append((stage, start, self.engine.now))

    def finish(self, progress: Progress | None = None) -> Run:
        """Run the stages that have not run yet and return the result."""
        names = self.stages_of
        for name in names[len(self.stages) :]:
            if progress is not None:
                progress(names.index(name) / len(names), name)
            self.stage(name)
        if progress is not None:
            progress(1.0, "done")
        return self.run

    # -- the result --------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The result so far."""
        trace = self.engine.trace
        conformance, checked = self.documented().check(trace), self.integrity()
        return Run(
            self.parameters.flow, self.scenario, self.parameters.model_dump(), self.metrics(conformance, checked),
            trace, conformance, checked, self.machine, self.allocations, self.stages, self.wall_s, self.errors,
            self.views(),
        )  # fmt: skip

    def show(self) -> Run:
        """Return the run so far, which front ends show."""
        return self.run


P = TypeVar("P", bound=Parameters)
S = TypeVar("S", bound=Session)


@dataclass(frozen=True)
class StagedFlow(Generic[P, S]):
    """A flow as the registry sees it (`kit.flows.registry.Flow`), made of its parameters and its session.

    Attributes
    ----------
    title : str
        The flow in one line.
    Parameters : type
        The parameter model, which knows the flow's name.
    session : callable
        Makes a session of parameters and a scenario's name.
    stages : tuple of str
        The session's stages, in order.
    """

    title: str
    Parameters: type[P]
    session: Callable[[P, str], S]
    stages: tuple[str, ...]

    @property
    def name(self) -> str:
        """The flow's name, as in scenario folders."""
        return self.Parameters.flow

    def open(self, parameters: P, scenario: str = "") -> S:
        """Return the flow as an object with one method a stage."""
        return self.session(parameters, scenario)

    def run(self, parameters: P, scenario: str = "", progress: Progress | None = None) -> Run:
        """Run every stage.

        Raises
        ------
        KitError
            ENOMEM: this host has not the memory that the parameters ask for.
        """
        try:
            return self.open(parameters, scenario).finish(progress)
        except MemoryError as wrong:
            raise KitError(f"ENOMEM: this host has not the memory for a run of that size ({wrong})") from wrong
