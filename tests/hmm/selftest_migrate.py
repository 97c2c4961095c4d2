"""Cases 12 to 17, 21 and 23 to 28 of hmm-tests.c @ 7.0: migration, snapshots, exclusive access, GUP and COW of device pages."""

from __future__ import annotations

import errno

import numpy as np
from hmm.harness import (
    GUP_BASIC_TEST,
    GUP_FAST_BENCHMARK,
    HMM_BUFFER_SIZE,
    NTIMES,
    PIN_FAST_BENCHMARK,
    PIN_LONGTERM_BENCHMARK,
    RW,
    Fixture,
    Process,
    Program,
    case,
    counting,
)

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
    HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
    HMM_DMIRROR_PROT_ERROR,
    HMM_DMIRROR_PROT_NONE,
    HMM_DMIRROR_PROT_READ,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_PROT_ZERO,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_RELEASE,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
)
from kit.memory.types import FOLL_LONGTERM, MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGE, PROT_NONE, PROT_READ

ALL = HMM_BUFFER_SIZE // PAGE  # 1024 pages


@case("hmm")
def migrate(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    yield from t.migrated(buffer, data)


@case("hmm")
def migrate_file_private(t: Fixture) -> Program:
    """Added after 7.0: the anonymous pages of a private file mapping migrate."""
    p, file = t.process, t.create_file(HMM_BUFFER_SIZE)
    buffer = yield from t.buffer(flags=MAP_PRIVATE, file=file)
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    yield from t.migrated(buffer, data)


@case("hmm")
def migrate_fault(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    yield from t.migrated(buffer, data)
    half = len(data) // 2
    assert np.array_equal((yield from p.read_ints(buffer.ptr, half)), data[:half])
    yield from t.migrated(buffer, data)


@case("hmm")
def migrate_release(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer())
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    yield from t.migrated(buffer, data)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_RELEASE, buffer, ALL)) == 0
    half = len(data) // 2
    assert np.array_equal((yield from p.read_ints(buffer.ptr, half)), data[:half])


@case("hmm")
def migrate_shared(t: Fixture) -> Program:
    buffer = yield from t.buffer(flags=MAP_SHARED | MAP_ANONYMOUS)
    assert (yield from t.migrate_sys_to_dev(t.fd, buffer, ALL)) == -errno.ENOENT


@case("hmm2")
def migrate_mixed(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(6 * PAGE, prot=PROT_NONE))
    start = buffer.ptr
    assert (yield from t.migrate_sys_to_dev(t.fd1, buffer, 6)) == -errno.EINVAL  # protected
    assert (yield from p.munmap(start + PAGE, PAGE)) == 0
    assert (yield from t.migrate_sys_to_dev(t.fd1, buffer, 3)) == -errno.EINVAL
    val = yield from mixed_pages(p, start, 2)  # pages 4 and 5 are read-write
    yield from p.write_ints(start + 5 * PAGE, [val])
    buffer.ptr = start + 2 * PAGE
    assert (yield from t.migrate_sys_to_dev(t.fd1, buffer, 4)) == 0
    assert buffer.cpages == 4
    buffer.ptr = start + 5 * PAGE  # is on device 1
    assert (yield from t.migrate_sys_to_dev(t.fd0, buffer, 1)) == -errno.ENOENT
    buffer.ptr = start


def mixed_pages(p: Process, start: int, writable: int) -> Program:
    """Make page 2 a read-only zero page, page 3 read-only, and `writable` pages from page 4 read-write; return what was written."""
    assert (yield from p.mprotect(start + 2 * PAGE, PAGE, PROT_READ)) == 0
    val = int((yield from p.read_ints(start + 2 * PAGE, 1))[0]) + 3
    assert val == 3
    assert (yield from p.mprotect(start + 3 * PAGE, PAGE, RW)) == 0
    yield from p.write_ints(start + 3 * PAGE, [val])
    assert (yield from p.mprotect(start + 3 * PAGE, PAGE, PROT_READ)) == 0
    assert (yield from p.mprotect(start + 4 * PAGE, writable * PAGE, RW)) == 0
    yield from p.write_ints(start + 4 * PAGE, [val])
    return val


@case("hmm")
def migrate_multiple(t: Fixture) -> Program:
    p = t.process
    for _ in range(NTIMES):
        buffer = yield from t.buffer()
        data = counting(buffer.size)
        yield from p.write_ints(buffer.ptr, data)
        yield from t.migrated(buffer, data)
        if t.coherent:
            assert (yield from t.migrate_dev_to_sys(t.fd, buffer, ALL)) == 0
            assert buffer.cpages == ALL
        assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)
        yield from t.free(buffer)


@case("hmm2")
def snapshot(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(7 * PAGE, prot=PROT_NONE))
    start = buffer.ptr
    assert (yield from p.munmap(start + PAGE, PAGE)) == 0
    yield from mixed_pages(p, start, 3)
    for page, fd in ((5, t.fd0), (6, t.fd1)):
        buffer.ptr = start + page * PAGE
        assert (yield from t.migrate_sys_to_dev(fd, buffer, 1)) == 0
        assert buffer.cpages == 1
    buffer.ptr = start
    assert (yield from p.ioctl(t.fd0, HMM_DMIRROR_SNAPSHOT, buffer, 7)) == 0
    assert buffer.cpages == 7
    if t.coherent:
        here = HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL | HMM_DMIRROR_PROT_WRITE
        there = HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE | HMM_DMIRROR_PROT_WRITE
    else:
        here = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE
        there = HMM_DMIRROR_PROT_NONE
    assert list(buffer.mirror[:7]) == [
        HMM_DMIRROR_PROT_ERROR, HMM_DMIRROR_PROT_ERROR, HMM_DMIRROR_PROT_ZERO | HMM_DMIRROR_PROT_READ,
        HMM_DMIRROR_PROT_READ, HMM_DMIRROR_PROT_WRITE, here, there,
    ]  # fmt: skip


@case("hmm2")
def double_map(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(6 * PAGE))
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_READ)) == 0
    for fd in (t.fd0, t.fd1):
        yield from device_reads(t, fd, buffer, data)
    assert (yield from t.migrate_sys_to_dev(t.fd1, buffer, 6)) == 0
    assert buffer.cpages == 6
    yield from device_reads(t, t.fd0, buffer, data)


def device_reads(t: Fixture, fd: object, buffer: object, data: object) -> Program:
    buffer.mirror[:] = 0xFF
    assert (yield from t.process.ioctl(fd, HMM_DMIRROR_READ, buffer, 6)) == 0
    assert (buffer.cpages, buffer.faults) == (6, 1)
    assert np.array_equal(buffer.ints, data)


@case("hmm")
def exclusive(t: Fixture) -> Program:
    p, buffer, data = t.process, *(yield from made_exclusive(t))
    assert np.array_equal(buffer.ints, data)
    yield from p.increment_ints(buffer.ptr, data)
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data + 1)
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, ALL)) == 0


def made_exclusive(t: Fixture) -> Program:
    buffer = yield from t.buffer()
    data = counting(buffer.size)
    yield from t.process.write_ints(buffer.ptr, data)
    assert (yield from t.process.ioctl(t.fd, HMM_DMIRROR_EXCLUSIVE, buffer, ALL)) == 0
    assert buffer.cpages == ALL
    return buffer, data


@case("hmm")
def exclusive_mprotect(t: Fixture) -> Program:
    p, buffer, data = t.process, *(yield from made_exclusive(t))
    assert np.array_equal(buffer.ints, data)
    assert (yield from p.mprotect(buffer.ptr, buffer.size, PROT_READ)) == 0
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_WRITE, buffer, ALL)) == -errno.EPERM


@case("hmm")
def exclusive_cow(t: Fixture) -> Program:
    p, buffer, data = t.process, *(yield from made_exclusive(t))

    def program(q: Process) -> Program:
        yield from q.increment_ints(buffer.ptr, data)
        assert np.array_equal((yield from q.read_ints(buffer.ptr, len(data))), data + 1)

    child = yield from p.fork(program)
    yield from program(p)
    assert (yield from p.waitpid(child)) == "exited"


@case("hmm")
def hmm_gup_test(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(4 * PAGE))
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    yield from t.migrated(buffer, data)
    assert (yield from p.gup_test(buffer.ptr, GUP_BASIC_TEST, 1, 0)) == 0
    assert (yield from p.gup_test(buffer.ptr + PAGE, GUP_FAST_BENCHMARK, 1, 0)) == 0
    assert (yield from p.gup_test(buffer.ptr + 2 * PAGE, PIN_FAST_BENCHMARK, 1, FOLL_LONGTERM)) == 0
    assert (yield from p.gup_test(buffer.ptr + 3 * PAGE, PIN_LONGTERM_BENCHMARK, 1, 0)) == 0
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, 4)) == 0
    assert buffer.cpages == 4
    taken = HMM_DMIRROR_PROT_WRITE | (HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL if t.coherent else 0)
    assert list(buffer.mirror[:4]) == [taken, taken, HMM_DMIRROR_PROT_WRITE, HMM_DMIRROR_PROT_WRITE]
    assert np.array_equal((yield from p.read_ints(buffer.ptr, len(data))), data)


@case("hmm")
def hmm_cow_in_device(t: Fixture) -> Program:
    p, buffer = t.process, (yield from t.buffer(4 * PAGE))
    data = counting(buffer.size)
    yield from p.write_ints(buffer.ptr, data)
    assert (yield from t.migrate_sys_to_dev(t.fd, buffer, 4)) == 0
    assert buffer.cpages == 4
    child = yield from p.fork(Process.pause)
    yield from p.write_ints(buffer.ptr, data)
    yield from p.kill(child)
    assert (yield from p.waitpid(child)) == "killed"
    assert (yield from p.ioctl(t.fd, HMM_DMIRROR_SNAPSHOT, buffer, 4)) == 0
    assert buffer.cpages == 4
    assert list(buffer.mirror[:4]) == [HMM_DMIRROR_PROT_WRITE] * 4
