"""Firmware commands: what the driver waits for (drivers/net/ethernet/mellanox/mlx5/core @ 6.9 and 7.0)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.enums import KLM
from kit.errors import Errno
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.sim.engine import Thread, Wait

__all__ = [
    "QueryMkeyOut", "create_mkey_cb", "mlx5_cmd_exec", "mlx5_cmd_exec_cb", "mlx5_core_create_mkey",
    "mlx5_core_destroy_mkey", "mlx5_core_query_mkey",
]  # fmt: skip


@dataclass(slots=True)
class QueryMkeyOut:
    """Output of QUERY_MKEY.

    Attributes
    ----------
    mkc : Mkc
    klms : ndarray of KLM records
        The entries of an indirect key; empty for a direct one.
    """

    mkc: Mkc
    klms: NDArray[Any]


@waiting_step
def mlx5_cmd_exec(hca: Hca, thread: Thread, cost: float) -> Wait:
    """Execute one firmware command (core/cmd.c); returns 0, or -EIO when the device is in internal error."""
    yield from hca.cmd_slots.down(thread)
    if hca.internal_error:
        yield from hca.cmd_slots.up(thread)
        thread.note(status="-EIO")
        return Errno(errno.EIO, "mlx5_cmd_exec", "the device is in internal error")
    thread.charge(cost)
    yield from hca.cmd_slots.up(thread)
    return 0


@step
def mlx5_cmd_exec_cb(hca: Hca, thread: Thread, cost: float, callback: Callable[[Thread, int], Any]) -> int:
    """Start a firmware command whose completion calls back with 0 or an errno (core/cmd.c)."""
    hca.engine.start(_asynchronous(hca, thread.now, cost, callback))
    return 0


def _asynchronous(hca: Hca, now: float, cost: float, callback: Callable[[Thread, int], Any]) -> Wait:
    thread = hca.engine.thread(f"{hca.name} cmd")
    thread.now = max(now, thread.now)
    yield from hca.cmd_slots.down(thread)
    thread.charge(0.0 if hca.internal_error else cost)
    yield from hca.cmd_slots.up(thread)
    failed = Errno(errno.EIO, "mlx5_cmd_exec_cb", "the device is in internal error")
    result = callback(thread, failed if hca.internal_error else 0)
    if result is not None:
        yield from result


@waiting_step
def mlx5_core_create_mkey(
    hca: Hca, thread: Thread, mkc: Mkc, pg_access: bool = False, klm_pas_mtt: NDArray[Any] | None = None
) -> Wait:
    """Create an mkey (core/mr.c).

    Parameters
    ----------
    mkc : Mkc
        Copied.
    pg_access : bool
        Missing translations are page faults.
    klm_pas_mtt : ndarray or None
        Translations to start with, in the entries' own form.

    Returns
    -------
    int
        The key (index << 8 | variant), or a negative errno.
    """
    ret = yield from mlx5_cmd_exec(hca, thread, hca.costs.cmd_create_mkey)
    if ret:
        return ret
    return hca.mkeys.create(mkc, pg_access, klm_pas_mtt).key


def create_mkey_cb(hca: Hca, thread: Thread, mkc: Mkc, pg_access: bool, callback: Callable[[Thread, int], Any]) -> None:
    """Create an mkey without waiting: `callback` gets the key or a negative errno (MLX5_CMD_OP_CREATE_MKEY, async)."""
    wanted = mkc.copy()

    def done(worker: Thread, ret: int) -> Any:
        return callback(worker, ret if ret else hca.mkeys.create(wanted, pg_access).key)

    mlx5_cmd_exec_cb(hca, thread, hca.costs.cmd_create_mkey, done)


@waiting_step
def mlx5_core_destroy_mkey(hca: Hca, thread: Thread, key: int) -> Wait:
    """Destroy an mkey (core/mr.c); returns 0 or a negative errno."""
    ret = yield from mlx5_cmd_exec(hca, thread, hca.costs.cmd_destroy_mkey)
    if ret:
        return ret
    if not hca.mkeys.destroy(key):
        return Errno(errno.EINVAL, "mlx5_core_destroy_mkey", f"key {key:#x} does not exist")
    return 0


@waiting_step
def mlx5_core_query_mkey(hca: Hca, thread: Thread, key: int) -> Wait:
    """Read an mkey's context and, if it is indirect, its entries (core/mr.c); returns `QueryMkeyOut` or an errno."""
    ret = yield from mlx5_cmd_exec(hca, thread, hca.costs.cmd_query_mkey)
    if ret:
        return ret
    mkey = hca.mkeys.get(key)
    if mkey is None:
        return Errno(errno.EINVAL, "mlx5_core_query_mkey", f"key {key:#x} does not exist")
    klms = mkey.entries.copy() if mkey.entries.dtype == KLM else np.zeros(0, dtype=KLM)
    return QueryMkeyOut(mkey.mkc.copy(), klms)
