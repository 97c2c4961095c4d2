"""Keys: translation against an oracle that walks byte by byte, indirect keys, UMR checks, DMA addresses."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.rig import ALL, PD, Pair
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import MkeyTable, Verdict
from kit.drivers.mlx5.core.dma import DmaDevice
from kit.drivers.mlx5.descriptors import Mkc, UmrWqe
from kit.drivers.mlx5.enums import (  # fmt: skip
    KLM,
    MTT_PRESENT,
    MTT_READ,
    MTT_WRITE,
    PAGE,
    Access,
    AccessMode,
    MkeyMask,
    QpState,
    UmrFlags,
    WcStatus,
)
from kit.memory.physical.pages import PhysicalMemory
from kit.sim.engine import Engine

GIB = 1 << 30


def direct(table, words, start, length, shift=12, pg=True, access=ALL, pd=PD):
    mkc = Mkc(pd=pd, start_addr=start, len=length, log_page_size=shift, translations_octword_size=(len(words) + 1) // 2)
    mkc.set_access(access)
    mkey = table.create(mkc, pg)
    mkey.xlt[: len(words)] = words
    return mkey


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_direct_translation_agrees_with_a_walk_byte_by_byte(data):
    table = MkeyTable(4)
    shift = data.draw(st.sampled_from([12, 13, 16]))
    size = 1 << shift
    entries = data.draw(st.lists(st.sampled_from([0, MTT_READ, MTT_PRESENT]), min_size=1, max_size=12))
    rng = np.random.default_rng(0)
    frames = rng.permutation(64)[: len(entries)].astype(np.uint64) << np.uint64(shift)
    words = np.where(np.array(entries) > 0, frames | np.array(entries, np.uint64), 0).astype(np.uint64)
    skew = data.draw(st.integers(0, size - 1)) if shift == 12 else data.draw(st.integers(0, size // PAGE - 1)) * PAGE
    start = 0x70000000 + skew
    mkey = direct(table, words, start, len(entries) * size - skew, shift)
    at = data.draw(st.integers(0, len(entries) * size - skew - 1))
    length = data.draw(st.integers(1, len(entries) * size - skew - at))
    need = data.draw(st.sampled_from([Need.LOCAL_READ, Need.REMOTE_WRITE]))
    got = table.translate(mkey.key, start + at, length, need, PD)

    bit = MTT_WRITE if need == Need.REMOTE_WRITE else MTT_READ
    good = 0
    while good < length:
        entry = (skew + at + good) // size
        if not int(words[entry]) & bit:
            break
        good = min(length, (entry + 1) * size - skew - at)
    assert got.good == good and got.verdict == (Verdict.OK if good == length else Verdict.FAULT)
    if good < length:
        assert (got.key, got.va, got.size) == (mkey.key, start + at + good, length - good)
    for position in {0, good // 2, good - 1} if good else ():
        byte = skew + at + position
        want = (int(words[byte // size]) & ~3) + byte % size
        piece = got.offset + position
        assert int(got.addresses[piece // PAGE]) + piece % PAGE == want


def implicit(table, slots, entries):
    """A parent of `slots` slots of 1 GiB; `entries` maps slot to key."""
    mkc = Mkc(
        access_mode=AccessMode.KSM, pd=PD, length64=True, log_page_size=30, translations_octword_size=slots, umr_en=True
    )
    mkc.set_access(ALL)
    parent = table.create(mkc, True)
    for slot, key in entries.items():
        parent.xlt[slot] = (0, key, slot * GIB)
    return parent


def test_indirect_keys_walk_their_children_and_stop_at_the_null_key():
    table = MkeyTable(4)
    null = table.create(Mkc(access_mode=AccessMode.NULL, length64=True), True)
    pages = GIB // PAGE
    words = (np.arange(pages, dtype=np.uint64) + 5 << np.uint64(12)) | np.uint64(MTT_PRESENT)
    child = direct(table, words, 3 * GIB, GIB)
    other = direct(table, words + np.uint64(pages << 12), 4 * GIB, GIB)
    parent = implicit(table, 16, dict.fromkeys(range(16), null.key) | {3: child.key, 4: other.key})
    inside = table.translate(parent.key, 3 * GIB + 4100, 10000, Need.REMOTE_WRITE, PD)
    assert inside.verdict == Verdict.OK and inside.offset == 4 and [int(a) >> 12 for a in inside.addresses] == [6, 7, 8]
    across = table.translate(parent.key, 4 * GIB - 5000, 10000, Need.LOCAL_READ, PD)
    assert across.verdict == Verdict.OK and across.good == 10000
    assert [int(a) >> 12 for a in across.addresses] == [3 + pages, 4 + pages, 5 + pages, 6 + pages]
    beyond = table.translate(parent.key, 5 * GIB - 100, 300, Need.LOCAL_READ, PD)
    assert (beyond.verdict, beyond.good, beyond.key, beyond.size) == (Verdict.FAULT, 100, null.key, 200)
    other.xlt[0] = 0
    hole = table.translate(parent.key, 4 * GIB - 1, 5000, Need.LOCAL_READ, PD)
    assert (hole.verdict, hole.good, hole.key, hole.va, hole.size) == (Verdict.FAULT, 1, other.key, 4 * GIB, 4999)


def test_a_page_shared_by_two_pieces_is_listed_once():
    table = MkeyTable(4)
    words = (np.arange(4, dtype=np.uint64) + 9 << np.uint64(12)) | np.uint64(MTT_PRESENT)
    child = direct(table, words, 0x1000, 4 * PAGE)
    mkc = Mkc(access_mode=AccessMode.KLM, pd=PD, len=3000, translations_octword_size=4)
    mkc.set_access(ALL)
    parent = table.create(mkc, False)
    parent.xlt[:2] = [(1000, child.key, 0x1000), (2000, child.key, 0x1000 + 1000)]
    got = table.translate(parent.key, 0, 3000, Need.LOCAL_READ, PD)
    assert got.verdict == Verdict.OK and [int(a) >> 12 for a in got.addresses] == [9]


def test_indirection_is_limited():
    table = MkeyTable(2)
    words = np.full(1, 1 << 12 | MTT_PRESENT, np.uint64)
    key = direct(table, words, 0, PAGE).key
    for depth in range(3):
        assert table.translate(key, 0, 8, Need.LOCAL_READ, PD).verdict == Verdict.OK, depth
        key = implicit(table, 4, {0: key}).key
    assert "indirection" in table.translate(key, 0, 8, Need.LOCAL_READ, PD).why


def test_what_a_key_refuses():
    table = MkeyTable(4)
    mkey = direct(table, np.full(2, 4096 | MTT_PRESENT, np.uint64), 0x1000, 5000, access=Access.LOCAL_WRITE)

    def why(key=mkey.key, va=0x1000, length=10, need=Need.LOCAL_READ, pd=PD):
        found = table.translate(key, va, length, need, pd)
        assert (found.verdict == Verdict.ERROR) == bool(found.why)
        return found.why

    assert not why() and not why(need=Need.LOCAL_WRITE) and not why(va=0x1000 + 4999, length=1)
    assert "range" in why(va=0xFFF) and "range" in why(va=0x1000 + 4999, length=2)
    assert "variant" in why(key=mkey.key + 1) and "no such" in why(key=mkey.key + 256)
    assert "domain" in why(pd=PD + 1)
    for need in (Need.REMOTE_READ, Need.REMOTE_WRITE, Need.REMOTE_ATOMIC):
        assert "right" in why(need=need)
    mkey.mkc.free = True
    assert "free" in why()


def umr(pair, wqe):
    return pair.run(pair.left.hca.execute_umr(pair.thread, wqe))


def test_umr_writes_what_its_mask_says_and_checks_the_free_bit():
    pair = Pair()
    hca = pair.left.hca
    mkey = hca.mkeys.create(Mkc(free=True, umr_en=True, translations_octword_size=8), True)
    words = np.arange(8, dtype=np.uint64) << np.uint64(12) | np.uint64(3)
    new = Mkc(pd=9, start_addr=0x5000, len=1234, lr=True, lw=True, mkey_7_0=0x42)
    mask = MkeyMask.FREE | MkeyMask.PD | MkeyMask.LEN | MkeyMask.START_ADDR | MkeyMask.LR | MkeyMask.KEY
    begin = pair.engine.now
    wqe = UmrWqe(mkey.key, UmrFlags.CHECK_NOT_FREE, mask, new, xlt_offset=4, xlt_octowords=4, xlt=words)
    assert umr(pair, wqe) == WcStatus.SUCCESS and pair.engine.now - begin == 3.0
    assert mkey.xlt.tolist() == [0] * 8 + words.tolist()
    assert (mkey.mkc.free, mkey.mkc.pd, mkey.mkc.len, mkey.mkc.lr, mkey.mkc.lw) == (False, 9, 1234, True, False)
    assert mkey.key & 0xFF == 0x42
    assert umr(pair, wqe) == WcStatus.MW_BIND_ERR  # it is not free any more
    assert hca.umr_qp_state == QpState.ERR
    assert umr(pair, UmrWqe(mkey.key)) == WcStatus.WR_FLUSH_ERR
    assert pair.run(hca.modify_umr_qp(pair.thread, QpState.RTS)) == 0
    assert umr(pair, UmrWqe(mkey.key, UmrFlags.INLINE, MkeyMask.FREE, Mkc(free=True))) == WcStatus.SUCCESS
    assert mkey.mkc.free and mkey.mkc.pd == 9


@pytest.mark.parametrize(
    "wqe",
    [
        UmrWqe(0, UmrFlags.CHECK_FREE),
        UmrWqe(0, xlt=np.zeros(4, np.uint64), xlt_octowords=2),
        UmrWqe(0, xlt=np.zeros(8, np.uint64), xlt_octowords=4, xlt_offset=2),
        UmrWqe(0, xlt=np.zeros(8, np.uint64), xlt_octowords=8),
        UmrWqe(0, xlt=np.zeros(16, np.uint64), xlt_octowords=8, xlt_offset=4),
        UmrWqe(0, xlt=np.zeros(4, KLM), xlt_octowords=4),
        UmrWqe(0x99900),
    ],
)
def test_umr_refuses_what_the_hardware_cannot_do(wqe):
    pair = Pair()
    mkey = pair.left.hca.mkeys.create(Mkc(free=True, umr_en=True, translations_octword_size=8), True)
    wqe.mkey = wqe.mkey or mkey.key
    assert umr(pair, wqe) == WcStatus.MW_BIND_ERR
    assert not mkey.xlt.any()


def test_umr_requests_run_in_order_and_take_time_by_size():
    pair = Pair(umr_per_kib=1.0)
    hca = pair.left.hca
    mkey = hca.mkeys.create(Mkc(umr_en=True, translations_octword_size=64 * 64), True)
    ends, begin = [], pair.engine.now

    def post(value, entries):
        thread = pair.engine.thread(f"t{value}")
        status = yield from hca.execute_umr(
            thread, UmrWqe(mkey.key, xlt=np.full(entries, value, np.uint64), xlt_octowords=entries // 2)
        )
        ends.append((value, status, pair.engine.now - begin, int(mkey.xlt[0])))

    for value, entries in ((1, 128), (2, 1024), (3, 8)):
        pair.engine.start(post(value, entries))
    pair.engine.run()
    assert [e[0] for e in ends] == [1, 2, 3] == [e[3] for e in ends]
    assert [e[2] for e in ends] == pytest.approx([4.0, 15.0, 18.0625])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 6)), max_size=40))
def test_dma_addresses_are_live_from_map_to_unmap_and_never_again(actions):
    device = DmaDevice(PhysicalMemory(Engine(), 64))
    live, dead = [], []
    for mapping, first, count in actions:
        if mapping or not live:
            addresses = device.map_pages(np.arange(first, first + count))
            assert (device.physical(addresses) >> np.uint64(12)).tolist() == list(range(first, first + count))
            live.append(addresses)
        else:
            gone = live.pop(first % len(live))
            device.unmap_pages(gone)
            dead.append(gone)
        for addresses in live:
            assert not device.resolve(addresses)[1].any()
        for addresses in dead:
            assert device.resolve(addresses)[1].all()
    assert device.live == sum(map(len, live)) == device.mapped.sum() and not device.errors
    for addresses in dead:
        device.unmap_pages(addresses)
    assert device.errors == sum(map(len, dead)) and device.live == sum(map(len, live))


def test_dma_of_large_pages_and_injected_failure():
    device = DmaDevice(PhysicalMemory(Engine(), 2048))
    heads = device.map_pages(np.array([512, 1024]), order=9)
    assert device.live == 1024
    assert not device.resolve(heads + np.uint64(511 << 12))[1].any()
    device.fail_after = 3
    assert device.map_pages(np.arange(2)) is not None and device.map_pages(np.arange(2)) is None
    assert device.map_pages(np.arange(2)) is not None and device.live == 1028
    device.unmap_pages(heads, order=9)
    assert device.live == 4 and device.resolve(heads)[1].all()


def test_keys_made_many_at_a_time_are_like_others():
    table = MkeyTable(4)
    one = table.create(Mkc(), True).key
    many = table.create_many(Mkc(pd=3, mkey_7_0=5, translations_octword_size=4), True, 1000)
    last = table.create(Mkc(), True).key
    assert len(set(many) | {one, last}) == 1002 and len(table.mkeys) == 2
    table.get(many[3]).xlt[0] = 9
    assert table.get(many[3]).xlt[0] == 9 and not table.get(many[4]).xlt.any() and table.get(many[4]).key == many[4]
    assert table.destroy(many[3]) and not table.destroy(many[3]) and table.get(many[3]) is None
    assert table.destroy(many[500]) and table.get(many[500]) is None and table.get(last + 256) is None
