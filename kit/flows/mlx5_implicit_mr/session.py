"""A session: one registration of the whole address space, and remote writes that fault it in piece by piece."""

from __future__ import annotations

from typing import Self

import numpy as np

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.enums import U64_MAX, Access
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.errors import Errno, raise_for
from kit.flows.mlx5_implicit_mr.parameters import ImplicitParameters
from kit.flows.rdma.content import PAGE, Area, cpu_write
from kit.flows.rdma.pressure import chosen_pages, page_out
from kit.flows.rdma.session import RdmaSession
from kit.flows.rdma.traffic import Traffic, Transfer, cut
from kit.flows.run import Allocation, Integrity
from kit.memory.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "ImplicitSession"]

STAGES = ("open_device", "register", "rdma_write", "page_out", "write_again", "deregister")
REMOTE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
CPU_NUMBERS = 1 << 30  # stamps of the CPU: far from those of messages
MAPPING = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE


class ImplicitSession(RdmaSession):
    """The flow as an object with one method a stage."""

    flow = "mlx5_implicit_mr"
    stages_of = STAGES
    parameters: ImplicitParameters

    def __init__(self, parameters: ImplicitParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        self.areas: list[Area] = []
        self.traffic = Traffic(self, parameters.message_bytes, parameters.depth)
        self._mr: Mlx5IbMr | None = None

    def open_device(self) -> Self:
        """Load the module, open the devices, map the areas, connect queue pairs."""
        return self.stage("open_device")

    def register(self) -> Self:
        """Call ibv_reg_mr for the whole address space: no page is touched, every KSM slot is empty."""
        return self.stage("register")

    def rdma_write(self) -> Self:
        """Send every message once: missing gigabytes and missing pages are faulted in."""
        return self.stage("rdma_write")

    def page_out(self) -> Self:
        """Pages leave; a gigabyte whose last page has left loses its child."""
        return self.stage("page_out")

    def write_again(self) -> Self:
        """Send every message again, with a page-out between two rounds."""
        return self.stage("write_again")

    def deregister(self) -> Self:
        """Call ibv_dereg_mr: the key goes, then the children, then their pages' DMA mappings."""
        return self.stage("deregister")

    @property
    def mr(self) -> Mlx5IbMr:
        """The region over the whole address space."""
        assert self._mr is not None, "register comes first"
        return self._mr

    # -- stages ----------------------------------------------------------------------------------------------------

    def _open_device(self) -> Wait:
        yield from self._open()
        p, host = self.parameters, self.responder
        for index in range(p.areas):
            va = p.area_address + index * p.area_stride
            raise_for(
                (yield from mmap(
                    host.mm, host.cpu, p.area_bytes, PROT_READ | PROT_WRITE, MAPPING, addr=va, name=f"area {index}"
                ))
            )  # fmt: skip
            area = Area(f"area {index}", va, p.area_bytes // PAGE, host.memory.words)
            self.areas.append(area)
            self.allocations.append(Allocation(area.name, va, p.area_bytes))
            yield from self._touch(area)
        yield from self.traffic.prepare()

    def _touch(self, area: Area) -> Wait:
        """The responder's CPU writes some of the pages that messages will reach."""
        p, host = self.parameters, self.responder
        pages = p.first_page + np.arange(p.touch_pages)
        pages = {"none": pages[:0], "half": pages[::2], "all": pages}[p.resident]
        yield from cpu_write(host.mm, host.cpu, area, pages, CPU_NUMBERS + len(self.areas), self.rng)

    def _register(self) -> Wait:
        host = self.responder
        mr = yield from verbs.reg_mr(host.pd, host.cpu, 0, U64_MAX, REMOTE | Access.ON_DEMAND)
        if isinstance(mr, Errno):
            raise_for(mr)
        self._mr = mr
        host.mrs.append(("implicit", mr))
        self.arm(host)

    def _rdma_write(self) -> Wait:
        yield from self._round(during=self.parameters.page_out_when == "during")

    def _page_out(self) -> Wait:
        if self.parameters.page_out_when == "between" and (
            self.parameters.rounds > 1 or self.parameters.page_out != "none"
        ):
            yield from self._leave(while_in_use=False)

    def _write_again(self) -> Wait:
        p = self.parameters
        for number in range(1, p.rounds):
            if number > 1 and p.page_out_when == "between":
                yield from self._leave(while_in_use=False)
            yield from self._round(during=p.page_out_when == "during")

    def _deregister(self) -> Wait:
        if self.parameters.deregister:
            self.note((yield from verbs.dereg_mr(self.mr, self.responder.cpu)), "ibv_dereg_mr")

    def _round(self, during: bool) -> Wait:
        transfers = self._transfers()
        env = self.engine.env
        sending = env.process(self.traffic.run(transfers, self.mr.rkey))
        if during:
            yield from self._leave(while_in_use=True)
        yield sending
        yield from self.responder.cpu.sync()

    def _transfers(self) -> list[Transfer]:
        """Return the messages of one round: area after area, or all shuffled."""
        p = self.parameters
        found = []
        for area in self.areas:
            parts = cut(area, p.first_page, p.touch_pages, p.message_bytes)
            if p.pattern == "strided" and len(parts) > 2:
                stride = max(int(len(parts) ** 0.5), 2)
                parts = [part for first in range(stride) for part in parts[first::stride]]
            found += [(area, address, length) for address, length in parts]
        if p.pattern == "random":
            found = [found[at] for at in self.rng.permutation(len(found))]
        reads = np.full(len(found), p.operation == "read")
        if p.operation == "mixed":
            reads = self.rng.random(len(found)) < p.read_share
        return [Transfer(*each, read=bool(read)) for each, read in zip(found, reads, strict=True)]

    def _leave(self, while_in_use: bool) -> Wait:
        p, host = self.parameters, self.responder
        if p.page_out == "none":
            return
        thread = host.engine.thread("program")
        for area in self.areas:
            if while_in_use:
                yield from self.engine.pause(self.rng.random() * 400.0)
                thread.now = max(thread.now, self.engine.now)
            pages = chosen_pages(p.page_out_pattern, p.first_page, p.touch_pages, self.rng)
            yield from page_out(host, thread, p.page_out, area, pages, while_in_use)

    # -- the result --------------------------------------------------------------------------------------------------

    def integrity(self) -> Integrity:
        """Compare every page of the areas, and every page that READs brought."""
        found = [area.check(self.responder.mm) for area in self.areas]
        checked = sum(each for each, _ in found) + self.traffic.reads_checked
        return Integrity(checked, sum(lost for _, lost in found) + self.traffic.reads_lost)

    def metrics(self) -> dict[str, float]:
        """Return what is particular to implicit regions."""
        mr, dev = self._mr, self.responder.dev
        children = len(mr.implicit_children) if mr is not None else 0
        return {"ksm_entries": dev.imr.ksm_entries, "child_bytes": dev.imr.mtt_size, "children": children}
