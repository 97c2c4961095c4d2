"""mr.c: taking an mkey from the cache for a region, and putting it back."""

from __future__ import annotations

from errno import ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING

from kit.drivers.mlx5.enums import Era
from kit.drivers.mlx5.mr.mkey_cache import (
    get_unchangeable_access_flags,
    mkey_cache_ent_from_rb_key,
    mlx5r_cache_create_ent_locked,
    pop_mkey_locked,
    push_mkey_locked,
)
from kit.drivers.mlx5.mr.mkey_cache_work import create_cache_mkey, queue_adjust_cache_locked
from kit.drivers.mlx5.objects import MKEY_MR, IbPd, Mlx5IbMr, RbKey
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.mr.mkey_cache import CacheEnt

__all__ = ["_mlx5_mr_cache_alloc", "cache_ent_find_and_store", "mlx5_mr_cache_alloc"]


@waiting_step
def mlx5_mr_cache_alloc(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, access_flags: int, access_mode: int, ndescs: int
) -> Wait:  # fmt: skip
    """Return a region with a key for `ndescs` translations; -EOPNOTSUPP when no entry can hold it (mr.c)."""
    rb_key = RbKey(0, access_mode, get_unchangeable_access_flags(dev, thread, access_flags), ndescs)
    ent = mkey_cache_ent_from_rb_key(dev, thread, rb_key)
    if ent is None:
        return Errno(EOPNOTSUPP, "mlx5_mr_cache_alloc", f"no cache entry for {rb_key}")
    return (yield from _mlx5_mr_cache_alloc(dev, thread, ent, pd))


@waiting_step
def _mlx5_mr_cache_alloc(dev: Mlx5IbDev, thread: Thread, ent: CacheEnt, pd: IbPd) -> Wait:
    """Pop a key, or create one while the caller waits (mr.c)."""
    if dev.inject.hit("mr"):
        return Errno(ENOMEM, "_mlx5_mr_cache_alloc", "struct mlx5_ib_mr")
    mr = Mlx5IbMr(dev, pd)
    ent.in_use += 1
    if not ent.ci:
        queue_adjust_cache_locked(ent, thread)
        ent.miss += 1
        key = yield from create_cache_mkey(ent, thread)
        if key < 0:
            ent.in_use -= 1
            return key
        mr.mmkey.key = key
    else:
        mr.mmkey.key = pop_mkey_locked(ent, thread)
        queue_adjust_cache_locked(ent, thread)
    mkey = mr.mmkey
    mkey.cache_ent, mkey.type, mkey.rb_key, mkey.cacheable = ent, MKEY_MR, ent.rb_key, True
    return mr


@waiting_step
def cache_ent_find_and_store(dev: Mlx5IbDev, thread: Thread, mr: Mlx5IbMr) -> Wait:
    """Put a key that is free again back: where it came from, or to its like, or to a temporary entry (mr.c)."""
    cache, mkey = dev.cache, mr.mmkey
    if mkey.cache_ent is not None:
        if dev.era < Era.NEW:
            mkey.cache_ent.in_use -= 1
        return push_mkey_locked(mkey.cache_ent, thread, mkey.key)
    if mkey.rb_key is None:
        return Errno(EOPNOTSUPP, "cache_ent_find_and_store", "the key cannot be used again")
    yield from cache.rb_lock.acquire(thread)
    ent = mkey_cache_ent_from_rb_key(dev, thread, mkey.rb_key)
    ret: int = 0
    if ent is not None and ent.rb_key.ndescs == mkey.rb_key.ndescs:
        if ent.disabled:
            ret = Errno(EOPNOTSUPP, "cache_ent_find_and_store", "the cache is being taken down")
        else:
            mkey.cache_ent = ent
    else:
        made = mlx5r_cache_create_ent_locked(dev, thread, mkey.rb_key, False)
        if isinstance(made, Errno):
            ret = made
        else:
            mkey.cache_ent = made
    yield from cache.rb_lock.release(thread)
    if ret or mkey.cache_ent is None:
        return ret
    return push_mkey_locked(mkey.cache_ent, thread, mkey.key)
