"""mr.c: how the mkey cache is filled and shrunk in the background."""

from __future__ import annotations

from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.core.cmd import create_mkey_cb, mlx5_core_create_mkey, mlx5_core_destroy_mkey
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.enums import Era
from kit.drivers.mlx5.mr.mkey_cache import pop_mkey_locked, push_mkey_locked, set_cache_mkc
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.mr.mkey_cache import CacheEnt, MkeyCache

__all__ = [
    "MAX_PENDING_REG_MR", "assign_mkey_variant", "clean_keys", "create_cache_mkey", "delayed_cache_work_func",
    "queue_adjust_cache_locked", "remove_ent_work_func",
]  # fmt: skip

MAX_PENDING_REG_MR = 8
SECOND = 1e6
GC_DELAY = 300 * SECOND


@step
def queue_adjust_cache_locked(ent: CacheEnt, thread: Thread) -> None:
    """Below the low water mark fill up to the high one; above the high one give keys back (mr.c)."""
    if ent.disabled or ent.dev.cache.fill_delay or ent.is_tmp:
        return
    if ent.ci < ent.limit:
        ent.fill_to_high_water = True
        ent.dwork.mod(thread, 0)
    elif ent.fill_to_high_water and ent.ci + ent.pending < 2 * ent.limit:
        ent.dwork.mod(thread, 0)
    elif ent.ci == 2 * ent.limit:
        ent.fill_to_high_water = False
    elif ent.ci > 2 * ent.limit:
        ent.fill_to_high_water = False
        if ent.pending:
            ent.dwork.queue(thread, SECOND)
        else:
            ent.dwork.mod(thread, 0)


@waiting_step
def create_cache_mkey(ent: CacheEnt, thread: Thread) -> Wait:
    """Create one key while the caller waits; return it or an errno (mr.c)."""
    dev = ent.dev
    if dev.inject.hit("create_mkey_in"):
        return Errno(ENOMEM, "create_cache_mkey", "the command's input")
    mkc = Mkc()
    set_cache_mkc(ent, thread, mkc)
    # UMR fills the table later, with entries that may be missing: they fault if the device can page at all.
    key = yield from mlx5_core_create_mkey(dev.hca, thread, mkc, dev.caps.pg)
    if key >= 0:
        dev.cache.last_add = thread.now
    return key


@waiting_step
def delayed_cache_work_func(ent: CacheEnt, thread: Thread) -> Wait:
    """One round of filling or shrinking an entry; since 6.12 it also empties a temporary one (mr.c)."""
    if ent.dev.era == Era.NEW and ent.is_tmp:
        ent.tmp_cleanup_scheduled = False
        yield from clean_keys(ent, thread)
        return
    yield from __cache_work_func(ent, thread)


@waiting_step
def __cache_work_func(ent: CacheEnt, thread: Thread) -> Wait:
    """Add one key, or give one back when nobody has added any for 300 s (mr.c)."""
    cache = ent.dev.cache
    if ent.disabled:
        return
    if ent.fill_to_high_water and ent.ci + ent.pending < 2 * ent.limit and not cache.fill_delay:
        ret = add_keys(ent, thread, 1)
        if ret and ret != -EAGAIN and not ent.disabled:
            ent.dwork.queue(thread, SECOND)
    elif ent.ci > 2 * ent.limit:
        if someone_adding(cache, thread) or thread.now <= cache.last_add + GC_DELAY:
            ent.dwork.queue(thread, GC_DELAY)
            return
        yield from remove_cache_mr_locked(ent, thread)
        queue_adjust_cache_locked(ent, thread)


@step
def someone_adding(cache: MkeyCache, thread: Thread) -> bool:
    """Whether any entry is below its low water mark (mr.c)."""
    return any(ent.ci < ent.limit for ent in cache.ents.values())


@step
def add_keys(ent: CacheEnt, thread: Thread, num: int) -> int:
    """Start `num` creations that nobody waits for; at most 8 are on their way (mr.c)."""
    for _ in range(num):
        mkc = Mkc()
        set_cache_mkc(ent, thread, mkc)
        if ent.pending >= MAX_PENDING_REG_MR:
            return Errno(EAGAIN, "add_keys", f"{ent.pending} creations are pending")
        ent.pending += 1
        mlx5_ib_create_mkey_cb(ent, thread, mkc)
    return 0


@step
def mlx5_ib_create_mkey_cb(ent: CacheEnt, thread: Thread, mkc: Mkc) -> None:
    """Send CREATE_MKEY; its completion handler goes on (mr.c)."""
    dev = ent.dev
    mkc.mkey_7_0 = assign_mkey_variant(dev, thread)
    failed = Errno(ENOMEM, "create_mkey_callback", "injected") if dev.inject.hit("cache_async") else None

    def done(worker: Thread, key: int) -> None:
        create_mkey_callback(ent, worker, key if failed is None else failed)

    create_mkey_cb(dev.hca, thread, mkc, dev.caps.pg, done)


@step
def assign_mkey_variant(dev: Mlx5IbDev, thread: Thread) -> int:
    """Return the next variant, so that successive keys of one index differ (mr.c)."""
    dev.mkey_var = dev.mkey_var + 1 & 0xFF
    return dev.mkey_var


@step
def create_mkey_callback(ent: CacheEnt, thread: Thread, key: int) -> None:
    """A creation has ended: store the key and go on filling, or stop filling for a second (mr.c)."""
    dev, cache = ent.dev, ent.dev.cache
    if key < 0:
        ent.pending -= 1
        cache.fill_delay = True
        dev.engine.start(_delay_timer(cache))
        return
    cache.last_add = thread.now
    push_mkey_locked(ent, thread, key)
    if dev.era == Era.NEW:
        ent.pending -= 1
        queue_adjust_cache_locked(ent, thread)
    else:  # still counts itself as pending, so filling stops one key below the high water mark
        queue_adjust_cache_locked(ent, thread)
        ent.pending -= 1


def _delay_timer(cache: MkeyCache) -> Wait:
    """After a second keys may be added again (delay_time_func)."""
    yield cache.dev.engine.env.timeout(SECOND)
    cache.fill_delay = False


@waiting_step
def remove_cache_mr_locked(ent: CacheEnt, thread: Thread) -> Wait:
    """Destroy one free key (mr.c)."""
    if ent.ci:
        yield from mlx5_core_destroy_mkey(ent.dev.hca, thread, pop_mkey_locked(ent, thread))


@waiting_step
def clean_keys(ent: CacheEnt, thread: Thread) -> Wait:
    """Destroy every free key of an entry (mr.c)."""
    ent.dwork.cancel()
    while ent.ci:
        yield from mlx5_core_destroy_mkey(ent.dev.hca, thread, pop_mkey_locked(ent, thread))


@waiting_step
def remove_ent_work_func(cache: MkeyCache, thread: Thread) -> Wait:
    """Empty all temporary entries, 30 s after the last one was made (mr.c @ 6.9)."""
    for key in reversed(cache.keys):
        if cache.ents[key].is_tmp:
            yield from clean_keys(cache.ents[key], thread)
