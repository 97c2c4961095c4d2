"""Any sequence of operations leaves the driver in a state that its invariants allow, with every byte where it belongs."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from drivers.uvm.harness import Harness
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kit.drivers.uvm.types import ATOMIC_STRONG, CPU, GPU, READ, WRITE, VaRange
from kit.errors import DriverError
from kit.flows.documented import Documented
from kit.sim.engine import Wait

DOCUMENTED = Documented.load("cuda_demand_paging")
# Sizes in pages: full blocks, short ones, no 64 KiB page at all, unaligned heads and tails.
SIZES = st.sampled_from([1, 5, 16, 40, 130, 512, 600, 1024, 1100])
OFFSETS = st.sampled_from([0, 0, 0, 3, 16, 250, 509])
ADVICE = [
    prefix + name
    for prefix in ("", "un")
    for name in ("read_mostly", "preferred_cpu", "preferred_gpu", "accessed_by_cpu", "accessed_by_gpu")
]
# Evictions that the test itself asks for, and what Linux does on the way from munmap to the driver.
NOT_THE_DRIVERS = (
    "pick_and_evict_root_chunk ran",
    *(f"{name} is not" for name in ("munmap", "do_vmi_munmap", "unmap_vmas", "free_pgtables")),
)


class Driver(RuleBasedStateMachine):
    """Allocate, touch from either side, advise, prefetch, evict, free."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[VaRange] = []

    @initialize(
        architecture=st.sampled_from(["pascal", "volta"]),
        module=st.fixed_dictionaries(
            {},
            optional={
                "prefetch_threshold": st.integers(1, 100),
                "prefetch_min_faults": st.integers(1, 20),
                "fault_replay_policy": st.integers(0, 3),
                "fault_coalesce": st.booleans(),
                "cpu_chunk_allocation_sizes": st.sampled_from(["4K", "4K+64K", "4K+2M", "4K+64K+2M"]),
                "pma_batch_nonpinned_order": st.integers(0, 2),
                "thrashing_enable": st.booleans(),
                "thrashing_threshold": st.integers(1, 3),
                "thrashing_pin_threshold": st.integers(1, 3),
                "thrashing_lapse_usec": st.sampled_from([500, 50_000]),
            },
        ),
        roots=st.integers(1, 4),
        entries=st.sampled_from([4096, 8, 2]),
        batch=st.sampled_from([256, 256, 3, 1]),
    )
    def begin(self, architecture: str, module: dict[str, Any], roots: int, entries: int, batch: int) -> None:
        if module.get("fault_replay_policy", 2) == 2:  # without a flush, small batches drown in stale entries
            module["fault_batch_count"] = batch
        self.h = Harness(roots=roots, architecture=architecture, entries=entries, **module)

    def killed_fairly(self, reason: str | None) -> None:
        """Only memory can run out, and only where an operation pins more than one chunk."""
        assert reason is None or (reason == "OutOfMemory" and not all(block.whole for block in self.h.blocks()))

    def unless_out_of_memory(self, work: Wait) -> Wait:
        try:
            yield from work
        except DriverError as error:
            assert error.status == "NV_ERR_NO_MEMORY"

    def pick(self, data: st.DataObject) -> VaRange:
        return self.ranges[data.draw(st.integers(0, len(self.ranges) - 1))]

    def some(self, data: st.DataObject, most: int = 24) -> list[int]:
        """Pages of a range: scattered ones, or a run."""
        chosen = self.pick(data)
        last = chosen.vma.pages - 1
        if data.draw(st.booleans()):
            first = data.draw(st.integers(0, last))
            count = min(data.draw(st.sampled_from([1, 17, 64, 520])), last + 1 - first)
            return [chosen.vma.first + first + at for at in range(count)]
        return [chosen.vma.first + p for p in data.draw(st.lists(st.integers(0, last), min_size=1, max_size=most))]

    @precondition(lambda self: len(self.ranges) < 4)
    @rule(pages=SIZES, offset=OFFSETS)
    def allocate(self, pages: int, offset: int) -> None:
        self.ranges.append(self.h.allocate(pages, offset))
        assert set(self.h.where(self.ranges[-1])) == {"."}

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), write=st.booleans())
    def cpu_touch(self, data: st.DataObject, write: bool) -> None:
        self.h.touch(self.some(data), write)

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), lanes=st.sampled_from([1, 7, 64]))
    def gpu_touch(self, data: st.DataObject, lanes: int) -> None:
        pages = self.some(data)
        access = [data.draw(st.sampled_from([READ, WRITE, ATOMIC_STRONG]))] * len(pages)
        self.killed_fairly(self.h.kernel(pages, access, lanes))

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), write=st.booleans(), moves=st.booleans())
    def both_touch(self, data: st.DataObject, write: bool, moves: bool) -> None:
        kernel = self.h.stream(self.some(data) * 3, WRITE, lanes=7)
        works = [self.h.touching(self.some(data), write)]
        if moves:
            chosen = self.pick(data).vma
            work = self.h.prefetching(chosen.first, chosen.pages, data.draw(st.sampled_from([CPU, GPU])))
            works.append(self.unless_out_of_memory(work))
        reason = self.h.beside(kernel, *works)
        assert reason in (None, "OutOfMemory")  # either of the two may hold every chunk

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), advice=st.sampled_from(ADVICE))
    def advise(self, data: st.DataObject, advice: str) -> None:
        chosen = self.pick(data).vma
        first, count = 0, chosen.pages
        if data.draw(st.booleans()):  # part of it: ranges and blocks are split there
            first = data.draw(st.integers(0, chosen.pages - 1))
            count = data.draw(st.integers(1, chosen.pages - first))
        self.h.run(self.unless_out_of_memory(self.h.advising(advice, chosen.first + first, count)))

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), destination=st.sampled_from([CPU, GPU]))
    def prefetch(self, data: st.DataObject, destination: int) -> None:
        chosen = self.pick(data).vma
        first = data.draw(st.integers(0, chosen.pages - 1))
        count = data.draw(st.integers(1, chosen.pages - first))
        self.h.run(self.unless_out_of_memory(self.h.prefetching(chosen.first + first, count, destination)))

    @precondition(lambda self: self.ranges)
    @rule()
    def evict(self) -> None:
        self.h.evict()

    @rule(microseconds=st.sampled_from([10.0, 1000.0, 200_000.0]))
    def wait(self, microseconds: float) -> None:
        self.h.wait(microseconds)
        self.h.settle()

    @precondition(lambda self: self.ranges)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        chosen = self.pick(data)
        self.ranges.remove(chosen)
        self.h.free(chosen)

    def teardown(self) -> None:
        """Whatever happened, every step ran under a documented caller and in the documented order."""
        if hasattr(self, "h"):
            strays = [v for v in DOCUMENTED.check(self.h.trace).violations if not v.startswith(NOT_THE_DRIVERS)]
            assert not strays

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "h"):
            self.h.check()


TestDriver = Driver.TestCase
TestDriver.settings = settings(
    max_examples=150, stateful_step_count=16, deadline=None, derandomize=True, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip
