"""Departures of a trace from the documented steps, found without a Python step per span.

Callers are counted as pairs. Orders are checked once for each distinct sequence of callees: a
service loop that ran a million times has few of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kit.flows.documented import Documented
    from kit.sim.trace import Trace

__all__ = ["reached", "violations"]

Ints = NDArray[np.int64]
_EVENT, _UNKNOWN = -1, -2


def reached(trace: Trace) -> set[str]:
    """Return the step words that occur in the trace."""
    counts = np.bincount(trace.spans.column("step").astype(np.int64), minlength=len(trace.steps.words))
    return {trace.steps.words[i] for i in np.flatnonzero(counts)}


def violations(documented: Documented, trace: Trace) -> list[str]:
    """Return what does not conform, one line for each kind, most frequent first.

    Parameters
    ----------
    documented : Documented
        The call graph.
    trace : Trace
        Spans in the order in which they were opened.
    """
    step = trace.spans.column("step").astype(np.int64)
    parent = trace.spans.column("parent").astype(np.int64)
    number = {name: i for i, name in enumerate(documented.steps)}
    other = dict.fromkeys([*documented.events, *documented.hardware], _EVENT)
    kinds = np.array([number.get(w, other.get(w, _UNKNOWN)) for w in trace.steps.words] or [_EVENT], dtype=np.int64)
    child = kinds[step]
    lost = (parent < -1) | (parent >= np.arange(len(parent)))
    caller = np.where((parent < 0) | lost, _EVENT, child[np.where(lost, 0, parent)])

    found: Counter[str] = Counter()
    names = np.bincount(step[child == _UNKNOWN], minlength=len(trace.steps.words))
    for i in np.flatnonzero(names):
        found[f"{trace.steps.words[i]} is not a documented step"] += int(names[i])
    if lost.any():
        found["a span's parent is not an earlier span"] += int(lost.sum())
    checked = (child >= 0) & (caller != _UNKNOWN) & ~lost
    called = _check_callers(documented, caller, child, checked, found)
    _check_orders(documented, caller[called], child[called], parent[called], found)
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [f"{text} ({count} times)" if count > 1 else text for text, count in ranked]


def _check_callers(
    documented: Documented, caller: Ints, child: Ints, checked: NDArray[np.bool_], found: Counter[str]
) -> NDArray[np.bool_]:
    """Report pairs that are not in the graph; return which rows have a documented caller."""
    steps = list(documented.steps.values())
    pair = (caller[checked] + 1) * len(steps) + child[checked]
    counts = np.bincount(pair, minlength=(len(steps) + 1) * len(steps)).reshape(len(steps) + 1, len(steps))
    allowed = np.zeros(counts.shape, dtype=np.bool_)
    roots = set(documented.roots)
    for up, down in np.argwhere(counts):
        name = steps[down].name
        allowed[up, down] = name in steps[up - 1].order if up else name in roots
        if allowed[up, down]:
            continue
        text = f"{steps[up - 1].name} does not call {name}" if up else f"{name} ran without a caller"
        known = documented.callers(name)
        found[f"{text}; documented callers: {', '.join(known) or 'none, it is a root'}"] += int(counts[up, down])
    called = checked & (caller >= 0)
    called[called] = allowed[caller[called] + 1, child[called]]
    return called


def _check_orders(documented: Documented, caller: Ints, child: Ints, parent: Ints, found: Counter[str]) -> None:
    """Report callees that come where their caller's documented order has no place for them."""
    steps = list(documented.steps.values())
    memos: dict[int, dict[int, int]] = {}
    for up, sequence, count in _distinct_sequences(caller, child, parent, 1 + max(s.order.widest for s in steps)):
        order, memo = steps[up].order, memos.setdefault(up, {})
        state, before = 0, -1
        for down in sequence:
            key = state * len(steps) + down
            then = memo.get(key)
            if then is None:
                after = order.after(state, steps[down].name)
                then = memo[key] = -1 if after is None else after
            if then >= 0:
                state = then
            else:
                found[f"{steps[up].name} calls {steps[down].name} after {steps[before].name}, out of order"] += count
            before = down


def _distinct_sequences(caller: Ints, child: Ints, parent: Ints, most: int) -> Iterator[tuple[int, list[int], int]]:
    """Yield (caller, its callees in order, how many spans had them) for each distinct sequence.

    Of a run of the same callee only the first `most` are kept: more of them than it has positions
    is either a loop, in which any number is right, or already wrong.
    """
    if not len(parent):
        return
    by_parent = np.argsort(parent, kind="stable")
    caller, child, parent = caller[by_parent], child[by_parent], parent[by_parent]
    rows = np.arange(len(parent))
    changes = np.r_[True, (parent[1:] != parent[:-1]) | (child[1:] != child[:-1])]
    kept = rows - np.maximum.accumulate(np.where(changes, rows, 0)) < most
    caller, child, parent = caller[kept], child[kept], parent[kept]

    starts = np.flatnonzero(np.r_[True, parent[1:] != parent[:-1]])
    lengths = np.diff(np.r_[starts, len(parent)])
    place = np.arange(len(parent)) - np.repeat(starts, lengths)
    # A random 64-bit weight for each place and for each step: equal sums mean equal sequences.
    random = np.random.default_rng(0)
    limit = np.iinfo(np.uint64).max
    of_place = random.integers(0, limit, int(lengths.max()), dtype=np.uint64) | np.uint64(1)
    of_step = random.integers(0, limit, int(max(caller.max(), child.max())) + 1, dtype=np.uint64)
    marks = np.add.reduceat(of_place[place] * of_step[child], starts) + of_step[caller[starts]]
    by_mark = np.argsort(marks, kind="stable")
    firsts = np.flatnonzero(np.r_[True, np.diff(marks[by_mark]) != 0])
    counts = np.diff(np.r_[firsts, len(marks)])
    for group, count in zip(by_mark[firsts], counts, strict=True):
        start = starts[group]
        yield int(caller[start]), child[start : start + lengths[group]].tolist(), int(count)
