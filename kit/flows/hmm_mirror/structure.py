"""The data structure: one node a page, each holding a pointer; and in which order a walk visits the nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.flows.hmm_mirror.parameters import HmmParameters

__all__ = ["Structure", "rewritten"]

PAGE = 4096
_TAG = np.uint64(PAGE - 1)  # pointers are page-aligned: the bits below count the writes to a node
Pages = NDArray[np.int64]
Words = NDArray[np.uint64]


class Structure:
    """Nodes, pointers and walks of a list, tree or graph of `pages` nodes.

    Parameters
    ----------
    parameters : HmmParameters
    rng : numpy Generator
        Decides where nodes lie, what a graph's edges are, and which visits write.

    Attributes
    ----------
    place : ndarray of int64, shape (pages,)
        The page on which node k lies.
    """

    def __init__(self, parameters: HmmParameters, rng: np.random.Generator) -> None:
        self.parameters, self.rng, self.pages = parameters, rng, parameters.pages
        self.place = self._place()
        self._target = self._targets()

    def _place(self) -> Pages:
        n = self.pages
        if self.parameters.order == "random":
            return self.rng.permutation(n)
        nodes = np.arange(n)
        if self.parameters.order == "strided" and n > 2:
            stride = max(int(n**0.5), 2)  # all pages of a residue, then those of the next
            return np.concatenate([nodes[first::stride] for first in range(stride)])
        return nodes

    def _targets(self) -> Pages:
        """Return the node that each node points to, -1 for none."""
        n, kind = self.pages, self.parameters.structure
        nodes = np.arange(n)
        if kind == "tree":
            return (nodes - 1) // 2  # the root's is -1
        if kind == "graph":
            return self.rng.integers(0, n, n)
        following = nodes + 1
        following[-1] = -1
        return following

    def words(self, base: int) -> Words:
        """Return what each page holds: its node's pointer, in an address space where page 0 lies at `base` (bytes)."""
        held = np.zeros(self.pages, dtype=np.uint64)
        points = self._target >= 0
        addresses = base + self.place[self._target[points]] * PAGE
        held[self.place[np.flatnonzero(points)]] = addresses.astype(np.uint64)
        return held

    def walk(self) -> Pages:
        """Return the pages that a walk visits, in order.

        A list is followed from its head; a tree from leaf after leaf up to the root; of a graph, each node is
        visited and then the one that its edge leads to.
        """
        wanted, n = self.parameters.visits or self.pages, self.pages
        if self.parameters.structure == "list":
            nodes = np.arange(n)
        elif self.parameters.structure == "graph":
            nodes = np.stack([np.arange(n), self._target], axis=1).reshape(-1)
        else:
            leaves = np.arange(n // 2, n)
            depth = int(n).bit_length()
            leaves = leaves[: -(-wanted // max(depth - 1, 1)) + 1]
            steps = [leaves]
            for _ in range(depth):
                steps.append(np.where(steps[-1] > 0, (steps[-1] - 1) // 2, -1))
            nodes = np.stack(steps, axis=1).reshape(-1)
            nodes = nodes[nodes >= 0]
        repeated = np.resize(nodes, wanted) if len(nodes) < wanted else nodes[:wanted]
        return self.place[repeated]

    def writes(self, count: int, share: float) -> NDArray[np.bool_]:
        """Return which of `count` visits write."""
        return np.asarray(self.rng.random(count) < share)

    def some_pages(self, share: float) -> Pages:
        """Return a share of the pages, ascending, chosen anew at each call."""
        count = round(self.pages * share)
        return np.sort(self.rng.permutation(self.pages)[:count])


def rewritten(words: Words, old: int, new: int) -> Words:
    """Return pointers of a structure at byte `old` as pointers of its copy at byte `new`; null and counts stay."""
    pointer = words & ~_TAG
    return np.where(pointer == 0, words, words - np.uint64(old) + np.uint64(new))
