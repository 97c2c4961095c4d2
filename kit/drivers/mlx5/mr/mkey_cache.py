"""mr.c: the cache of mkeys: entries by what UMR cannot change, with low and high water marks."""

from __future__ import annotations

from bisect import bisect_left, insort
from errno import EEXIST, ENOMEM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.caps import OdpGeneral
from kit.drivers.mlx5.core.waiting import DelayedWork, Workqueue
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.device import MLX5_MAX_UMR_SHIFT, mlx5r_umr_can_load_pas
from kit.drivers.mlx5.enums import PAGE_SHIFT, Access, AccessMode, Era
from kit.drivers.mlx5.objects import IbPd, RbKey
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = [
    "LIMITS", "MKEY_CACHE_LAST_STD_ENTRY", "NUM_MKEYS_PER_PAGE", "CacheEnt", "MkeyCache",
    "cache_mkc", "get_mkc_octo_size", "get_unchangeable_access_flags", "mkey_cache_ent_from_rb_key",
    "mlx5_mkey_cache_init", "mlx5r_cache_create_ent_locked", "pop_mkey_locked",
    "push_mkey_locked", "set_cache_mkc", "set_mkc_access_pd_addr_fields", "warm_cache",
]  # fmt: skip

MKEY_CACHE_LAST_STD_ENTRY = 20  # mlx5_ib.h
NUM_MKEYS_PER_PAGE = (4096 - 16) // 4  # mlx5_ib.h: a page less its list_head, in keys
# profile->mr_cache[].limit of the default profile, by log2(ndescs) - 2 (drivers/net/.../mlx5/core/main.c)
LIMITS = (250,) * 12 + (32, 16, 8, 4) + (0,) * 5
TMP_LIFETIME = 30e6  # microseconds


class CacheEnt:
    """One entry: mkeys that are alike, last in first out (struct mlx5_cache_ent).

    Attributes
    ----------
    mkeys : list of int
        Free keys; their number is the queue's ``ci``.
    num_pages : int
        Pages that hold them, 1020 keys each.
    limit : int
        Low water mark; the high one is twice that.
    in_use, miss, pending : int
        Keys given out, allocations that found none, creations on their way.
    """

    def __init__(self, dev: Mlx5IbDev, rb_key: RbKey, is_tmp: bool) -> None:
        from kit.drivers.mlx5.mr.mkey_cache_work import delayed_cache_work_func

        self.dev, self.rb_key, self.is_tmp = dev, rb_key, is_tmp
        self.mkeys: list[int] = []
        self.num_pages = 1
        self.pending = self.in_use = self.limit = self.miss = 0
        self.fill_to_high_water = self.disabled = self.tmp_cleanup_scheduled = False
        self.dwork = DelayedWork(dev.cache.wq, lambda thread: delayed_cache_work_func(self, thread))

    @property
    def ci(self) -> int:
        """Free keys (mkeys_queue.ci)."""
        return len(self.mkeys)

    @property
    def size(self) -> int:
        """Keys, free or given out: debugfs ``size``."""
        return self.ci + self.in_use


class MkeyCache:
    """All entries of a device (struct mlx5_mkey_cache).

    Attributes
    ----------
    ents : list of (RbKey, CacheEnt), ascending
        The red-black tree, in its order.
    last_add : float
        When a key was last created for the cache, microseconds.
    fill_delay : bool
        A creation failed less than a second ago: nothing is added.
    """

    def __init__(self, dev: Mlx5IbDev) -> None:
        from kit.drivers.mlx5.mr.mkey_cache_work import remove_ent_work_func

        self.dev = dev
        self.wq = Workqueue(dev.engine, "mkey_cache", 1, dev.costs.wq_dispatch)
        self.rb_lock = Lock()
        self.keys: list[RbKey] = []
        self.ents: dict[RbKey, CacheEnt] = {}
        self.last_add = -300e6
        self.fill_delay = False
        self.remove_ent_dwork = DelayedWork(self.wq, lambda thread: remove_ent_work_func(self, thread))


def cache_mkc(dev: Mlx5IbDev, rb_key: RbKey) -> Mkc:
    """Return the context of a cached key, outside of any step."""
    octowords = rb_key.ndescs if rb_key.access_mode == AccessMode.KSM else (rb_key.ndescs + 1) // 2
    mkc = Mkc(
        free=True, umr_en=True, access_mode=rb_key.access_mode, pd=dev.umrc.pd.pdn, log_page_size=PAGE_SHIFT,
        translations_octword_size=octowords,
    )  # fmt: skip
    mkc.set_access(rb_key.access_flags)
    return mkc


def warm_cache(dev: Mlx5IbDev) -> None:
    """Fill the entries at once to where the background work leaves them: a machine that has been up for a while.

    Up to 6.11 that is one key below the high water mark (`create_mkey_callback`).
    """
    for rb_key, ent in dev.cache.ents.items():
        mkc, full = cache_mkc(dev, rb_key), 2 * ent.limit - (dev.era < Era.NEW)
        ent.mkeys += dev.hca.mkeys.create_many(mkc, dev.caps.pg, max(full - ent.ci, 0))
        ent.num_pages = max(1, -(-ent.ci // NUM_MKEYS_PER_PAGE))
        ent.fill_to_high_water = bool(ent.limit) and dev.era < Era.NEW


@step
def set_cache_mkc(ent: CacheEnt, thread: Thread, mkc: Mkc) -> None:
    """Context of a cached key: free, changeable by UMR, in the kernel's domain (mr.c)."""
    rb_key = ent.rb_key
    set_mkc_access_pd_addr_fields(mkc, thread, rb_key.access_flags, 0, ent.dev.umrc.pd)
    mkc.free = mkc.umr_en = True
    mkc.access_mode = rb_key.access_mode
    mkc.translations_octword_size = get_mkc_octo_size(ent, thread, rb_key.access_mode, rb_key.ndescs)
    mkc.log_page_size = PAGE_SHIFT


@step
def set_mkc_access_pd_addr_fields(mkc: Mkc, thread: Thread, acc: int, start_addr: int, pd: IbPd) -> None:
    """Rights, domain and first address of a key (mr.c)."""
    mkc.set_access(acc)
    mkc.pd, mkc.start_addr = pd.pdn, start_addr


@step
def get_mkc_octo_size(ent: CacheEnt, thread: Thread, access_mode: int, ndescs: int) -> int:
    """16-byte units of a translation table (mr.c)."""
    return ndescs if access_mode == AccessMode.KSM else (ndescs + 1) // 2


@step
def push_mkey_locked(ent: CacheEnt, thread: Thread, mkey: int) -> int:
    """Put a key on top; a new page every 1020 keys may be missing (mr.c)."""
    thread.charge(ent.dev.costs.cache_op)
    if ent.ci >= ent.num_pages * NUM_MKEYS_PER_PAGE:
        if ent.dev.inject.hit("cache_page"):
            return Errno(ENOMEM, "push_mkey_locked", "struct mlx5_mkeys_page")
        ent.num_pages += 1
    ent.mkeys.append(mkey)
    return 0


@step
def pop_mkey_locked(ent: CacheEnt, thread: Thread) -> int:
    """Take the key that was put there last (mr.c)."""
    thread.charge(ent.dev.costs.cache_op)
    mkey = ent.mkeys.pop()
    if ent.num_pages > 1 and not ent.ci % NUM_MKEYS_PER_PAGE:
        ent.num_pages -= 1
    return mkey


@step
def get_unchangeable_access_flags(dev: Mlx5IbDev, thread: Thread, access_flags: int) -> int:
    """Rights that this device's UMR cannot change, so that they are part of the key (mr.c)."""
    caps, ret = dev.caps, 0
    if access_flags & Access.REMOTE_ATOMIC and caps.atomic and caps.umr_modify_atomic_disabled:
        ret |= Access.REMOTE_ATOMIC
    if access_flags & Access.RELAXED_ORDERING:
        write = caps.relaxed_ordering_write and not caps.relaxed_ordering_write_umr
        if write or (caps.relaxed_ordering_read and not caps.relaxed_ordering_read_umr):
            ret |= Access.RELAXED_ORDERING
    return int(ret)


@step
def mkey_cache_ent_from_rb_key(dev: Mlx5IbDev, thread: Thread, rb_key: RbKey) -> CacheEnt | None:
    """Return the smallest entry that is large enough and else equal, or None (mr.c)."""
    cache = dev.cache
    at = bisect_left(cache.keys, rb_key)
    if at == len(cache.keys) or cache.keys[at][:3] != rb_key[:3]:
        return None
    found = cache.keys[at]
    if dev.era == Era.NEW and found.ndescs > max(2 * rb_key.ndescs, 4):
        return None  # since 6.12: rather a temporary entry of its own
    return cache.ents[found]


@step
def mlx5r_cache_create_ent_locked(
    dev: Mlx5IbDev, thread: Thread, rb_key: RbKey, persistent_entry: bool
) -> CacheEnt | Errno:  # fmt: skip
    """Add an entry; one that is not persistent loses its keys again after 30 s (mr.c)."""
    cache = dev.cache
    if rb_key in cache.ents:
        return Errno(EEXIST, "mlx5r_cache_create_ent_locked", f"{rb_key}")
    ent = CacheEnt(dev, rb_key, not persistent_entry)
    mlx5_cache_ent_insert(cache, thread, ent)
    if persistent_entry:
        if rb_key.access_mode != AccessMode.KSM and mlx5r_umr_can_load_pas(dev, thread, 0):
            ent.limit = LIMITS[(rb_key.ndescs - 1).bit_length() - 2]
    elif dev.era < Era.NEW:
        cache.remove_ent_dwork.mod(thread, TMP_LIFETIME)
    return ent


@step
def mlx5_cache_ent_insert(cache: MkeyCache, thread: Thread, ent: CacheEnt) -> None:
    """Put an entry into the tree (mr.c)."""
    insort(cache.keys, ent.rb_key)
    cache.ents[ent.rb_key] = ent


@waiting_step
def mlx5_mkey_cache_init(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Make the persistent entries and start filling them (mr.c)."""
    from kit.drivers.mlx5.mr.mkey_cache_work import queue_adjust_cache_locked
    from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_resource_init

    if not dev.options.lazy_umr:
        yield from mlx5r_umr_resource_init(dev, thread)
    last = MKEY_CACHE_LAST_STD_ENTRY if dev.caps.umr_extended_translation_offset else MLX5_MAX_UMR_SHIFT
    yield from dev.cache.rb_lock.acquire(thread)
    for order in range(last + 1):
        mlx5r_cache_create_ent_locked(dev, thread, RbKey(0, AccessMode.MTT, 0, 1 << (order + 2)), True)
    mlx5_odp_init_mkey_cache(dev, thread)
    yield from dev.cache.rb_lock.release(thread)
    for key in dev.cache.keys:
        queue_adjust_cache_locked(dev.cache.ents[key], thread)
    return 0


@step
def mlx5_odp_init_mkey_cache(dev: Mlx5IbDev, thread: Thread) -> int:
    """The entry for parents of implicit regions; it is never filled ahead (odp.c)."""
    if dev.odp_caps.general_caps & OdpGeneral.IMPLICIT:
        mlx5r_cache_create_ent_locked(dev, thread, RbKey(0, AccessMode.KSM, 0, dev.imr.ksm_entries), True)
    return 0
