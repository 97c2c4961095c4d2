"""Cases 29 to 37 of hmm-tests.c @ 7.0: migration of transparent huge pages."""

from __future__ import annotations

import numpy as np
from hmm.harness import KIB, MIB, RW, TWOMEG, Buffer, Fixture, Program, case, counting

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_FLAG_FAIL_ALLOC,
    HMM_DMIRROR_FLAGS,
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
    HMM_DMIRROR_PROT_PMD,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_SNAPSHOT,
)
from kit.memory.types import (
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_READ,
)

THP = TWOMEG // PAGE  # 512 pages
DATA = counting(TWOMEG)


def thp_buffer(t: Fixture, prot: int = RW, advice: int = MADV_HUGEPAGE, size: int = 2 * TWOMEG) -> Program:
    """Map `size` bytes and return a buffer over its first aligned 2 MiB, its mirror 0xFF."""
    buffer = yield from t.huge_buffer(prot=prot, size=size)
    assert (yield from t.process.madvise(buffer.ptr, TWOMEG, advice)) == 0
    buffer.mirror[:] = 0xFF
    return buffer


def filled(t: Fixture, **how: int) -> Program:
    buffer = yield from thp_buffer(t, **how)
    yield from t.process.write_ints(buffer.ptr, DATA)
    return buffer


def moves(t: Fixture, buffer: Buffer, expected: object) -> Program:
    """Migrate the 2 MiB to the device and compare what it read."""
    buffer.mirror[:] = 0xFF
    assert (yield from t.migrate_sys_to_dev(t.fd, buffer, THP)) == 0
    assert buffer.cpages == THP
    assert np.array_equal(buffer.ints, expected)


def fail_alloc(t: Fixture, buffer: Buffer) -> Program:
    assert (yield from t.process.ioctl(t.fd, HMM_DMIRROR_FLAGS, buffer, HMM_DMIRROR_FLAG_FAIL_ALLOC)) == 0


@case("hmm")
def migrate_anon_huge_empty(t: Fixture) -> Program:
    buffer = yield from thp_buffer(t, prot=PROT_READ)
    yield from moves(t, buffer, 0 * DATA)


@case("hmm")
def migrate_anon_huge_zero(t: Fixture) -> Program:
    p, buffer = t.process, (yield from thp_buffer(t, prot=PROT_READ))
    assert (yield from p.read_ints(buffer.ptr, 1))[0] == 0  # the huge zero page
    yield from moves(t, buffer, 0 * DATA)
    assert not (yield from p.read_ints(buffer.ptr, len(DATA))).any()


@case("hmm")
def migrate_anon_huge_free(t: Fixture) -> Program:
    buffer = yield from filled(t)
    yield from moves(t, buffer, DATA)
    assert (yield from t.process.madvise(buffer.ptr, TWOMEG, MADV_FREE)) == 0


@case("hmm")
def migrate_anon_huge_fault(t: Fixture) -> Program:
    """The snapshot between migration and access was added after 7.0; it holds for 7.0 too."""
    p, buffer = t.process, (yield from filled(t))
    yield from moves(t, buffer, DATA)
    if not t.coherent:
        assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, THP)) == 0
        assert buffer.cpages == THP
        wanted = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE | HMM_DMIRROR_PROT_PMD
        assert (buffer.mirror[:THP] == wanted).all()
        assert not p.pages_present(buffer.ptr, THP).any(), "every page is swapped and not present"
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(DATA))), DATA)


@case("hmm")
def migrate_partial_unmap_fault(t: Fixture) -> Program:
    p = t.process
    for advice in (MADV_NOHUGEPAGE, MADV_HUGEPAGE):
        for offset in (0, 512 * KIB, MIB):
            buffer = yield from filled(t, advice=advice)
            yield from moves(t, buffer, DATA)
            assert (yield from p.munmap(buffer.ptr + offset, MIB)) == 0
            for first, last in ((0, offset), (offset + MIB, TWOMEG)):
                if first < last:
                    seen = yield from p.read_ints(buffer.ptr + first, (last - first) // 4)
                    assert np.array_equal(seen, DATA[first // 4 : last // 4])
            yield from t.free(buffer)


@case("hmm")
def migrate_remap_fault(t: Fixture) -> Program:
    for before in (False, True):
        for flags in (MREMAP_MAYMOVE | MREMAP_FIXED, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP):
            for advice in (MADV_NOHUGEPAGE, MADV_HUGEPAGE):
                for offset in (0, 512 * KIB, MIB):
                    yield from remap_fault(t, before, flags, advice, offset)


def remap_fault(t: Fixture, before: bool, flags: int, advice: int, offset: int) -> Program:
    p, buffer = t.process, (yield from thp_buffer(t, advice=advice, size=8 * TWOMEG))
    old, new = buffer.ptr, buffer.ptr + TWOMEG + offset
    assert (yield from p.munmap(old + TWOMEG, 2 * TWOMEG)) == 0
    yield from p.write_ints(old, DATA)
    if before:
        assert (yield from p.mremap(old, TWOMEG, TWOMEG, flags, new)) == new
        buffer.ptr = new
    yield from moves(t, buffer, DATA)
    if not before:
        assert (yield from p.mremap(old, TWOMEG, TWOMEG, flags, new)) == new
        buffer.ptr = new
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(DATA))), DATA)
    assert (yield from p.munmap(new, TWOMEG)) == 0
    yield from t.free(buffer)


@case("hmm")
def migrate_anon_huge_err(t: Fixture) -> Program:
    p, buffer = t.process, (yield from filled(t))
    yield from fail_alloc(t, buffer)
    yield from moves(t, buffer, DATA)
    assert (yield from p.read_ints(buffer.ptr + 4 * 2048, 1))[0] == 2048  # faults one small page back
    assert (yield from p.munmap(buffer.base, buffer.size)) == 0
    buffer = yield from filled(t)
    assert (yield from t.migrate_sys_to_dev(t.fd, buffer, THP)) == 0
    assert buffer.cpages == THP
    yield from fail_alloc(t, buffer)
    assert (yield from t.migrate_dev_to_sys(t.fd, buffer, THP)) == 0
    assert (yield from p.read_ints(buffer.ptr + 4 * 2048, 1))[0] == 2048


@case("hmm")
def migrate_anon_huge_zero_err(t: Fixture) -> Program:
    p, buffer = t.process, (yield from thp_buffer(t, prot=PROT_READ))
    old = buffer.ptr
    yield from fail_alloc(t, buffer)
    yield from moves(t, buffer, 0 * DATA)
    assert (yield from p.read_ints(old + 4 * 2048, 1))[0] == 0
    assert (yield from p.munmap(buffer.base, buffer.size)) == 0
    buffer = yield from thp_buffer(t, prot=PROT_READ)
    assert (yield from p.read_ints(old, 1))[0] == 0  # the map landed at the same place
    yield from fail_alloc(t, buffer)
    assert (yield from t.migrate_sys_to_dev(t.fd, buffer, THP)) == 0
    assert buffer.cpages == THP
    assert not (yield from p.read_ints(old, len(DATA))).any()


@case("hmm", payload_bytes=8)
def benchmark_thp_migration(t: Fixture) -> Program:
    """Pages carry one stamp here: what the test asserts is that every migration returns 0."""
    for size in (512 * KIB, MIB, TWOMEG, 2 * TWOMEG, 4 * TWOMEG, 8 * TWOMEG, 128 * TWOMEG):
        for advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
            yield from migration_benchmark(t, size, advice)


def migration_benchmark(t: Fixture, size: int, advice: int, iterations: int = 5) -> Program:
    p, npages = t.process, size // PAGE
    buffer = yield from t.buffer(size)
    buffer.mirror[:] = 0xFF
    assert (yield from p.madvise(buffer.ptr, size, advice)) == 0
    stamps = np.arange(npages, dtype=np.uint64) & np.uint64(0xFF)
    yield from p.store_stamps(buffer.ptr, stamps)
    for _ in range(1 + iterations):  # the first one warms up
        assert (yield from t.migrate_sys_to_dev(t.fd, buffer, npages)) == 0
        assert (yield from t.migrate_dev_to_sys(t.fd, buffer, npages)) == 0
    assert np.array_equal((yield from p.load_stamps(buffer.ptr, npages)), stamps)
    yield from t.free(buffer)
