"""A second, naive model of demand paging: a page at a time, sets and lists, written from the reference text alone.

One GPU over PCIe, no advice, no thrashing. It knows records, residency, populated memory, chunks, the tree,
and who is evicted next; it knows no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FULL, BIG = 512, 16
Record = tuple[str, int, int, str]


@dataclass(eq=False)
class Root:
    """2 MiB of GPU memory: which piece (by offset) belongs to which block and page index."""

    owners: dict[int, tuple[Block, int]] = field(default_factory=dict)
    pins: int = 0


@dataclass(eq=False)
class Block:
    """Pages [first, first + count); page indexes count from `first`."""

    first: int
    count: int
    at: dict[int, str] = field(default_factory=dict)  # page -> "cpu" or "gpu"
    cpu_mapped: set[int] = field(default_factory=set)
    cpu_memory: set[int] = field(default_factory=set)
    gpu_memory: dict[int, tuple[Root, int, int]] = field(default_factory=dict)  # first page -> root, offset, size
    last_destination: str = ""
    migrations: int = 0

    def units(self) -> list[list[int]]:
        """Head, 64 KiB units and tail as lists of page indexes; everything when there is no whole unit."""
        by_unit: dict[int, list[int]] = {}
        for page in range(self.count):
            by_unit.setdefault((self.first + page) // BIG, []).append(page)
        if not any(len(unit) == BIG for unit in by_unit.values()):
            return [list(range(self.count))]
        return list(by_unit.values())


class Oracle:
    """The whole system; addresses are virtual page numbers."""

    def __init__(self, roots: int, threshold: int = 51, min_faults: int = 1, prefetch: bool = True) -> None:
        self.threshold, self.min_faults, self.prefetch = threshold, min_faults, prefetch
        self.unowned = roots
        self.pieces: dict[int, list[tuple[Root, int]]] = {BIG: [], 1: []}
        self.unused: list[Root] = []
        self.used: list[Root] = []
        self.blocks: list[Block] = []
        self.records: list[Record] = []
        self.cpu_faults = self.evictions = 0
        self.out_of_memory = False

    def allocate(self, first: int, count: int) -> None:
        """A managed range, cut at 2 MiB boundaries."""
        page = first
        while page < first + count:
            end = min((page // FULL + 1) * FULL, first + count)
            self.blocks.append(Block(page, end - page))
            page = end

    def block_of(self, page: int) -> Block:
        return next(b for b in self.blocks if b.first <= page < b.first + b.count)

    # accesses

    def cpu_touch(self, page: int) -> None:
        block = self.block_of(page)
        if page - block.first not in block.cpu_mapped:
            self.cpu_faults += 1
            self.service("cpu", block, {page - block.first})

    def gpu_touch(self, page: int) -> None:
        self.gpu_batch([page])

    def gpu_batch(self, pages: list[int]) -> None:
        """Faults that are served together: block by block, ascending, until memory runs out."""
        for block in sorted(self.blocks, key=lambda b: b.first):
            if self.out_of_memory:
                return
            asked = {p - block.first for p in pages if block.first <= p < block.first + block.count}
            if any(block.at.get(p) != "gpu" for p in asked):
                self.service("gpu", block, asked)

    # one block service

    def service(self, processor: str, block: Block, asked: set[int]) -> None:
        kept: list[tuple[Root, int, int]] = []
        taken: list[Root] = []
        while True:
            # Looked at anew in each try: the eviction for the first may have taken a page that was there.
            faulted = {p for p in asked if block.at.get(p) != processor or processor == "cpu"}
            wanted = faulted | self.hint(processor, block, faulted)
            if self.make_room(processor, block, wanted, kept, taken):
                break
            if self.out_of_memory:
                break
        if not self.out_of_memory:
            self.copy(processor, block, wanted, faulted, "coherence")
            self.settle(processor, block, wanted)
        for root in taken:
            self.unpin(root)
        for root, offset, size in kept:
            root.pins -= 1
            self.release(root, offset, size)

    def settle(self, destination: str, block: Block, wanted: set[int]) -> None:
        """After the copies: residency, mappings, the order of eviction.

        Memory goes to the unused when its last page leaves; what is empty already stays where it is among them
        (block_clear_resident_processor).
        """
        held = "gpu" in block.at.values()
        for page in wanted:
            block.at[page] = destination
            (block.cpu_mapped.add if destination == "cpu" else block.cpu_mapped.discard)(page)
        if block.count == FULL and block.gpu_memory:
            root = block.gpu_memory[0][0]
            if destination == "gpu":
                self.relist(root, self.used)
            elif held and "gpu" not in block.at.values():
                self.relist(root, self.unused)

    def copy(self, destination: str, block: Block, wanted: set[int], faulted: set[int], why: str) -> None:
        """Records: a run ends at a gap, or where faulted and prefetched pages meet."""
        way = "HtoD" if destination == "gpu" else "DtoH"
        last, last_cause = -2, ""
        for page in sorted(wanted):
            if block.at.get(page) in (None, destination):
                continue
            cause = why if page in faulted or why == "eviction" else "prefetch"
            if page == last + 1 and cause == last_cause:
                way_, start, length, _ = self.records.pop()
                self.records.append((way_, start, length + 1, cause))
            else:
                self.records.append((way, block.first + page, 1, cause))
            last, last_cause = page, cause

    # prefetch

    def hint(self, destination: str, block: Block, faulted: set[int]) -> set[int]:
        if not self.prefetch or not faulted:
            return set()
        if block.last_destination != destination:
            block.last_destination, block.migrations = destination, 0
        fetched = self.climb(block, destination, faulted)
        fetched -= faulted
        if destination == "cpu":
            fetched -= {p for p in fetched if block.at.get(p) == "cpu" and p in block.cpu_mapped}
        block.migrations += len(faulted)
        return fetched if block.migrations >= self.min_faults else set()

    def climb(self, block: Block, destination: str, faulted: set[int]) -> set[int]:
        units = block.units()
        head = -block.first % BIG
        shift = BIG - head if head and len(units) > 1 else 0
        leaves = [0] * shift + [int(block.at.get(p) == destination or p in faulted) for p in range(block.count)]
        for unit in units:
            if faulted & set(unit):
                for page in unit:
                    leaves[shift + page] = 1
        levels = [leaves]
        sizes = [[1] * len(leaves)]
        while len(levels[-1]) > 1:
            levels.append([sum(levels[-1][i : i + 2]) for i in range(0, len(levels[-1]), 2)])
            sizes.append([sum(sizes[-1][i : i + 2]) for i in range(0, len(sizes[-1]), 2)])
        fetched: set[int] = set()
        for page in sorted(faulted):
            best = range(0)
            for depth, (counts, width) in enumerate(zip(levels, sizes, strict=True)):
                node = (page + shift) >> depth
                if 100 * counts[node] > self.threshold * width[node]:
                    best = range(node << depth, (node << depth) + width[node])
            if not best:
                continue
            start = best.start - shift if best.start >= shift else shift  # the driver's quirk for ranges in the padding
            end = best.stop - shift
            fetched |= set(range(start, end))
            if end == block.count:
                break
        return fetched

    # memory

    def make_room(
        self, destination: str, block: Block, wanted: set[int], kept: list[tuple[Root, int, int]], taken: list[Root]
    ) -> bool:
        """Unmap what moves and populate the destination; False: memory was evicted, start again."""
        missing = sorted(p for p in wanted if block.at.get(p) != destination)
        block.cpu_mapped -= set(missing) if destination == "gpu" else set()
        if destination == "cpu":
            self.populate_cpu(block, missing)
            return True
        for page in missing:
            start, size = self.gpu_chunk(block, page)
            if start in block.gpu_memory:
                continue
            found = next((k for k in kept if k[2] == size), None)
            if found is not None:
                kept.remove(found)
                root, offset, _ = found
            else:
                got = self.take(size)
                if got is None:
                    self.evict_for(size, kept)
                    return False
                root, offset = got
            root.owners[offset] = (block, start)
            block.gpu_memory[start] = (root, offset, size)
            taken.append(root)
        return True

    def populate_cpu(self, block: Block, missing: list[int]) -> None:
        for page in missing:
            if page in block.cpu_memory:
                continue
            unit = {p for p in range(block.count) if (block.first + p) // BIG == (block.first + page) // BIG}
            if block.count == FULL and not block.cpu_memory:
                block.cpu_memory |= set(range(FULL))
            elif len(unit) == BIG and not unit & block.cpu_memory:
                block.cpu_memory |= unit
            else:
                block.cpu_memory.add(page)

    def gpu_chunk(self, block: Block, page: int) -> tuple[int, int]:
        if block.count == FULL:
            return 0, FULL
        start = (block.first + page) // BIG * BIG - block.first
        return (start, BIG) if start >= 0 and start + BIG <= block.count else (page, 1)

    def take(self, size: int) -> tuple[Root, int] | None:
        """A free piece of that size, a larger one split, or a fresh root chunk."""
        if size < FULL and self.pieces[size]:
            root, offset = self.pieces[size].pop(0)
        elif size == 1 and self.pieces[BIG]:
            root, offset = self.pieces[BIG].pop(0)
            self.pieces[1] += [(root, offset + i) for i in range(1, BIG)]
        elif self.unowned:
            self.unowned -= 1
            root, offset = Root(), 0
            self.cut(root, size)
        else:
            return None
        for order in (self.used, self.unused):
            if root in order:
                order.remove(root)
        root.pins += 1
        return root, offset

    def cut(self, root: Root, size: int) -> None:
        """Split a whole root chunk, one level at a time; the first piece is the caller's."""
        if size < FULL:
            self.pieces[BIG] += [(root, at) for at in range(BIG, FULL, BIG)]
        if size == 1:
            self.pieces[1] += [(root, at) for at in range(1, BIG)]

    def evict_for(self, size: int, kept: list[tuple[Root, int, int]]) -> None:
        order = self.unused or self.used
        if not order:
            self.out_of_memory = True
            return
        root = order.pop(0)
        self.evictions += 1
        for length, free in self.pieces.items():
            self.pieces[length] = [piece for piece in free if piece[0] is not root]
        while root.owners:
            block, _ = root.owners[min(root.owners)]
            mine = {start: facts for start, facts in block.gpu_memory.items() if facts[0] is root}
            pages = {start + i for start, (_, _, length) in mine.items() for i in range(length)}
            pages = {p for p in pages if block.at.get(p) == "gpu"}
            self.populate_cpu(block, sorted(pages))
            self.copy("cpu", block, pages, set(), "eviction")
            for page in pages:
                block.at[page] = "cpu"
            for start, (_, offset, _) in mine.items():
                del block.gpu_memory[start]
                del root.owners[offset]
        root.pins = 1
        self.cut(root, size)
        kept.append((root, 0, size))

    def unpin(self, root: Root) -> None:
        root.pins -= 1
        if not root.pins:
            self.relist(root, self.used)

    def relist(self, root: Root, order: list[Root]) -> None:
        if root.pins:
            return
        for other in (self.used, self.unused):
            if root in other:
                other.remove(root)
        order.append(root)

    def release(self, root: Root, offset: int, size: int) -> None:
        """A piece that was kept for nothing."""
        if not root.owners and not root.pins:
            for length, free in self.pieces.items():
                self.pieces[length] = [piece for piece in free if piece[0] is not root]
            for order in (self.used, self.unused):
                if root in order:
                    order.remove(root)
            self.unowned += 1
            return
        self.pieces[size].append((root, offset))
        small = [o for r, o in self.pieces[1] if r is root and o // BIG == offset // BIG]
        if len(small) == BIG:
            self.pieces[1] = [(r, o) for r, o in self.pieces[1] if r is not root or o not in small]
            self.pieces[BIG].append((root, offset // BIG * BIG))
        self.relist(root, self.used)
