"""Physical memory of one GPU: 2 MiB root chunks from PMA, split lazily, evicted least recently serviced-into."""

from __future__ import annotations

import errno
from collections import OrderedDict
from typing import TYPE_CHECKING

from kit.drivers.uvm.pmm_chunks import Chunk, RootChunk, first_owner, pinned
from kit.drivers.uvm.types import BIG_PAGES, BLOCK_PAGES, VaBlock
from kit.errors import DriverError
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.uvm.gpu import Gpu

__all__ = ["Pmm"]


class Pmm:
    """uvm_pmm_gpu_t.

    Parameters
    ----------
    gpu : Gpu
    roots : int
        2 MiB root chunks that PMA can give.
    batch : int
        Root chunks that PMA is asked for at a time.
    """

    def __init__(self, gpu: Gpu, roots: int, batch: int) -> None:
        self.gpu, self.batch = gpu, batch
        self.roots = roots
        self.pma_next = 0
        self.pma_returned: list[int] = []
        self.free_zeroed: list[RootChunk] = []
        self.free_dirty: list[RootChunk] = []
        self.unused: OrderedDict[RootChunk, None] = OrderedDict()
        self.discarded: OrderedDict[RootChunk, None] = OrderedDict()
        self.used: OrderedDict[RootChunk, None] = OrderedDict()
        self.splits: dict[int, list[Chunk]] = {BIG_PAGES: [], 1: []}
        self.evictions = 0

    @waiting_step
    def uvm_pmm_gpu_alloc_user(self, thread: Thread, pages: int, evict: bool) -> Wait:
        """Return a pinned chunk of `pages` pages, evicting when asked to, else None without memory (uvm_pmm_gpu.c).

        Raises
        ------
        DriverError
            ENOMEM (NV_ERR_NO_MEMORY): nothing that can be evicted.
        """
        return (yield from self.pmm_gpu_alloc(thread, pages, evict))

    @waiting_step
    def pmm_gpu_alloc(self, thread: Thread, pages: int, evict: bool) -> Wait:
        """Allocate one chunk (uvm_pmm_gpu.c)."""
        return (yield from self.alloc_chunk(thread, pages, evict))

    @waiting_step
    def alloc_chunk(self, thread: Thread, pages: int, evict: bool) -> Wait:
        """Take a free chunk of that size, or split a larger one (uvm_pmm_gpu.c)."""
        thread.charge(self.gpu.costs.chunk_alloc)
        chunk = self.claim_free_chunk(thread, pages)
        if chunk is None and pages == BLOCK_PAGES:
            root = yield from self.alloc_or_evict_root_chunk_unlocked(thread, evict)
            chunk = pinned(root)
        elif chunk is None:
            chunk = yield from self.alloc_chunk_with_splits(thread, pages, evict)
        return chunk

    @step
    def claim_free_chunk(self, thread: Thread, pages: int) -> Chunk | None:
        """Take a chunk of exactly that size from the free lists, a zeroed one if there is (uvm_pmm_gpu.c)."""
        if pages == BLOCK_PAGES:
            free = self.free_zeroed or self.free_dirty
            if not free:
                return None
            return pinned(free.pop(0))
        if not self.splits[pages]:
            return None
        chunk = self.splits[pages].pop(0)
        self._unlist(chunk.root)
        chunk.root.pins += 1
        return chunk

    @waiting_step
    def alloc_chunk_with_splits(self, thread: Thread, pages: int, evict: bool) -> Wait:
        """Find the next larger free chunk, or a new root chunk, and split it level by level (uvm_pmm_gpu.c)."""
        chunk = None
        for larger in (BIG_PAGES, BLOCK_PAGES):
            if larger > pages and chunk is None:
                chunk = self.claim_free_chunk(thread, larger)
        if chunk is None:
            root = yield from self.alloc_or_evict_root_chunk(thread, evict)
            chunk = pinned(root)
        for size in (BIG_PAGES, 1):
            if chunk is not None and pages <= size < chunk.pages:
                chunk = self.split_gpu_chunk(thread, chunk, size)
        return chunk

    @step
    def split_gpu_chunk(self, thread: Thread, chunk: Chunk, pages: int) -> Chunk:
        """Cut a chunk into pieces of `pages` pages; the first is returned, the rest are free (uvm_pmm_gpu.c)."""
        thread.charge(self.gpu.costs.chunk_alloc)
        # Only the piece that is used keeps the mark of zeroed memory: freeing the others drops it.
        pieces = [Chunk(chunk.root, chunk.offset + at, pages) for at in range(0, chunk.pages, pages)]
        pieces[0].zeroed = chunk.zeroed
        self.splits[pages] += pieces[1:]
        return pieces[0]

    @waiting_step
    def alloc_or_evict_root_chunk_unlocked(self, thread: Thread, evict: bool) -> Wait:
        """The same for callers that want a whole root chunk (uvm_pmm_gpu.c)."""
        return (yield from self._root_chunk(thread, evict))

    @waiting_step
    def alloc_or_evict_root_chunk(self, thread: Thread, evict: bool) -> Wait:
        """A new root chunk from PMA, or one that eviction frees, or None (uvm_pmm_gpu.c)."""
        return (yield from self._root_chunk(thread, evict))

    def _root_chunk(self, thread: Thread, evict: bool) -> Wait:
        root = self.alloc_root_chunk(thread)
        if root is None and evict:
            root = yield from self.pick_and_evict_root_chunk_retry(thread)
        return root

    @step
    def alloc_root_chunk(self, thread: Thread) -> RootChunk | None:
        """Ask PMA for a batch, best effort: the first is used, the rest go on the free lists (uvm_pmm_gpu.c)."""
        got: list[RootChunk] = []
        while len(got) < self.batch:
            if self.pma_returned:
                got.append(RootChunk(self.pma_returned.pop(), zeroed=False))
            elif self.pma_next < self.roots:
                got.append(RootChunk(self.pma_next, zeroed=True))
                self.pma_next += 1
            else:
                break
        if not got:
            return None
        thread.charge(self.gpu.costs.pma_alloc)
        for root in got[1:]:
            (self.free_zeroed if root.zeroed else self.free_dirty).append(root)
        return got[0]

    @waiting_step
    def pick_and_evict_root_chunk_retry(self, thread: Thread) -> Wait:
        """Try again until a root chunk is free or none can be (uvm_pmm_gpu.c)."""
        return (yield from self.pick_and_evict_root_chunk(thread))

    @waiting_step
    def pick_and_evict_root_chunk(self, thread: Thread) -> Wait:
        """Free a root chunk by eviction and hand it straight to the requester (uvm_pmm_gpu.c)."""
        root = self.pick_root_chunk_to_evict(thread)
        if root is None:
            why = "every root chunk is pinned or in eviction"
            raise DriverError(errno.ENOMEM, "NV_ERR_NO_MEMORY", "pick_and_evict_root_chunk", why)
        if root.owners:
            yield from self.evict_root_chunk(thread, root)
        return root

    @step
    def pick_root_chunk_to_evict(self, thread: Thread) -> RootChunk | None:
        """Choose by the documented order: free, unused, discarded, least recently serviced-into (uvm_pmm_gpu.c)."""
        for free in (self.free_dirty, self.free_zeroed):
            if free:
                return free.pop(0)
        for candidates in (self.unused, self.discarded, self.used):
            for root in candidates:
                del candidates[root]
                root.in_eviction = True
                return root
        return None

    @waiting_step
    def evict_root_chunk(self, thread: Thread, root: RootChunk) -> Wait:
        """Move every page resident in the chunk to the CPU, block by block (uvm_pmm_gpu.c)."""
        self.evictions += 1
        pieces = self._take_pieces(root)  # pinned: nobody else may claim them meanwhile
        try:
            while (owner := first_owner(root)) is not None:
                yield from self.evict_root_chunk_from_va_block(thread, root, owner)
        except DriverError:
            root.in_eviction = False
            gone = [c for c in root.owners.values() if c.block is None]
            root.owners = {offset: c for offset, c in root.owners.items() if c.block is not None}
            for piece in [*pieces, *gone]:
                self.splits[piece.pages].append(Chunk(root, piece.offset, piece.pages))
            self.mark_used(root)
            raise
        root.owners.clear()
        root.in_eviction, root.zeroed, root.pins = False, False, 0

    def _take_pieces(self, root: RootChunk) -> list[Chunk]:
        """Take the free pieces of a split root chunk off the free lists and return them."""
        if not any(self.splits.values()):
            return []
        taken = [piece for free in self.splits.values() for piece in free if piece.root is root]
        for size, free in self.splits.items():
            self.splits[size] = [piece for piece in free if piece.root is not root]
        return taken

    @waiting_step
    def evict_root_chunk_from_va_block(self, thread: Thread, root: RootChunk, block: VaBlock) -> Wait:
        """Lock one owner and take its chunks (uvm_pmm_gpu.c)."""
        from kit.drivers.uvm.va_block_evict import uvm_va_block_evict_chunks

        yield from block.lock.acquire(thread)
        try:
            yield from uvm_va_block_evict_chunks(block, thread, root)
        finally:
            yield from block.lock.release(thread)

    def unpin(self, chunk: Chunk) -> None:
        """End of the operation that allocated `chunk`: it can be evicted from now on."""
        root = chunk.root
        root.pins -= 1
        if root.pins == 0 and not root.in_eviction and root.owners:
            self.mark_used(root)

    def own(self, chunk: Chunk, block: VaBlock, page_index: int) -> None:
        """Give a chunk to a block."""
        chunk.block, chunk.page_index, chunk.zeroed = block, page_index, False
        chunk.root.owners[chunk.offset] = chunk
        chunk.root.zeroed = False

    def mark_used(self, root: RootChunk) -> None:
        """uvm_pmm_gpu_mark_root_chunk_used: append to the used list."""
        if root.pins or root.in_eviction:
            return
        if root in self.used:
            self.used.move_to_end(root)
            return
        self._unlist(root)
        self.used[root] = None

    def mark_unused(self, root: RootChunk) -> None:
        """uvm_pmm_gpu_mark_root_chunk_unused: nothing is resident there."""
        if root.pins or root.in_eviction:
            return
        self._unlist(root)
        self.unused[root] = None

    def free(self, thread: Thread, chunk: Chunk) -> None:
        """uvm_pmm_gpu_free: give a chunk back, merging eagerly; one free root chunk returns to PMA."""
        root = chunk.root
        if root.in_eviction:
            chunk.block = None  # stays pinned: whoever evicts the root chunk picks it up
            return
        root.owners.pop(chunk.offset, None)
        if chunk.pages < BLOCK_PAGES:
            if root.owners or root.pins:
                self.splits[chunk.pages].append(Chunk(root, chunk.offset, chunk.pages))
                self._merge_small(root)
                if not root.pins:
                    self.mark_used(root)
                return
            self._take_pieces(root)
        self._unlist(root)
        root.zeroed = False
        self.free_dirty.append(root)
        self.pma_returned.append(self.free_dirty.pop(0).index)

    def _merge_small(self, root: RootChunk) -> None:
        """Sixteen free neighbours of 4 KiB become one of 64 KiB again."""
        small = [c.offset for c in self.splits[1] if c.root is root]
        for base in {offset // BIG_PAGES * BIG_PAGES for offset in small}:
            group = [o for o in small if o // BIG_PAGES * BIG_PAGES == base]
            if len(group) == BIG_PAGES:
                self.splits[1] = [c for c in self.splits[1] if c.root is not root or c.offset not in group]
                self.splits[BIG_PAGES].append(Chunk(root, base, BIG_PAGES))

    def _unlist(self, root: RootChunk) -> None:
        for lru in (self.unused, self.discarded, self.used):
            lru.pop(root, None)
