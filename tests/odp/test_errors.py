"""Every documented error, produced by what causes it: at registration, during faults, in advise_mr, and on the wire.

Each is checked with its errno and the function in which it arose (`kit.errors.Errno`), or with the completion that the
program sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drivers.mlx5.odp_rig import ODP, PINNED, Rig, failed
from drivers.mlx5.two_hosts import RIGHTS, World

from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.device import UMR_ERR
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, Era, QpState, WcStatus, WrOpcode
from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init, warm_cache
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_xlt
from kit.drivers.mlx5.objects import MKEY_MW, UPD_XLT_INDIRECT, IbPd, Mlx5IbMkey
from kit.drivers.mlx5.odp.advise import (
    ADVISE_FLUSH,
    PREFETCH,
    PREFETCH_NO_FAULT,
    PREFETCH_WRITE,
    ib_uverbs_advise_mr,
)
from kit.drivers.mlx5.verbs import alloc_pd, connect, create_cq, create_qp, reg_mr
from kit.drivers.mlx5.verbs_post import post_send
from kit.memory.reclaim.memory_failure import memory_failure
from kit.memory.syscalls.mprotect import mprotect
from kit.memory.types import PROT_NONE, PROT_READ

MIB = 1 << 20
IMPLICIT = (0, U64_MAX)
READABLE = Access.ON_DEMAND | Access.REMOTE_READ
ERAS = pytest.mark.parametrize("era", list(Era))


def ready(era: Era = Era.MID, **more: Any) -> Rig:
    """Return a host whose key cache is full, as that of a machine which has been up for a while."""
    rig = Rig(era, cache=False, **more)
    rig.run(mlx5_mkey_cache_init(rig.dev, rig.thread))
    warm_cache(rig.dev)
    return rig


# -- registration (the table of section 1.3) ---------------------------------------------------------------------------


@ERAS
@pytest.mark.parametrize(
    ("access", "step"),
    [
        (Access.ON_DEMAND | Access.REMOTE_WRITE, "ib_check_mr_access"),
        (Access.ON_DEMAND | Access.REMOTE_ATOMIC, "ib_check_mr_access"),
        (Access.ON_DEMAND | Access.REMOTE_ATOMIC | Access.REMOTE_READ, "ib_check_mr_access"),
        (Access.REMOTE_WRITE, "ib_check_mr_access"),
        (ODP | 1 << 10, "ib_check_mr_access"),
        (ODP | 1 << 19, "ib_check_mr_access"),
        (ODP | 1 << 31, "ib_check_mr_access"),
    ],
)
def test_bad_access_combinations(era: Era, access: int, step: str) -> None:
    rig = ready(era)
    for start, length in ((rig.mmap(1), PAGE), IMPLICIT):
        assert failed(rig.reg(start, length, access)) == ("EINVAL", step)
    assert not rig.dev.odp_mkeys and rig.dev.odp_pf_eq is None


@ERAS
def test_implicit_with_an_address_or_without_the_capability(era: Era) -> None:
    rig = ready(era)
    assert failed(rig.reg(*IMPLICIT, ODP, iova=PAGE)) == ("EINVAL", "create_user_odp_mr")
    assert failed(rig.reg(*IMPLICIT, ODP, iova=8)) == ("EINVAL", "ib_uverbs_reg_mr")  # another place in its page
    assert failed(rig.reg(*IMPLICIT, ODP | Access.HUGETLB)) == ("EINVAL", "ib_umem_odp_alloc_implicit")
    for name in ("fixed_buffer_size", "null_mkey"):
        rig = ready(era, caps=HcaCaps(**{name: False}))
        assert failed(rig.reg(*IMPLICIT, ODP)) == ("EINVAL", "create_user_odp_mr")
    rig = ready(era, caps=HcaCaps(umr_indirect_mkey_disabled=True))
    assert failed(rig.reg(*IMPLICIT, ODP)) == ("EINVAL", "create_user_odp_mr")


@ERAS
def test_too_long_for_umr(era: Era) -> None:
    rig = ready(era, caps=HcaCaps(umr_extended_translation_offset=False))
    start = rig.mmap(256 * MIB // PAGE)
    assert failed(rig.reg(start, 256 * MIB)) == ("EINVAL", "create_user_odp_mr")
    assert rig.reg(start, 256 * MIB - PAGE).lkey


@ERAS
def test_no_page_and_no_page_size(era: Era) -> None:
    rig = ready(era)
    start = rig.mmap(2)
    assert failed(rig.reg(start, 0)) == ("EINVAL", "ib_init_umem_odp")
    assert rig.reg(start + 5, 0).lkey  # rounded out to one page
    assert failed(rig.reg(start, 0, PINNED)) == ("EINVAL", "ib_umem_get")


@ERAS
def test_address_and_length_wrap(era: Era) -> None:
    rig = ready(era)
    top = U64_MAX - PAGE + 1
    for start, length in ((top, 2 * PAGE), (PAGE, U64_MAX), (rig.mmap(1), U64_MAX)):
        assert failed(rig.reg(start, length)) == ("EOVERFLOW", "ib_init_umem_odp")
        assert failed(rig.reg(start, length, PINNED)) == ("EINVAL", "ib_umem_get")


@pytest.mark.parametrize(("era", "errno"), [(Era.OLD, "EINVAL"), (Era.MID, "EINVAL"), (Era.NEW, "EOPNOTSUPP")])
def test_a_device_that_cannot_page(era: Era, errno: str) -> None:
    rig = ready(era, caps=HcaCaps(pg=False))
    assert failed(rig.reg(rig.mmap(1), PAGE)) == (errno, "ib_check_mr_access")


@ERAS
def test_not_supported(era: Era) -> None:
    rig = ready(era, caps=HcaCaps(relaxed_ordering_read_umr=False))
    refused = rig.reg(*IMPLICIT, ODP | Access.RELAXED_ORDERING)
    assert failed(refused) == ("EOPNOTSUPP", "mlx5_mr_cache_alloc")  # no entry has a right that UMR cannot change
    assert rig.reg(rig.mmap(1), PAGE, ODP | Access.RELAXED_ORDERING).lkey  # an explicit key is made to measure
    rig = ready(era, caps=HcaCaps(umr_modify_atomic_disabled=True))
    atomic = ODP | Access.REMOTE_ATOMIC
    assert failed(rig.reg(*IMPLICIT, atomic)) == ("EOPNOTSUPP", "mlx5_mr_cache_alloc")


def test_swiotlb_devices_are_not_supported_by_the_newest() -> None:
    rig = ready(Era.NEW)
    rig.dev.inject.fail("swiotlb")
    assert failed(rig.reg(rig.mmap(1), PAGE)) == ("EOPNOTSUPP", "hmm_dma_map_alloc")


@ERAS
@pytest.mark.parametrize(
    ("site", "step"),
    [
        ("pf_pool", "mlx5r_odp_create_eq"), ("pf_wq", "mlx5r_odp_create_eq"), ("eq_create", "mlx5_eq_create_generic"),
        ("umem_odp", "ib_umem_odp_get"), ("pfn_list", "ib_init_umem_odp"), ("dma_list", "ib_init_umem_odp"),
        ("notifier_insert", "mmu_interval_notifier_insert"), ("mr", "_mlx5_mr_cache_alloc"),
        ("odp_mkeys", "mlx5r_store_odp_mkey"), ("xlt_dma_map", "mlx5r_umr_create_xlt"),
    ],
)  # fmt: skip
def test_no_memory_at_registration(era: Era, site: str, step: str) -> None:
    rig = ready(era)
    start = rig.mmap(4, resident=True)
    rig.dev.inject.fail(site)
    assert failed(rig.reg(start, 4 * PAGE)) == ("ENOMEM", step)
    rig.settle()
    assert not rig.dev.odp_mkeys and rig.hca.dma.live == 0 and rig.mm.pinned_vm == 0
    mr = rig.reg(start, 4 * PAGE)  # nothing is left of it: the next one works
    assert not rig.fault(mr.rkey, start, 4 * PAGE) and rig.dereg(mr) == 0


@ERAS
def test_a_mask_that_umr_may_not_write(era: Era, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = ready(era)
    mr = rig.reg(rig.mmap(4), 4 * PAGE)
    rig.dev.caps.umr_indirect_mkey_disabled = True
    ret = rig.run(mlx5r_umr_update_xlt(mr, rig.thread, 0, 4, 0, UPD_XLT_INDIRECT))
    assert failed(ret) == ("EPERM", "mlx5r_umr_update_xlt")
    rig.dev.caps.umr_modify_entity_size_disabled = True  # noticed by nobody before the request itself
    rig.dev.caps.umr_extended_translation_offset = True
    assert failed(rig.reg(rig.mmap(1), PAGE)) == ("EINVAL", "create_user_odp_mr")
    other = ready(era)
    start = other.mmap(1)
    real = other.dev.inject.hit

    def late(site: str) -> bool:  # the capability goes between the first check and the request
        other.dev.caps.umr_modify_entity_size_disabled |= site == "xlt_dma_map"
        return real(site)

    monkeypatch.setattr(other.dev.inject, "hit", late)
    assert failed(other.reg(start, PAGE)) == ("EPERM", "umr_check_mkey_mask")


@ERAS
def test_a_request_that_completes_in_error(era: Era) -> None:
    rig = ready(era)
    start = rig.mmap(4)
    rig.reg(start, PAGE)
    rig.dev.inject.fail("umr")
    assert failed(rig.reg(start, 4 * PAGE)) == ("EFAULT", "mlx5r_umr_post_send_wait")
    rig.settle()
    if era == Era.OLD:
        return  # nobody recovers the queue pair there
    rig.dev.inject.fail("umr")
    rig.dev.inject.fail("umr_recover")
    assert failed(rig.reg(start, 4 * PAGE)) == ("EFAULT", "mlx5r_umr_post_send_wait")
    assert rig.dev.umrc.state == UMR_ERR
    assert failed(rig.reg(start, 4 * PAGE)) == ("EFAULT", "mlx5r_umr_post_send_wait")


@ERAS
def test_a_device_in_internal_error(era: Era) -> None:
    rig = ready(era)
    start = rig.mmap(4)
    rig.reg(start, PAGE)
    rig.hca.internal_error = True
    assert failed(rig.reg(start, 4 * PAGE)) == ("EIO", "mlx5r_umr_post_send")
    assert failed(rig.reg(*IMPLICIT, ODP)) == ("EIO", "mlx5_cmd_exec")  # its key has to be created
    fresh = ready(era)
    fresh.hca.internal_error = True
    assert failed(fresh.reg(fresh.mmap(1), PAGE)) == ("EIO", "mlx5_cmd_exec")


@ERAS
def test_huge_page_regions_over_small_pages(era: Era) -> None:
    rig = ready(era)
    start = -(-rig.mmap(1024) // (2 * MIB)) * 2 * MIB
    rig.populate(start, 1)
    ret = rig.reg(start, 2 * MIB, ODP | Access.HUGETLB)
    assert failed(ret) == ("EINVAL", "ib_umem_odp_map_dma_and_lock")
    rig.dontneed(start, 512)
    mr = rig.reg(start, 2 * MIB, ODP | Access.HUGETLB)  # nothing resident, nothing to find wrong: the fault fails
    assert rig.fault(mr.rkey, start, 64)


# -- faults: what is retried, what fails the access (section 3.8) -------------------------------------------------------


def region(rig: Rig, pages: int = 4, access: int = ODP, prot: int | None = None) -> tuple[Any, int]:
    start = rig.mmap(pages) if prot is None else rig.mmap(pages, prot=prot)
    return rig.reg(start, pages * PAGE, access), start


def unmapped(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    rig.munmap(start, 4)
    return mr.rkey, start


def protected(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    assert rig.run(mprotect(rig.mm, rig.thread, start, 4 * PAGE, PROT_NONE)) == 0
    return mr.rkey, start


def read_only(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig, prot=PROT_READ)
    return mr.rkey, start


def poisoned(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    rig.populate(start, 1)
    pfn = int(rig.mm.table.frame[rig.mm.table.slots_of(np.array([start // PAGE]))][0])
    rig.run(memory_failure(rig.memory, rig.thread, pfn))
    return mr.rkey, start


def owner_gone(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    mr.umem.owner_alive = False
    return mr.rkey, start


def no_buffer(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    rig.dev.inject.fail("xlt_dma_map")
    return mr.rkey, start


def no_dma_address(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    rig.dev.inject.fail("dma_map")
    return mr.rkey, start


def umr_fails(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    rig.dev.inject.fail("umr")
    return mr.rkey, start


def outside(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    return mr.rkey, start + 4 * PAGE - 32


def below(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    return mr.rkey, start - PAGE


def other_variant(rig: Rig) -> tuple[int, int]:
    mr, start = region(rig)
    return mr.rkey ^ 1, start


def beyond_the_table(rig: Rig) -> tuple[int, int]:
    return rig.implicit().rkey, (1 << 47) + 64


@ERAS
@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (unmapped, "-EFAULT"), (protected, "-EFAULT"), (read_only, "-EPERM"), (poisoned, "-EFAULT"), (owner_gone, ""),
        (no_buffer, ""), (no_dma_address, ""), (umr_fails, ""), (outside, ""), (below, ""), (other_variant, ""),
        (beyond_the_table, ""),
    ],
)  # fmt: skip
def test_what_fails_a_fault(era: Era, cause: Callable[[Rig], tuple[int, int]], status: str) -> None:
    """Resumed with an error, once; another region of the same device still faults in."""
    rig = ready(era)
    key, va = cause(rig)
    assert rig.fault(key, va, 64) is True
    assert rig.hca.counters.resumes_in_error == rig.hca.counters.resumes == 1
    if status:
        trace = rig.engine.trace
        rows = trace.spans.column("step") == trace.steps.ids["hmm_range_fault"]
        assert trace.statuses.words[int(trace.spans.column("status")[rows][-1])] == status
    if cause is umr_fails and era == Era.OLD:
        return  # its UMR queue pair stays in error
    other, start = region(rig)
    assert rig.fault(other.rkey, start, 64) is False


def test_an_oom_killed_fault_fails_the_access() -> None:
    rig = ready(frames=96)
    mr, start = region(rig, 256)
    assert rig.fault(mr.rkey, start, 256 * PAGE) is True
    assert "VM_FAULT_OOM" in rig.engine.trace.statuses.ids


@pytest.mark.parametrize("era", [Era.MID, Era.NEW])
def test_what_is_retried_is_no_error(era: Era) -> None:
    """Pages that come and go under a fault, swap, a key that is not on demand: replayed."""
    rig = ready(era)
    mr, start = region(rig)
    pinned = rig.reg(rig.mmap(4), 4 * PAGE, PINNED)
    # A remote access to a key that is not on demand maps nothing; up to 6.13 that is too little, later it is replayed.
    assert rig.fault(pinned.rkey, pinned.iova, 64) is (era < Era.NEW)
    for _ in range(3):
        rig.dontneed(start, 4)
        assert rig.fault(mr.rkey, start, 4 * PAGE) is False


def test_the_oldest_lets_the_hardware_fault_again() -> None:
    """-EAGAIN: an invalidation came in between; resumed without an error, with nothing mapped."""
    from kit.memory.syscalls.madvise import madvise
    from kit.memory.types import MADV_DONTNEED

    rig = ready(Era.OLD, cost=1.0)
    mr, start = region(rig)
    rig.mm.costs.handle_mm_fault = 50.0
    done = rig.post(rig.rdma_event(mr.rkey, start, PAGE))
    rig.settle(20.0)
    other = rig.engine.thread("other")
    rig.engine.start(madvise(rig.mm, other, start + PAGE, PAGE, MADV_DONTNEED))
    assert rig.engine.run(done) is False
    rig.settle()
    assert mr.umem.npages in (0, 1) and rig.hca.counters.resumes == 1


# -- advise_mr (section 10) -----------------------------------------------------------------------------------------


def advise(rig: Rig, advice: int, flags: int, *sges: Sge, pd: IbPd | None = None) -> Any:
    return rig.run(ib_uverbs_advise_mr(pd or rig.pd, rig.thread, advice, flags, sges))


@ERAS
@pytest.mark.parametrize("flags", [0, ADVISE_FLUSH])
def test_advise_mr(era: Era, flags: int) -> None:
    rig = ready(era)
    mr, start = region(rig)
    readable, low = region(rig, access=READABLE)
    pinned = rig.reg(rig.mmap(4), 4 * PAGE, PINNED)
    sge = Sge(start, PAGE, mr.lkey)
    look_up = "get_prefetchable_mr"
    assert failed(advise(rig, 3, flags, sge)) == ("EOPNOTSUPP", "mlx5_ib_advise_mr")
    assert failed(advise(rig, -1, flags, sge)) == ("EOPNOTSUPP", "mlx5_ib_advise_mr")
    for unknown in (2, 4, 1 << 31):
        assert failed(advise(rig, PREFETCH, flags | unknown, sge)) == ("EINVAL", "ib_uverbs_advise_mr")
    assert failed(advise(rig, PREFETCH, flags)) == ("EINVAL", "ib_uverbs_advise_mr")
    for key in (0, 0xDEAD00, mr.lkey ^ 1, pinned.lkey):
        assert failed(advise(rig, PREFETCH, flags, sge._replace(lkey=key))) == ("ENOENT", look_up)
    rig.dev.odp_mkeys[0x77700] = Mlx5IbMkey(0x77700, MKEY_MW, 0, 1)
    assert failed(advise(rig, PREFETCH, flags, sge._replace(lkey=0x77700))) == ("EINVAL", look_up)
    stranger = IbPd(rig.dev, 99, rig.mm)
    assert failed(advise(rig, PREFETCH, flags, sge, pd=stranger)) == ("EPERM", look_up)
    assert failed(advise(rig, PREFETCH_WRITE, flags, Sge(low, PAGE, readable.lkey))) == ("EPERM", look_up)
    assert advise(rig, PREFETCH, flags, Sge(low, PAGE, readable.lkey)) == 0
    if not flags:
        rig.dev.inject.fail("prefetch_work")
        assert failed(advise(rig, PREFETCH, 0, sge)) == ("ENOMEM", "mlx5_ib_advise_mr_prefetch")
    rig.settle()
    assert mr.odp_stats.prefetch == 0 and mr.mmkey.usecount == readable.mmkey.usecount == 1


@ERAS
def test_advise_mr_waits_for_errors_or_swallows_them(era: Era) -> None:
    rig = ready(era)
    mr, start = region(rig)
    bad = {
        "outside": (Sge(start + 3 * PAGE, 2 * PAGE, mr.lkey), "EFAULT", "pagefault_mr"),
        "below": (Sge(start - PAGE, PAGE, mr.lkey), "EFAULT", "pagefault_mr"),
    }
    for sge, errno, step in bad.values():
        for advice in (PREFETCH, PREFETCH_WRITE, PREFETCH_NO_FAULT):
            assert failed(advise(rig, advice, ADVISE_FLUSH, sge)) == (errno, step)
            assert advise(rig, advice, 0, sge) == 0
    rig.settle()
    rig.munmap(start, 4)
    whole = Sge(start, 4 * PAGE, mr.lkey)
    assert failed(advise(rig, PREFETCH, ADVISE_FLUSH, whole))[0] == "EFAULT"
    assert advise(rig, PREFETCH, 0, whole) == 0  # best effort
    assert advise(rig, PREFETCH_NO_FAULT, ADVISE_FLUSH, whole) == 0  # nothing is asked for
    rig.settle()
    assert mr.odp_stats.prefetch == 4 and mr.mmkey.usecount == 1


@ERAS
def test_write_prefetch_of_a_read_only_mapping(era: Era) -> None:
    rig = ready(era)
    mr, start = region(rig, prot=PROT_READ)
    sge = Sge(start, PAGE, mr.lkey)
    assert failed(advise(rig, PREFETCH_WRITE, ADVISE_FLUSH, sge))[0] == "EPERM"
    assert advise(rig, PREFETCH, ADVISE_FLUSH, sge) == 0
    assert rig.fault(mr.rkey, start, 64) is True  # a fault wants what the region may do, whatever the access does


# -- on the wire ------------------------------------------------------------------------------------------------------


def pair(kind: str = "explicit", era: Era = Era.MID) -> tuple[World, Any, Any]:
    world = World(era, frames=1 << 10)
    world.client.setup(kind, 2)
    world.server.setup(kind, 2)
    qp, _ = world.rc()
    return world, qp, {"remote_addr": world.server.buf, "rkey": world.server.mr.rkey}


@pytest.mark.parametrize("era", list(Era))
@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND])
def test_unmapped_memory(era: Era, kind: str, side: str, opcode: WrOpcode) -> None:
    world, qp, where = pair(kind, era)
    peer = world.server.hca.qps[qp.dest]
    if opcode == WrOpcode.SEND:
        world.server.recv(peer, world.server.sge())
    getattr(world, side).munmap()
    world.client.send(qp, opcode, world.client.sge(), **where)
    (wc,) = world.client.wait(qp)
    there = WcStatus.REM_OP_ERR if opcode == WrOpcode.SEND else WcStatus.REM_ACCESS_ERR
    assert wc.status == (WcStatus.LOC_PROT_ERR if side == "client" else there)
    if opcode == WrOpcode.SEND and side == "server":
        assert world.server.wait(peer, receive=True)[0].status == WcStatus.LOC_PROT_ERR
    assert qp.state == QpState.ERR and getattr(world, side).hca.counters.resumes_in_error == 1
    world.client.send(qp, opcode, world.client.sge(), **where)
    assert world.client.wait(qp)[0].status == WcStatus.WR_FLUSH_ERR
    world.settle()
    world.check()


@pytest.mark.parametrize("name", ["unknown", "variant", "range", "domain", "right", "gone"])
@pytest.mark.parametrize("remote", [False, True])
def test_keys_that_the_hardware_refuses(name: str, remote: bool) -> None:
    """No fault is raised for them: the hardware looks at the key before it looks for pages."""
    world, qp, where = pair()
    side = world.server if remote else world.client
    key, size = side.mr.lkey, side.size
    local, length = world.client.sge(), PAGE
    if name == "unknown":
        key = 0x00BAD700
    elif name == "variant":
        key ^= 1
    elif name == "range":
        length = size + 1
    elif name == "domain":
        pd = side.do(alloc_pd(side.context, side.thread))
        key = side.do(reg_mr(pd, side.thread, side.buf, size, RIGHTS | Access.ON_DEMAND)).lkey
    elif name == "right":
        key = side.register("explicit", Access.REMOTE_READ).lkey
    else:
        from kit.drivers.mlx5.verbs import dereg_mr

        assert side.do(dereg_mr(side.mr, side.thread)) == 0
    opcode = WrOpcode.RDMA_WRITE
    if remote:
        where["rkey"] = key
        local = Sge(world.client.buf, min(length, world.client.size), world.client.mr.lkey)
        if name == "range":
            where["remote_addr"] += PAGE
            local = local._replace(length=2 * PAGE)
    else:
        local = Sge(local.addr, length, key)
        if name == "right":
            opcode = WrOpcode.RDMA_READ  # writes to local memory
    world.client.send(qp, opcode, local, **where)
    (wc,) = world.client.wait(qp)
    assert wc.status == (WcStatus.REM_ACCESS_ERR if remote else WcStatus.LOC_PROT_ERR)
    assert side.hca.counters.page_faults == 0


def test_retries_that_run_out() -> None:
    world, _, where = pair()
    left, right = world.client.qp(), world.server.qp()
    assert world.client.do(connect(world.client.thread, left, right, rnr_retry=2, min_rnr_timer=1)) == 0
    world.client.send(left, WrOpcode.RDMA_WRITE, world.client.sge(), **where)
    assert world.client.wait(left)[0].status == WcStatus.RNR_RETRY_EXC_ERR  # the fault takes longer than three tries
    world.settle()
    left, right = world.client.qp(), world.server.qp()
    assert world.client.do(connect(world.client.thread, left, right, timeout=5, retry_cnt=2)) == 0
    world.fabric.drop = lambda message: True
    world.client.send(left, WrOpcode.RDMA_WRITE, world.client.sge(), **where)
    assert world.client.wait(left)[0].status == WcStatus.RETRY_EXC_ERR


def test_bad_calls_of_the_program() -> None:
    world, qp, where = pair()
    client = world.client
    from kit.drivers.mlx5.descriptors import SendWr
    from kit.drivers.mlx5.enums import QpType

    atomic = SendWr(0, WrOpcode.ATOMIC_FETCH_AND_ADD, (client.sge(0, 16),), **where)
    assert failed(client.do(post_send(qp, client.thread, atomic))) == ("EINVAL", "post_send")
    cq = client.do(create_cq(client.context, client.thread, 4))
    fresh = client.do(create_qp(client.pd, client.thread, QpType.RC, cq, cq, None, 1, 1, 1))
    assert failed(client.do(post_send(fresh, client.thread, SendWr()))) == ("EINVAL", "post_send")
    assert client.do(connect(client.thread, fresh, fresh)) == 0
    long = SendWr(0, WrOpcode.RDMA_WRITE, (client.sge(), client.sge()), **where)
    assert failed(client.do(post_send(fresh, client.thread, long))) == ("EINVAL", "post_send")
    world.fabric.drop = lambda message: True
    one = SendWr(0, WrOpcode.RDMA_WRITE, (client.sge(0, 8),), **where)
    assert client.do(post_send(fresh, client.thread, one)) == 0
    assert failed(client.do(post_send(fresh, client.thread, one))) == ("ENOMEM", "post_send")
