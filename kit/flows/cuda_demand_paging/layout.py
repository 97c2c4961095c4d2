"""How a program's allocations lie in ranges, and how much GPU memory they meet."""

from __future__ import annotations

from collections.abc import Sequence

from kit.errors import ParameterError
from kit.flows.cuda_demand_paging.accesses import PAGE
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.sim.machine import Machine

__all__ = ["gpu_memory_bytes", "packed_ranges"]

BLOCK = 2 << 20
Sizes = Sequence[tuple[str, int]]


def gpu_memory_bytes(parameters: CudaParameters, machine: Machine, sizes: Sizes) -> int:
    """Return the GPU's memory: the machine's, what was asked for, or what `oversubscription` leaves.

    Parameters
    ----------
    parameters : CudaParameters
    machine : Machine
    sizes : sequence of (str, int)
        Name and bytes of each allocation: the working set.

    Raises
    ------
    ParameterError
        Not one root chunk of 2 MiB would be left.
    """
    p = parameters
    if not p.oversubscription:
        return p.gpu_memory_bytes or int(machine["gpu_memory_bytes"])
    working_set = sum(-(-size // PAGE) * PAGE for _, size in sizes)
    memory = int(working_set / p.oversubscription) // BLOCK * BLOCK
    if memory < BLOCK:
        most = f"at most {working_set / BLOCK:.3g}: a working set of {working_set} B must leave one 2 MiB root chunk"
        raise ParameterError("oversubscription", p.oversubscription, most)
    return memory


def packed_ranges(parameters: CudaParameters, sizes: Sizes) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """Pack allocations into ranges: one each, or as many as fit into ``range_bytes``.

    Returns
    -------
    list of (int, list of (str, int, int))
        Bytes of the range; name, bytes and offset in the range of each allocation in it.

    Raises
    ------
    ParameterError
        An allocation is larger than a range.
    """
    size = parameters.range_bytes
    packed: list[tuple[int, list[tuple[str, int, int]]]] = []
    used = 0
    for name, nbytes in sizes:
        whole = -(-nbytes // PAGE) * PAGE
        if not size:
            packed.append((whole, [(name, nbytes, 0)]))
            continue
        if whole > size:
            raise ParameterError("range_bytes", size, f"0, or at least {whole}: allocation {name} has {nbytes} bytes")
        if not packed or used + whole > size:
            packed.append((size, []))
            used = 0
        packed[-1][1].append((name, nbytes, used))
        used += whole
    return packed
