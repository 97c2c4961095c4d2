"""Cases 1 to 11, 18 to 20 and 22 of tools/testing/selftests/mm/hmm-tests.c @ 7.0: a device reads and writes system memory."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
from hmm.harness import HMM_BUFFER_SIZE, NTIMES, TWOMEG, Buffer, Fixture, Process, Program, case, counting

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_PROT_PMD,
    HMM_DMIRROR_PROT_READ,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
)
from kit.memory.types import (
    MADV_HUGEPAGE,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)

ALL = HMM_BUFFER_SIZE // PAGE  # 1024 pages
PAGE_INTS = PAGE // 4


@case("hmm")
def open_close(t: Fixture) -> Program:
    """The device opens and closes: the fixture does both, and counts what is left."""
    assert t.fd is not None
    yield from ()


@case("hmm")
def anon_read(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = counting(buffer.size)
    data[: 2 * PAGE_INTS] = 0
    yield from p.write_ints(buffer.ptr + 2 * PAGE, data[2 * PAGE_INTS :])
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_READ)) == 0
    assert (yield from p.read_ints(buffer.ptr + PAGE, 1))[0] == 0  # the zero page
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, ALL)) == 0
    assert (buffer.cpages, buffer.faults) == (ALL, 1)
    assert np.array_equal(buffer.ints, data)


@case("hmm")
def anon_read_prot(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    buffer.ints[:] = -data
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_NONE)) == 0
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, ALL)) == -errno.EFAULT
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_READ)) == 0
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)
    assert np.array_equal(buffer.ints, -data)


@case("hmm")
def anon_write(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = buffer.ints[:] = counting(buffer.size)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, ALL)) == 0
    assert (buffer.cpages, buffer.faults) == (ALL, 1)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)


@case("hmm")
def anon_write_prot(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(prot=PROT_READ))
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, 1)) == 0
    assert (buffer.cpages, buffer.faults) == (1, 1)
    data = buffer.ints[:] = counting(buffer.size)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, ALL)) == -errno.EPERM
    assert not (yield from p.read_ints(buffer.ptr, len(data))).any()
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_WRITE | PROT_READ)) == 0
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, ALL)) == 0
    assert (buffer.cpages, buffer.faults) == (ALL, 1)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)


def child_of_anon_write(buffer: Buffer, data: np.ndarray, npages: int, migrated: bool) -> Callable[[Process], Program]:
    """Return what the child of `anon_write_child` does with its copy of the buffer."""

    def program(child: Process) -> Program:
        theirs = buffer.copy()
        assert np.array_equal((yield from child.read_ints(theirs.ptr, len(data))), data)
        if not migrated:
            assert np.array_equal(theirs.ints, -data)
        fd = yield from child.open(0)
        assert (yield from child.ioctl(fd, HMM_DMIRROR_WRITE, theirs, npages)) == 0
        assert (theirs.cpages, theirs.faults) == (npages, 1)
        if not migrated:
            assert np.array_equal((yield from child.read_ints(theirs.ptr, len(data))), -data)
        yield from child.close(fd)

    return program


@case("hmm")
def anon_write_child(t: Fixture) -> Program:
    p = t.process
    for migrate in (False, True):
        for use_thp in (False, True):
            if use_thp:
                buffer = yield from t.huge_buffer()
                assert (yield from p.madvise(buffer.ptr, TWOMEG, MADV_HUGEPAGE)) == 0
            else:
                buffer = yield from t.buffer()
            npages = buffer.mirror.size // PAGE
            data = counting(buffer.mirror.size)
            yield from p.write_ints(buffer.ptr, data)
            buffer.ints[:] = -data
            if migrate:
                assert (yield from t.migrate_sys_to_dev(t.fd, buffer, npages)) == 0
                assert buffer.cpages == npages

            child = yield from p.fork(child_of_anon_write(buffer, data, npages, migrate))
            assert (yield from p.waitpid(child)) == "exited"
            assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)
            yield from t.free(buffer)


@case("hmm")
def anon_write_child_shared(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(flags=MAP_SHARED | MAP_ANONYMOUS))
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    buffer.ints[:] = -data

    def program(child: Process) -> Program:
        theirs = buffer.copy()
        assert np.array_equal((yield from child.read_ints(theirs.ptr, len(data))), data)
        assert np.array_equal(theirs.ints, -data)
        fd = yield from child.open(0)
        assert (yield from child.ioctl(fd, HMM_DMIRROR_WRITE, theirs, ALL)) == 0
        assert (theirs.cpages, theirs.faults) == (ALL, 1)
        assert np.array_equal((yield from child.read_ints(theirs.ptr, len(data))), -data)
        yield from child.close(fd)

    child = yield from p.fork(program)
    assert (yield from p.waitpid(child)) == "exited"
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), -data)


@case("hmm")
def anon_write_huge(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.huge_buffer())
    npages = TWOMEG // PAGE
    assert (yield from p.madvise(buffer.ptr, TWOMEG, MADV_HUGEPAGE)) == 0
    data = buffer.ints[:] = counting(TWOMEG)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, npages)) == 0
    assert (buffer.cpages, buffer.faults) == (npages, 1)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)


@case("hmm")
def anon_write_hugetlbfs(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(TWOMEG, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB))
    npages = TWOMEG // PAGE
    data = buffer.ints[:] = counting(TWOMEG)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, npages)) == 0
    assert (buffer.cpages, buffer.faults) == (npages, 1)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)


@case("hmm")
def file_read(t: Fixture) -> Program:
    p, file = t.process, t.create_file(HMM_BUFFER_SIZE)
    data = counting(HMM_BUFFER_SIZE)
    assert (yield from p.pwrite(file, data.view(np.uint8), 0)) == HMM_BUFFER_SIZE
    buffer = yield from t.buffer(prot=PROT_READ, flags=MAP_SHARED, file=file)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, ALL)) == 0
    assert (buffer.cpages, buffer.faults) == (ALL, 1)
    assert np.array_equal(buffer.ints, data)


@case("hmm")
def file_write(t: Fixture) -> Program:
    p, file = t.process, t.create_file(HMM_BUFFER_SIZE)
    buffer = yield from t.buffer(flags=MAP_SHARED, file=file)
    data = counting(HMM_BUFFER_SIZE)
    buffer.ints[:] = data
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, ALL)) == 0
    assert (buffer.cpages, buffer.faults) == (ALL, 1)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)
    assert np.array_equal((yield from p.pread(file, HMM_BUFFER_SIZE, 0)).view(np.int32), data)


@case("hmm")
def anon_read_multiple(t: Fixture) -> Program:
    p = t.process
    for c in range(NTIMES):
        buffer = yield from t.buffer()
        data = counting(buffer.size) + c
        yield from p.write_ints(buffer.ptr, data)
        assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, ALL)) == 0
        assert (buffer.cpages, buffer.faults) == (ALL, 1)
        assert np.array_equal(buffer.ints, data)
        yield from t.free(buffer)


@case("hmm")
def anon_teardown(t: Fixture) -> Program:
    p = t.process
    for c in range(NTIMES):
        buffer = yield from t.buffer()
        data = counting(buffer.size) + c
        yield from p.write_ints(buffer.ptr, data)

        def unmap_buffer(q: Process, buffer: Buffer = buffer) -> Program:
            yield from q.sleep(t.random.integers(32000) / 1000)  # up to 32 us
            assert (yield from q.munmap(buffer.ptr + buffer.size // 2, buffer.size // 2)) == 0

        thread = p.pthread_create(unmap_buffer)
        if (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, ALL)) == 0:
            assert (buffer.cpages, buffer.faults) == (ALL, 1)
            assert np.array_equal(buffer.ints, data)
        yield from p.join(thread)
        yield from t.free(buffer)


@case("hmm")
def mixedmap(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(PAGE, flags=MAP_PRIVATE, file=t.fd))
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, 1)) == 0
    assert buffer.cpages == 1
    assert buffer.mirror[0] == HMM_DMIRROR_PROT_READ


@case("hmm")
def compound(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(TWOMEG, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB))
    npages = TWOMEG // PAGE
    yield from p.write_ints(buffer.ptr, counting(TWOMEG))
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, npages)) == 0
    assert buffer.cpages == npages
    assert (buffer.mirror[:npages] == HMM_DMIRROR_PROT_WRITE | HMM_DMIRROR_PROT_PMD).all()
    assert (yield from p.mprotect(buffer.ptr, TWOMEG, PROT_READ)) == 0
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, npages)) == 0
    assert buffer.cpages == npages
    assert (buffer.mirror[:npages] == HMM_DMIRROR_PROT_READ | HMM_DMIRROR_PROT_PMD).all()
