"""What another thread of the process does to memory while the device works: each change invalidates mirrors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mprotect
from kit.memory.types import MADV_PAGEOUT, PAGE, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from kit.flows.hmm_mirror.session import HmmSession
    from kit.sim.engine import Wait

__all__ = ["NOISE_PAGES", "Noise"]

NOISE_PAGES = 16  # of each change
MOST = 500  # changes in a walk: a device that cannot keep up with them would never get to its end


class Noise:
    """Another thread, which changes rights or pages out until `over` is set."""

    def __init__(self, session: HmmSession) -> None:
        self.session, self.over = session, False
        self.thread = session.engine.thread("other thread")

    def run(self) -> Wait:
        """Change something, pause, and so on; the pauses are drawn around the parameter's value."""
        s, p, thread = self.session, self.session.parameters, self.thread
        thread.now = s.engine.now
        for _ in range(MOST):
            if self.over:
                break
            thread.charge(p.noise_interval * float(s.rng.uniform(0.5, 1.5)))
            yield from thread.sync()
            pages = min(NOISE_PAGES, p.pages)
            at = s.base + int(s.rng.integers(0, p.pages - pages + 1)) * PAGE
            at = s.noise_area if p.noise == "unrelated" else at
            if p.noise == "pageout":
                yield from madvise(s.mm, thread, at, pages * PAGE, MADV_PAGEOUT)
            else:
                yield from mprotect(s.mm, thread, at, pages * PAGE, PROT_READ)
                yield from mprotect(s.mm, thread, at, pages * PAGE, PROT_READ | PROT_WRITE)
