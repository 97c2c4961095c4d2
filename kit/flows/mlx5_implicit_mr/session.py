"""A session: one registration of the whole address space, and remote writes that fault it in piece by piece."""

from __future__ import annotations

from typing import Self

import numpy as np

from kit.drivers.mlx5 import verbs
from kit.errors import raise_for
from kit.flows.mlx5_implicit_mr.parameters import ImplicitParameters
from kit.flows.rdma.content import Area, cpu_write
from kit.flows.rdma.one_sided import OneSidedSession
from kit.flows.rdma.pressure import chosen_pages, page_out
from kit.flows.rdma.traffic import Transfer, cut, transfers_of
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "ImplicitSession"]

STAGES = ("open_device", "register", "rdma_write", "page_out", "write_again", "deregister")
CPU_NUMBERS = 1 << 30  # stamps of the CPU: far from those of messages
MAPPING = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE


class ImplicitSession(OneSidedSession):
    """The flow as an object with one method a stage."""

    stages_of = STAGES
    parameters: ImplicitParameters

    def __init__(self, parameters: ImplicitParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario, parameters.message_bytes, parameters.depth, parameters.qps)

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

    # -- stages ----------------------------------------------------------------------------------------------------

    def _open_device(self) -> Wait:
        yield from self.open_hosts()
        p, host = self.parameters, self.responder
        for index in range(p.areas):
            va = p.area_address + index * p.area_stride
            raise_for(
                (yield from mmap(
                    host.mm, host.cpu, p.area_bytes, PROT_READ | PROT_WRITE, MAPPING, addr=va, name=f"area {index}"
                ))
            )  # fmt: skip
            yield from self._touch(self.add_area(Area(f"area {index}", va, p.area_bytes // PAGE, host.memory.words)))
        yield from self.traffic.prepare()

    def _touch(self, area: Area) -> Wait:
        """The responder's CPU writes some of the pages that messages will reach."""
        p, host = self.parameters, self.responder
        pages = p.first_page + np.arange(p.touch_pages)
        pages = {"none": pages[:0], "half": pages[::2], "all": pages}[p.resident]
        yield from cpu_write(host.mm, host.cpu, area, pages, CPU_NUMBERS + len(self.areas), self.rng)

    def _register(self) -> Wait:
        yield from self.register_one("implicit")

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
        sending = env.process(self.traffic.run(transfers, self.mr))
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
            found += parts
        if p.pattern == "random":
            found = [found[at] for at in self.rng.permutation(len(found))]
        return transfers_of(found, p.operation, p.read_share, self.rng)

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

    def own_metrics(self) -> dict[str, float]:
        """Return what is particular to implicit regions."""
        imr = self.responder.dev.imr
        children = sum(len(mr.implicit_children) for _name, mr in self.responder.mrs)
        return {"ksm_entries": imr.ksm_entries, "child_bytes": imr.mtt_size, "children": children}
