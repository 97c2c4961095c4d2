"""The HMM test driver: commands, what they leave behind, and that a fault and an invalidation really collide."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOENT, EPERM

import numpy as np
import pytest

from kit.drivers import dmirror_types as driver
from kit.drivers.dmirror import dmirror_device_init, dmirror_fops_open, dmirror_fops_release
from kit.drivers.dmirror_ioctl import dmirror_fops_unlocked_ioctl
from kit.drivers.dmirror_types import DmirrorDevice, HmmDmirrorCmd
from kit.memory.costs import COSTS, make_costs
from kit.memory.faults.load_store import load, store
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.memory.syscalls.exit import exit_mmap
from kit.memory.syscalls.mmap import mmap, mprotect, munmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE, Kind
from kit.sim.engine import Engine

RW, ANON = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
READ, WRITE, TO_DEV, TO_SYS = (
    driver.HMM_DMIRROR_READ, driver.HMM_DMIRROR_WRITE, driver.HMM_DMIRROR_MIGRATE_TO_DEV, driver.HMM_DMIRROR_MIGRATE_TO_SYS,
)  # fmt: skip
MODEL = dict.fromkeys(COSTS, 0.5)


class World:
    """One process with one open private device; ``self.run`` runs programs to their end."""

    def __init__(self, kind=driver.HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, costs=None, device_costs=None, payload=8):
        self.engine = Engine()
        self.memory = PhysicalMemory(self.engine, 8192, 1 << 16, payload_bytes=payload)
        self.mm = Mm(self.memory, self.engine, make_costs(costs))
        self.t = self.engine.thread("main")
        self.device = DmirrorDevice(self.memory, 0, kind, device_costs, chunk_pages=4096)
        assert dmirror_device_init(self.device, self.t) == 0
        self.d = self.run(dmirror_fops_open(self.device, self.t, self.mm))

    def run(self, *programs):
        done = [self.engine.start(p) for p in programs]
        self.engine.run()
        assert all(p.triggered for p in done), "somebody waits for ever"
        return done[0].value if len(done) == 1 else [p.value for p in done]

    def map(self, pages, prot=RW, **how):
        return self.run(mmap(self.mm, self.t, pages << 12, prot, ANON, **how))

    def filled(self, pages):
        start = self.map(pages)
        self.run(store(self.mm, self.t, self.numbers(start, pages), self.stamps(start, pages)))
        return start

    def numbers(self, start, pages):
        return np.arange(start >> 12, (start >> 12) + pages)

    def stamps(self, start, pages, more=0):
        return (self.numbers(start, pages) + more).astype(np.uint64)

    def loaded(self, start, pages):
        return self.run(load(self.mm, self.t, self.numbers(start, pages)))

    def cmd(self, command, start, pages, buffer=None):
        buffer = np.zeros(max(pages, 1), dtype=np.uint64) if buffer is None else buffer
        cmd = HmmDmirrorCmd(start, buffer, pages, -1, -1)
        return self.run(dmirror_fops_unlocked_ioctl(self.d, self.t, command, cmd)), cmd

    def kinds(self, start, pages):
        return self.mm.table.kind[self.mm.table.slots_of(self.numbers(start, pages))]

    def spans(self, name):
        trace = self.engine.trace
        step = trace.spans.column("step")
        return int((step == trace.steps.ids[name]).sum()) if name in trace.steps.ids else 0


def test_read_faults_once_for_a_cold_range_and_not_for_a_mapped_one():
    world = World()
    start = world.filled(100)
    ret, cmd = world.cmd(READ, start, 100)
    assert (ret, cmd.cpages, cmd.faults) == (0, 100, 1) and (cmd.ptr == world.stamps(start, 100)).all()
    assert world.spans("dmirror_range_fault") == 4, "32 pages at a time"
    ret, cmd = world.cmd(READ, start, 100)
    assert (ret, cmd.cpages, cmd.faults) == (0, 100, 0)
    world.run(munmap(world.mm, world.t, start + (50 << 12), 4096))
    world.run(mmap(world.mm, world.t, 4096, RW, ANON | 0x10, addr=start + (50 << 12)))
    ret, cmd = world.cmd(READ, start, 100)
    assert (ret, cmd.faults) == (0, 1) and cmd.ptr[50] == 0 and world.spans("dmirror_range_fault") == 4 + 2


def test_write_reaches_the_cpu_and_needs_a_writable_area():
    world = World()
    start = world.map(40)
    ret, cmd = world.cmd(WRITE, start, 40, world.stamps(start, 40, 5))
    assert (ret, cmd.cpages, cmd.faults) == (0, 40, 1) and (world.loaded(start, 40) == world.stamps(start, 40, 5)).all()
    world.run(mprotect(world.mm, world.t, start, 40 << 12, PROT_READ))
    ret, cmd = world.cmd(WRITE, start, 40, world.stamps(start, 40, 9))
    assert (ret, cmd.cpages, cmd.faults) == (-EPERM, -1, -1), "nothing is copied back"
    assert (world.loaded(start, 40) == world.stamps(start, 40, 5)).all()
    world.run(mprotect(world.mm, world.t, start, 40 << 12, PROT_NONE))
    assert world.cmd(READ, start, 40)[0] == -EFAULT


@pytest.mark.parametrize("addr,pages", [(8, 1), (0, 0), ((1 << 64) - 4096, 2)])
def test_every_command_checks_its_range(addr, pages):
    world = World()
    for command in range(9):
        assert world.cmd(command, addr, pages)[0] == -EINVAL
    assert world.cmd(77, 4096, 1)[0] == -EINVAL


@pytest.mark.parametrize("kind", [driver.HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, driver.HMM_DMIRROR_MEMORY_DEVICE_COHERENT])
def test_to_the_device_and_home(kind):
    world = World(kind)
    start = world.filled(700)
    ret, cmd = world.cmd(TO_DEV, start, 700)
    assert (ret, cmd.cpages) == (0, 700) and (cmd.ptr == world.stamps(start, 700)).all()
    assert world.spans("migrate_vma_setup") == 2, "512 pages at a time"
    private = kind == driver.HMM_DMIRROR_MEMORY_DEVICE_PRIVATE
    assert (world.kinds(start, 700) == (Kind.DEVICE_PRIVATE if private else Kind.PRESENT)).all()
    assert world.device.calloc == 700
    ret, cmd = world.cmd(WRITE, start, 700, world.stamps(start, 700, 3))
    assert (ret, cmd.faults) == (0, 0), "the device has them in its table, writable"
    ret, cmd = world.cmd(TO_SYS, start, 700)
    assert (ret, cmd.cpages) == (0, 700) and world.device.cfree == 700
    assert (world.loaded(start, 700) == world.stamps(start, 700, 3)).all()
    assert (world.kinds(start, 700) == Kind.PRESENT).all()


def test_cpu_touch_brings_one_page_home():
    world = World()
    start = world.filled(8)
    world.cmd(TO_DEV, start, 8)
    assert world.loaded(start + 4096, 2).tolist() == world.stamps(start + 4096, 2).tolist()
    assert world.kinds(start, 8).tolist() == [4, 1, 1, 4, 4, 4, 4, 4] and world.spans("dmirror_devmem_fault") == 2
    ret, cmd = world.cmd(READ, start, 8)
    assert (ret, cmd.faults) == (0, 1), "what came home is faulted in, what is on the device is not"
    assert world.kinds(start, 8).tolist() == [4, 1, 1, 4, 4, 4, 4, 4]


def test_holes_go_to_the_device_read_only_in_its_table():
    world = World()
    start = world.map(4)
    ret, cmd = world.cmd(TO_DEV, start, 4)
    assert (ret, cmd.cpages) == (0, 4) and not cmd.ptr.any()
    ret, cmd = world.cmd(WRITE, start, 4, world.stamps(start, 4))
    assert (ret, cmd.faults) == (0, 1)
    assert (world.kinds(start, 4) == Kind.DEVICE_PRIVATE).all()
    assert (world.loaded(start, 4) == world.stamps(start, 4)).all()


def test_missing_area_stops_a_migration_and_what_moved_stays():
    world = World()
    start = world.filled(600)
    world.run(munmap(world.mm, world.t, start + (550 << 12), 4096))
    assert world.cmd(TO_DEV, start, 600)[0] == -EINVAL
    assert np.count_nonzero(world.kinds(start, 600) == Kind.DEVICE_PRIVATE) == 550


def test_failing_allocation_leaves_one_page_behind():
    world = World()
    start = world.filled(10)
    assert world.cmd(driver.HMM_DMIRROR_FLAGS, start, 1)[0] == 0
    assert world.cmd(TO_DEV, start, 10)[0] == -ENOENT, "the first page is not in the device's table"
    assert world.kinds(start, 10).tolist() == [1] + [4] * 9
    assert (world.loaded(start, 10) == world.stamps(start, 10)).all()


def test_failing_allocation_on_the_way_home_restores_the_rest():
    world = World()
    start = world.filled(4)
    world.cmd(TO_DEV, start, 4)
    world.cmd(driver.HMM_DMIRROR_FLAGS, start, 1)
    ret, cmd = world.cmd(TO_SYS, start, 4)
    assert (ret, cmd.cpages) == (0, 0) and (world.kinds(start, 4) == Kind.DEVICE_PRIVATE).all()
    ret, cmd = world.cmd(TO_SYS, start, 4)
    assert (ret, cmd.cpages) == (0, 4) and (world.loaded(start, 4) == world.stamps(start, 4)).all()


def test_release_brings_everything_home_and_the_device_begins_anew():
    world = World()
    start = world.filled(600)
    world.cmd(TO_DEV, start, 600)
    assert world.cmd(driver.HMM_DMIRROR_RELEASE, start, 1)[0] == 0
    assert world.device.devmem_chunks == [] and world.memory.pgmaps == [None, None]
    assert (world.kinds(start, 600) == Kind.PRESENT).all() and not world.d.load(start, start + (600 << 12))[0].any()
    assert (world.loaded(start, 600) == world.stamps(start, 600)).all()
    ret, cmd = world.cmd(TO_DEV, start, 600)
    assert (ret, cmd.cpages) == (0, 600) and len(world.device.devmem_chunks) == 1


def test_snapshot_bytes():
    world = World()
    start = world.map(6)
    world.run(mprotect(world.mm, world.t, start, 4096, PROT_NONE))
    world.run(munmap(world.mm, world.t, start + 4096, 4096))
    world.loaded(start + (2 << 12), 1)
    world.run(store(world.mm, world.t, world.numbers(start + (3 << 12), 1), np.ones(1, dtype=np.uint64)))
    world.cmd(TO_DEV, start + (4 << 12), 1)
    before = world.mm.table.kind.copy()
    ret, cmd = world.cmd(driver.HMM_DMIRROR_SNAPSHOT, start, 6, np.zeros(6, dtype=np.uint8))
    assert (ret, cmd.cpages, cmd.faults) == (0, 6, 0) and np.array_equal(before, world.mm.table.kind)
    assert cmd.ptr.tolist() == [0xFF, 0xFF, 0x10 | 1, 2, 0x20 | 2, 0]
    other = DmirrorDevice(world.memory, 1, chunk_pages=512)
    dmirror_device_init(other, world.t)
    world.d = world.run(dmirror_fops_open(other, world.t, world.mm))
    assert world.cmd(driver.HMM_DMIRROR_SNAPSHOT, start, 6, np.zeros(6, dtype=np.uint8))[1].ptr[4] == 0


def test_exclusive_access_ends_with_the_cpus():
    world = World()
    start = world.filled(3)
    ret, cmd = world.cmd(driver.HMM_DMIRROR_EXCLUSIVE, start, 3)
    assert (ret, cmd.cpages) == (0, 3) and (cmd.ptr == world.stamps(start, 3)).all()
    assert (world.kinds(start, 3) == Kind.DEVICE_EXCLUSIVE).all()
    assert world.cmd(driver.HMM_DMIRROR_CHECK_EXCLUSIVE, start, 3)[0] == -EPERM
    assert (world.loaded(start, 3) == world.stamps(start, 3)).all() and (world.kinds(start, 3) == Kind.PRESENT).all()
    assert world.cmd(driver.HMM_DMIRROR_CHECK_EXCLUSIVE, start, 3)[0] == 0


def test_file_of_the_device_can_be_mapped():
    world = World()
    start = world.map(2, ops=world.d)
    ret, cmd = world.cmd(driver.HMM_DMIRROR_SNAPSHOT, start, 2, np.zeros(2, dtype=np.uint8))
    assert ret == 0 and cmd.ptr.tolist() == [1, 1]
    assert world.cmd(TO_DEV, start, 2)[0] == -EINVAL, "VM_MIXEDMAP is not migrated"


def test_buffers_of_whole_pages():
    world = World(payload=4096)
    start = world.map(3)
    data = np.arange(3 * 4096, dtype=np.uint32).astype(np.uint8)
    assert world.cmd(WRITE, start, 3, data)[0] == 0
    assert (world.cmd(READ, start, 3, np.zeros(3 * 4096, dtype=np.uint8))[1].ptr == data).all()
    assert (world.memory.payload[world.d.load(start, start + 12288)[1]].reshape(-1).view(np.uint8) == data).all()


def test_invalidation_in_the_middle_of_a_fault_makes_it_start_again():
    """While hmm_range_fault is under way another thread takes the write permission away."""
    world = World(costs=MODEL, device_costs={"device_pte": 1.0, "dma_page": 1.0})
    start = world.filled(32)
    other = world.engine.thread("other")
    other.charge(world.engine.now + 20.0 - other.now)

    def protect():
        yield from other.sync()
        return (yield from mprotect(world.mm, other, start, 16 << 12, PROT_READ))

    cmd = HmmDmirrorCmd(start, world.stamps(start, 32, 8), 32)
    ret, ret2 = world.run(dmirror_fops_unlocked_ioctl(world.d, world.t, WRITE, cmd), protect())
    assert ret2 == 0 and ret in (0, -EPERM)
    rights, frames = world.d.load(start, start + (32 << 12))
    table = world.mm.table
    slots = table.slots_of(world.numbers(start, 32))
    stale = (rights == 2) & (table.bits[slots] & 1 == 0)
    assert not stale.any() and (frames[rights > 0] == table.frame[slots][rights > 0]).all()
    assert world.spans("mmu_notifier_invalidate_range_start") >= 1


@pytest.mark.parametrize("when", [1.0, 7.0, 16.0, 40.0, 90.0, 200.0, 400.0])
def test_unmap_at_any_moment_of_a_read_leaves_no_stale_entry(when):
    world = World(costs=MODEL, device_costs={"device_pte": 0.3, "dma_page": 0.4, "dma_map": 0.2})
    start = world.filled(128)
    other = world.engine.thread("other")
    other.charge(world.engine.now + when - other.now)

    def unmap():
        yield from other.sync()
        return (yield from munmap(world.mm, other, start + (64 << 12), 64 << 12))

    cmd = HmmDmirrorCmd(start, np.zeros(128, dtype=np.uint64), 128)
    ret, ret2 = world.run(dmirror_fops_unlocked_ioctl(world.d, world.t, READ, cmd), unmap())
    assert ret2 == 0
    if ret == 0:
        assert cmd.cpages == 128 and (cmd.ptr == world.stamps(start, 128)).all()
    assert not world.d.load(start + (64 << 12), start + (128 << 12))[0].any()


def test_nothing_is_left_after_exit():
    world = World()
    start = world.filled(600)
    world.cmd(TO_DEV, start, 300)
    world.cmd(READ, start, 600)
    world.cmd(driver.HMM_DMIRROR_EXCLUSIVE, start + (400 << 12), 5)
    world.run(dmirror_fops_release(world.d, world.t))
    world.run(exit_mmap(world.mm, world.t))
    assert np.count_nonzero(world.memory.refcount) == 1 and world.device.calloc == world.device.cfree
    assert not world.memory.mapcount.any() and not any(world.mm.rss.values())
