"""The cache of mkeys: entries, water marks, garbage collection, temporary entries."""

from __future__ import annotations

import pytest
from drivers.mlx5.odp_rig import ODP, Rig, failed

from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.enums import PAGE, Access, AccessMode, Era
from kit.drivers.mlx5.mr.mkey_cache import (
    NUM_MKEYS_PER_PAGE,
    mkey_cache_ent_from_rb_key,
    pop_mkey_locked,
    push_mkey_locked,
)
from kit.drivers.mlx5.mr.restrack import mr_cache_debugfs
from kit.drivers.mlx5.objects import RbKey


def mtt(ndescs: int, flags: int = 0) -> RbKey:
    return RbKey(0, AccessMode.MTT, flags, ndescs)


def test_persistent_entries_and_limits():
    rig = Rig(cache=True)
    rows = mr_cache_debugfs(rig.dev)
    assert [r["ndescs"] for r in rows if r["access_mode"] == AccessMode.MTT] == [4 << i for i in range(21)]
    assert [r["limit"] for r in rows] == [250] * 12 + [32, 16, 8, 4] + [0] * 5 + [0]
    assert rows[-1]["ndescs"] == 131_072 and rows[-1]["access_mode"] == AccessMode.KSM
    assert {r["ndescs"]: r["limit"] for r in rows if r["access_mode"] == AccessMode.MTT}[8192] == 250
    assert sum(r["miss"] for r in rows) == 0


def test_entries_without_extended_offset():
    rig = Rig(caps=HcaCaps(umr_extended_translation_offset=False))
    assert [r["ndescs"] for r in mr_cache_debugfs(rig.dev)] == [4 << i for i in range(17)]


@pytest.mark.parametrize(("era", "short"), [(Era.OLD, 1), (Era.MID, 1), (Era.NEW, 0)])
def test_filling_ends_at_the_high_water_mark(era, short):
    """Up to 6.11 the key that has just been made still counts as pending, so the last one is not asked for."""
    rig = Rig(era)
    for row in mr_cache_debugfs(rig.dev):
        assert row["cur"] == max(2 * row["limit"] - short, 0)
    assert all(ent.pending == 0 for ent in rig.dev.cache.ents.values())


def test_last_in_first_out_and_pages():
    assert NUM_MKEYS_PER_PAGE == 1020
    rig = Rig(cache=False)
    from kit.drivers.mlx5.mr.mkey_cache import mlx5r_cache_create_ent_locked

    ent = mlx5r_cache_create_ent_locked(rig.dev, rig.thread, mtt(4), True)
    for key in range(2041):
        assert push_mkey_locked(ent, rig.thread, key) == 0
    assert ent.num_pages == 3
    assert pop_mkey_locked(ent, rig.thread) == 2040 and ent.num_pages == 2
    rig.dev.inject.fail("cache_page")
    assert push_mkey_locked(ent, rig.thread, 1).name == "ENOMEM"
    assert ent.ci == 2040


def test_lookup_takes_the_smallest_that_is_large_enough():
    rig = Rig()

    def find(key):
        return mkey_cache_ent_from_rb_key(rig.dev, rig.thread, key)

    assert find(mtt(1)).rb_key.ndescs == 4
    assert find(mtt(5)).rb_key.ndescs == 8
    assert find(mtt(512)).rb_key.ndescs == 512
    assert find(mtt((4 << 20) + 1)) is None
    assert find(mtt(4, Access.RELAXED_ORDERING)) is None
    assert find(RbKey(1, AccessMode.MTT, 0, 4)) is None
    assert find(RbKey(0, AccessMode.KSM, 0, 131_072)).rb_key.access_mode == AccessMode.KSM


def test_since_6_12_an_entry_may_not_be_much_larger():
    rig = Rig(Era.NEW)
    from kit.drivers.mlx5.mr.mkey_cache import mlx5r_cache_create_ent_locked

    flags = int(Access.RELAXED_ORDERING)
    mlx5r_cache_create_ent_locked(rig.dev, rig.thread, mtt(100, flags), False)

    def find(n):
        return mkey_cache_ent_from_rb_key(rig.dev, rig.thread, mtt(n, flags))

    assert find(50) is not None and find(49) is None
    mlx5r_cache_create_ent_locked(rig.dev, rig.thread, mtt(4, flags), False)
    assert find(1) is not None  # up to 4 always


def test_hit_and_miss():
    rig = Rig()
    va = rig.mmap(1 << 18)
    small = rig.reg(va, PAGE)
    ent = small.mmkey.cache_ent
    rig.settle()
    assert (ent.rb_key.ndescs, ent.miss, ent.in_use, ent.ci) == (4, 0, 1, 499)  # one was made in the background
    large = rig.reg(va, 1 << 30)  # 262,144 translations: never kept ready
    ent = large.mmkey.cache_ent
    assert (ent.rb_key.ndescs, ent.miss, ent.in_use, ent.ci) == (262_144, 1, 1, 0)
    assert rig.dereg(large) == 0
    assert (ent.in_use, ent.ci) == (0, 1)
    again = rig.reg(va, 1 << 30)
    assert again.mmkey.key == large.mmkey.key and ent.miss == 1


def test_low_water_mark_refills_to_the_high_one():
    rig = Rig()
    ent = rig.dev.cache.ents[mtt(131_072)]  # 512 MiB: limit 4
    assert ent.ci == 7
    ent.fill_to_high_water = False
    va = rig.mmap(1 << 17)
    mrs = []
    for _ in range(3):
        mrs.append(rig.reg(va, 1 << 29))
        rig.settle()
    assert ent.ci == 4 and not ent.fill_to_high_water
    mrs.append(rig.reg(va, 1 << 29))
    rig.settle()
    assert ent.ci == 7 and ent.miss == 0 and ent.fill_to_high_water


def test_surplus_is_collected_after_300_idle_seconds():
    rig = Rig()
    ent = rig.dev.cache.ents[mtt(131_072)]
    va = rig.mmap(1 << 17)
    mrs = [rig.reg(va, 1 << 29) for _ in range(6)]
    rig.settle()
    for mr in mrs:
        rig.dereg(mr)
    rig.settle()
    assert ent.ci == 13  # returning a key does not look at the marks
    one = rig.reg(va, 1 << 29)  # an allocation does
    assert ent.ci == 12
    rig.settle(299e6)
    assert ent.ci == 12
    rig.settle(400e6)
    assert ent.ci == 8 == 2 * ent.limit
    assert rig.dereg(one) == 0


def test_the_collector_waits_while_another_entry_is_being_filled():
    rig = Rig()
    ent, other = rig.dev.cache.ents[mtt(131_072)], rig.dev.cache.ents[mtt(4)]
    ent.mkeys += [ent.mkeys[0]] * 4
    other.mkeys, other.fill_to_high_water = [], False
    ent.dwork.mod(rig.thread, 0)
    rig.settle(700e6)
    assert ent.ci == 11
    other.mkeys = [1] * 499
    rig.settle(700e6)
    assert ent.ci == 8


def test_a_failed_creation_stops_filling_for_a_second():
    rig = Rig(cache=False)
    from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init

    rig.dev.inject.fail("cache_async")
    rig.run(mlx5_mkey_cache_init(rig.dev, rig.thread))
    rig.settle(0.5e6)
    assert rig.dev.cache.fill_delay
    held = {k: e.ci for k, e in rig.dev.cache.ents.items()}
    rig.settle(0.6e6)
    assert not rig.dev.cache.fill_delay
    assert all(e.pending == 0 for e in rig.dev.cache.ents.values())
    assert {k: e.ci for k, e in rig.dev.cache.ents.items()} == held  # nothing starts it again but the next allocation
    va = rig.mmap(1)
    rig.reg(va, PAGE)
    rig.settle()
    assert rig.dev.cache.ents[mtt(4)].ci == 499


@pytest.mark.parametrize("era", [Era.MID, Era.NEW])
def test_unchangeable_flags_make_a_temporary_entry(era):
    caps = HcaCaps(relaxed_ordering_write_umr=False, relaxed_ordering_read_umr=False)
    rig = Rig(era, caps=caps)
    va = rig.mmap(3)
    access = ODP | Access.RELAXED_ORDERING
    mr = rig.reg(va, 3 * PAGE, access)
    assert mr.mmkey.cache_ent is None and mr.mmkey.cacheable  # made by reg_create, under slow_path_mutex
    assert rig.dereg(mr) == 0
    key = mtt(3, int(Access.RELAXED_ORDERING))
    ent = rig.dev.cache.ents[key]
    assert ent.is_tmp and ent.ci == 1
    again = rig.reg(va, 3 * PAGE, access)
    assert again.mmkey.key == mr.mmkey.key
    rig.dereg(again)
    keys = len(rig.hca.mkeys.mkeys)
    rig.settle(29e6 - 3e6)
    assert ent.ci == 1
    rig.settle(10e6)
    assert ent.ci == 0 and len(rig.hca.mkeys.mkeys) == keys - 1


def test_an_implicit_region_needs_an_entry():
    caps = HcaCaps(relaxed_ordering_write_umr=False)
    rig = Rig(caps=caps)
    ret = rig.implicit(ODP | Access.RELAXED_ORDERING)
    assert failed(ret) == ("EOPNOTSUPP", "mlx5_mr_cache_alloc")


def test_a_key_that_cannot_be_kept_is_destroyed():
    rig = Rig()
    va = rig.mmap(1)
    mr = rig.reg(va, PAGE)
    rig.dev.inject.fail("umr")  # the revoke fails
    keys = len(rig.hca.mkeys.mkeys)
    assert rig.dereg(mr) == 0
    assert len(rig.hca.mkeys.mkeys) == keys - 1
