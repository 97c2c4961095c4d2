"""Registering memory: the steps and their order, every documented error, and what the hardware holds afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.odp_rig import GIB, ODP, PINNED, Rig, failed, steps

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.caps import HcaCaps, OdpGeneral
from kit.drivers.mlx5.device import imr_shape
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era
from kit.memory.types import MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE

ERAS = [Era.OLD, Era.MID, Era.NEW]


def order(names: list[str], rig: Rig, since: int = 0) -> None:
    """`names` were entered in this order."""
    entered = steps(rig, since)
    at = -1
    for name in names:
        assert name in entered[at + 1 :], (name, entered)
        at = entered.index(name, at + 1)


@pytest.mark.parametrize("era", ERAS)
def test_explicit_registration_step_by_step(era):
    rig = Rig(era)
    va = rig.mmap(16)
    since = len(rig.engine.trace.spans)
    rig.reg(va, 16 * PAGE)
    order(
        ["ib_uverbs_reg_mr", "ib_check_mr_access", "mlx5_ib_reg_user_mr", "mlx5r_umr_resource_init", "create_user_odp_mr",
         "mlx5r_odp_create_eq", "mempool_create_kmalloc_pool", "alloc_workqueue", "mlx5_eq_create_generic",
         "create_async_eq", "create_map_eq", "mlx5_eq_enable", "mlx5r_umr_can_load_pas", "ib_umem_odp_get",
         "ib_init_umem_odp", "mmu_interval_notifier_insert", "alloc_cacheable_mr", "ib_umem_find_best_pgsz",
         "mlx5_umem_needs_ats", "mkey_cache_ent_from_rb_key", "_mlx5_mr_cache_alloc", "pop_mkey_locked",
         "queue_adjust_cache_locked", "set_mr_fields", "xa_init", "mlx5r_store_odp_mkey", "xa_store",
         "mlx5_ib_init_odp_mr", "pagefault_real_mr", "ib_umem_odp_map_dma_and_lock", "mmu_interval_read_begin",
         "hmm_range_fault", "mmu_interval_read_retry", "hmm_pfn_to_map_order", "mlx5r_umr_update_xlt",
         "mlx5r_umr_create_xlt", "mlx5r_umr_alloc_xlt", "dma_map_single", "mlx5r_umr_set_update_xlt_ctrl_seg",
         "mlx5r_umr_set_update_xlt_mkey_seg", "mlx5r_umr_set_update_xlt_data_seg", "mlx5_odp_populate_xlt",
         "mlx5r_umr_post_send_wait"],
        rig, since,
    )  # fmt: skip


def test_the_event_queue_is_made_once():
    rig = Rig()
    assert rig.dev.odp_pf_eq is None
    va = rig.mmap(16)
    rig.reg(va, PAGE)
    eq = rig.dev.odp_pf_eq
    rig.reg(va, PAGE)
    assert rig.dev.odp_pf_eq is eq and eq.core.size == 8192
    assert (eq.pool.min_nr, eq.wq.max_active) == (64, 32)
    assert steps(rig).count("mlx5_eq_create_generic") == 1


@pytest.mark.parametrize("site", ["pf_pool", "pf_wq", "eq_create", "eq_enable"])
def test_a_queue_that_could_not_be_made_is_made_by_the_next(site):
    rig = Rig()
    va = rig.mmap(16)
    rig.dev.inject.fail(site)
    assert failed(rig.reg(va, PAGE))[0] == "ENOMEM"
    assert rig.dev.odp_pf_eq is None and not rig.hca.eqs
    assert rig.reg(va, PAGE).lkey


@pytest.mark.parametrize("era", ERAS)
def test_what_is_resident_is_programmed_and_nothing_is_faulted_in(era):
    rig = Rig(era)
    va = rig.mmap(16)
    rig.populate(va + 4 * PAGE, 3)
    used = rig.memory.free_pages
    mr = rig.reg(va, 16 * PAGE)
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8]
    assert np.flatnonzero(hw.xlt[:16]).tolist() == [4, 5, 6]
    assert (hw.xlt[4:7] & 3 == 3).all()  # readable and writable, as the CPU's entries are
    assert mr.umem.npages == 3 and rig.memory.free_pages == used
    assert rig.mm.pinned_vm == 0
    assert rig.walk(mr.rkey, va + 4 * PAGE, 3 * PAGE).verdict == Verdict.OK
    assert rig.walk(mr.rkey, va, PAGE).verdict == Verdict.FAULT
    assert not any(vars(mr.odp_stats).values())
    rig.check(mr)


def test_write_bits_come_from_the_cpu_and_rights_from_the_key():
    rig = Rig()
    va = rig.mmap(4, resident=True)
    mr = rig.reg(va, 4 * PAGE, Access.ON_DEMAND | Access.REMOTE_READ)
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8]
    assert (hw.xlt[:4] & 3 == 3).all() and not hw.mkc.rw and not hw.mkc.lw
    assert rig.walk(mr.rkey, va, PAGE, Need.REMOTE_READ).verdict == Verdict.OK
    assert rig.walk(mr.rkey, va, PAGE, Need.REMOTE_WRITE).verdict == Verdict.ERROR


@pytest.mark.parametrize("era", ERAS)
def test_memory_that_is_not_there_registers(era):
    rig = Rig(era)
    va = rig.mmap(4, prot=PROT_NONE)
    rig.munmap(va + 2 * PAGE, 2)
    mr = rig.reg(va, 4 * PAGE)
    assert mr.umem.npages == 0
    assert rig.fault(mr.rkey, va, PAGE)  # and fails later
    assert rig.fault(mr.rkey, va + 2 * PAGE, PAGE)


def test_the_key_is_findable_and_used_once():
    rig = Rig()
    va = rig.mmap(4)
    mr = rig.reg(va, 4 * PAGE)
    assert rig.dev.odp_mkeys == {mr.mmkey.key & ~0xFF: mr.mmkey} and mr.mmkey.usecount == 1
    assert mr.lkey == mr.rkey == mr.mmkey.key and mr.umem.private is mr


# -- errors of registration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "step"),
    [
        (Access.ON_DEMAND | Access.REMOTE_WRITE, "ib_check_mr_access"),
        (Access.ON_DEMAND | Access.REMOTE_ATOMIC, "ib_check_mr_access"),
        (Access.ON_DEMAND | 1 << 12, "ib_check_mr_access"),
    ],
)
def test_bad_rights(access, step):
    rig = Rig()
    assert failed(rig.reg(rig.mmap(1), PAGE, access)) == ("EINVAL", step)


def test_start_and_address_must_agree_within_the_page():
    rig = Rig()
    va = rig.mmap(2)
    assert failed(rig.reg(va, PAGE, iova=va + 8)) == ("EINVAL", "ib_uverbs_reg_mr")
    mr = rig.reg(va + 8, 64, iova=(1 << 40) + 8)
    assert mr.iova == (1 << 40) + 8


@pytest.mark.parametrize(("era", "errno"), [(Era.MID, "EINVAL"), (Era.NEW, "EOPNOTSUPP")])
def test_a_device_that_cannot_page(era, errno):
    rig = Rig(era, caps=HcaCaps(pg=False))
    assert rig.dev.odp_caps.general_caps == 0
    assert failed(rig.reg(rig.mmap(1), PAGE)) == (errno, "ib_check_mr_access")


@pytest.mark.parametrize("era", ERAS)
def test_a_kernel_without_paging(era):
    from kit.drivers.mlx5.mr.reg import mlx5_ib_reg_user_mr

    rig = Rig(era, config_odp=False)
    va = rig.mmap(1)
    ret = rig.run(mlx5_ib_reg_user_mr(rig.dev, rig.thread, rig.pd, va, PAGE, va, ODP))
    assert failed(ret) == ("EOPNOTSUPP", "create_user_odp_mr")


def test_implicit_regions_start_at_zero_and_need_the_capability():
    rig = Rig()
    assert failed(rig.reg(0, U64_MAX, iova=PAGE)) == ("EINVAL", "create_user_odp_mr")
    for missing in ({"fixed_buffer_size": False}, {"null_mkey": False}, {"umr_indirect_mkey_disabled": True}):
        other = Rig(caps=HcaCaps(**missing))
        assert not other.dev.odp_caps.general_caps & OdpGeneral.IMPLICIT
        assert failed(other.implicit()) == ("EINVAL", "create_user_odp_mr")
    assert failed(rig.implicit(ODP | Access.HUGETLB)) == ("EINVAL", "ib_umem_odp_alloc_implicit")


def test_length_limit_without_extended_offset():
    rig = Rig(caps=HcaCaps(umr_extended_translation_offset=False))
    va = rig.mmap(1 << 16)
    assert failed(rig.reg(va, 1 << 28)) == ("EINVAL", "create_user_odp_mr")
    assert rig.reg(va, (1 << 28) - PAGE).lkey
    assert rig.dev.odp_max_size == 1 << 28


def test_umr_that_cannot_change_entity_sizes():
    rig = Rig(caps=HcaCaps(umr_modify_entity_size_disabled=True))
    assert rig.dev.odp_caps.general_caps == 0
    mr = rig.reg(rig.mmap(1), PAGE, PINNED)  # created with its translations, by command
    assert rig.umrs() == 0 and rig.walk(mr.rkey, mr.iova, PAGE).verdict == Verdict.OK


@pytest.mark.parametrize("era", ERAS)
def test_lengths(era):
    rig = Rig(era)
    va = rig.mmap(4)
    assert failed(rig.reg(va, 0)) == ("EINVAL", "ib_init_umem_odp")
    assert rig.reg(va + 8, 0).umem.num_pages() == 1
    assert failed(rig.reg(U64_MAX & -PAGE, 2 * PAGE)) == ("EOVERFLOW", "ib_init_umem_odp")


@pytest.mark.parametrize(
    ("site", "step"),
    [
        ("umem_odp", "ib_umem_odp_get"), ("pfn_list", "ib_init_umem_odp"), ("dma_list", "ib_init_umem_odp"),
        ("notifier_insert", "mmu_interval_notifier_insert"), ("mr", "_mlx5_mr_cache_alloc"),
        ("odp_mkeys", "mlx5r_store_odp_mkey"), ("xlt_dma_map", "mlx5r_umr_create_xlt"),
    ],
)  # fmt: skip
def test_no_memory(site, step):
    rig = Rig()
    va = rig.mmap(4, resident=True)
    rig.dev.inject.fail(site)
    keys = len(rig.hca.mkeys.mkeys)
    assert failed(rig.reg(va, 4 * PAGE)) == ("ENOMEM", step)
    rig.settle()
    assert not rig.dev.odp_mkeys and rig.hca.dma.live == 0 and rig.hca.dma.errors == 0
    assert not rig.mm.notifier_subscriptions or not rig.mm.notifier_subscriptions.itree.overlapping(0, U64_MAX)
    assert len(rig.hca.mkeys.mkeys) - keys in (0, 1)  # at most one more for the cache
    assert rig.reg(va, 4 * PAGE).umem.npages == 4


def test_a_page_that_cannot_be_mapped_for_dma():
    rig = Rig()
    va = rig.mmap(8, resident=True)
    rig.dev.inject.fail("dma_map")
    assert failed(rig.reg(va, 8 * PAGE)) == ("EFAULT", "ib_umem_odp_map_dma_single_page")
    assert rig.hca.dma.live == 0


def test_a_request_that_fails():
    rig = Rig()
    rig.dev.inject.fail("umr")
    assert failed(rig.reg(rig.mmap(1), PAGE)) == ("EFAULT", "mlx5r_umr_post_send_wait")


def test_a_dead_device():
    rig = Rig()
    va = rig.mmap(2)
    rig.reg(va, PAGE)
    rig.hca.internal_error = True
    assert failed(rig.reg(va, PAGE)) == ("EIO", "mlx5r_umr_post_send")


def test_bounce_buffers_and_hmm_dma_maps():
    rig = Rig(Era.NEW)
    rig.dev.inject.fail("swiotlb")
    assert failed(rig.reg(rig.mmap(1), PAGE)) == ("EOPNOTSUPP", "hmm_dma_map_alloc")


# -- huge pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_hugetlb_regions_have_entries_of_2_mib(era):
    from kit.memory.syscalls.mmap import mmap

    rig = Rig(era)
    rig.memory.set_hugetlb_pool(9, 4)
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB
    va = rig.run(mmap(rig.mm, rig.thread, 4 << 20, PROT_READ | PROT_WRITE, flags))
    rig.populate(va, 512)
    mr = rig.reg(va, 4 << 20, ODP | Access.HUGETLB)
    assert (mr.page_shift, len(mr.umem.dma_list), len(mr.umem.pfn_list), mr.umem.npages) == (21, 2, 1024, 1)
    assert not rig.fault(mr.rkey, va + (2 << 20), 4096)
    # the newest driver counts the neighbour in the same 64 bytes again when it writes it again
    assert mr.odp_stats.faults == 512 and mr.umem.npages == (3 if era == Era.NEW else 2)
    assert rig.walk(mr.rkey, va, 4 << 20).verdict == Verdict.OK
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_hugetlb_over_small_pages(era):
    rig = Rig(era)
    va = rig.mmap(1024)
    va = -(-va // (2 << 20)) * (2 << 20)
    mr = rig.reg(va, 2 << 20, ODP | Access.HUGETLB)  # nothing resident: fine
    assert rig.fault(mr.rkey, va, PAGE)  # the fault is not
    other = Rig(era)
    va = other.mmap(1024)
    va = -(-va // (2 << 20)) * (2 << 20)
    other.populate(va, 1)
    assert failed(other.reg(va, 2 << 20, ODP | Access.HUGETLB)) == ("EINVAL", "ib_umem_odp_map_dma_and_lock")


# -- pinned ----------------------------------------------------------------------------------------------------------


def test_pinned_memory_is_charged_pinned_and_given_back():
    rig = Rig()
    va = rig.mmap(1024)
    mr = rig.reg(va, 1024 * PAGE, PINNED)
    assert rig.mm.pinned_vm == 1024 and rig.dev.reg_pages == 1024
    assert rig.walk(mr.rkey, va, 1024 * PAGE).verdict == Verdict.OK
    assert rig.umrs() == 1 and not rig.dev.odp_mkeys and rig.dev.odp_pf_eq is None
    assert rig.dereg(mr) == 0
    assert rig.mm.pinned_vm == 0 and rig.dev.reg_pages == 0 and rig.hca.dma.live == 0
    assert not rig.memory.pincount.any()


def test_pinning_goes_in_batches_of_512():
    rig = Rig()
    rig.reg(rig.mmap(1200), 1200 * PAGE, PINNED)
    assert steps(rig).count("pin_user_pages_fast") in (0, 3)
    assert rig.mm.pinned_vm == 1200


def test_pinned_memory_survives_munmap():
    rig = Rig()
    va = rig.mmap(4)
    mr = rig.reg(va, 4 * PAGE, PINNED)
    rig.munmap(va, 4)
    assert rig.walk(mr.rkey, va, 4 * PAGE).verdict == Verdict.OK and not rig.hca.dma.stale


def test_limits_of_pinned_memory():
    rig = Rig()
    va = rig.mmap(16)
    rig.mm.rlimit_memlock = 8 * PAGE
    assert failed(rig.reg(va, 9 * PAGE, PINNED)) == ("ENOMEM", "ib_umem_get")
    assert rig.mm.pinned_vm == 0
    assert rig.reg(va, 8 * PAGE, PINNED).lkey
    rig.mm.rlimit_memlock = 0
    assert failed(rig.reg(va, PAGE, PINNED)) == ("EPERM", "ib_umem_get")


def test_memory_that_cannot_be_pinned():
    rig = Rig()
    va = rig.mmap(4)
    rig.munmap(va + 2 * PAGE, 2)
    assert failed(rig.reg(va, 4 * PAGE, PINNED))[0] == "EFAULT"
    assert rig.mm.pinned_vm == 0 and not rig.memory.pincount.any()
    assert failed(rig.reg(va, 0, PINNED)) == ("EINVAL", "ib_umem_get")
    assert failed(rig.reg(U64_MAX & -PAGE, 2 * PAGE, PINNED)) == ("EINVAL", "ib_umem_get")


# -- shape of implicit regions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("era", "task_size", "shift", "ksm"),
    [
        (Era.MID, (1 << 47) - PAGE, 30, 131_072), (Era.NEW, (1 << 47) - PAGE, 30, 131_072),
        (Era.MID, 1 << 48, 30, 262_144), (Era.NEW, 1 << 48, 30, 262_144),
        (Era.MID, (1 << 56) - PAGE, 30, 1 << 26), (Era.NEW, (1 << 56) - PAGE, 34, 1 << 22),
        (Era.NEW, 1 << 57, 0, 0),
    ],
)  # fmt: skip
def test_shape(era, task_size, shift, ksm):
    shape = imr_shape(era, task_size)
    assert (shape.mtt_shift, shape.ksm_entries) == (shift, ksm)
    if shift:
        assert shape.mtt_entries == 1 << (shift - 12) and shape.mtt_size == 1 << shift
        assert shape.ksm_entries * shape.mtt_size >= task_size


def test_five_levels_give_children_of_16_gib():
    rig = Rig(Era.NEW, task_size=(1 << 56) - PAGE, cache=False)
    from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init

    rig.run(mlx5_mkey_cache_init(rig.dev, rig.thread))
    imr = rig.implicit()
    rig.mmap(1, at=5 * GIB)
    assert not rig.fault(imr.rkey, 5 * GIB, 64)
    (child,) = imr.implicit_children.values()
    assert (child.umem.start, child.umem.end) == (0, 16 * GIB)
