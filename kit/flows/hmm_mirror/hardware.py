"""The machine of a session: host memory, and a device whose memory may be smaller than the structure."""

from __future__ import annotations

from kit.drivers.dmirror_limited import LimitedDevice
from kit.drivers.dmirror_types import HMM_DMIRROR_MEMORY_DEVICE_COHERENT, HMM_DMIRROR_MEMORY_DEVICE_PRIVATE
from kit.errors import ParameterError
from kit.flows.hmm_mirror.parameters import HUGE, HmmParameters
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.types import PAGE
from kit.sim.engine import Engine
from kit.sim.machine import Machine

__all__ = ["device_frames", "device_pages", "host_pages", "make_device", "make_memory"]


def host_pages(parameters: HmmParameters, machine: Machine) -> int:
    """Return the pages of host memory.

    Raises
    ------
    ParameterError
        The structure, its copies and the children's need more than there is.
    """
    host = int(machine["host_memory_bytes"]) // PAGE
    if 4 * parameters.pages > host:
        raise ParameterError("bytes", parameters.bytes, f"at most a quarter of host memory, {host * PAGE // 4}")
    return host


def device_pages(parameters: HmmParameters, machine: Machine) -> int:
    """Return how many pages the device holds: the machine's, what was asked for, or what `oversubscription` leaves.

    Raises
    ------
    ParameterError
        Not one page would be left.
    """
    p = parameters
    pages = (p.device_memory_bytes or int(machine["device_memory_bytes"])) // PAGE
    if p.oversubscription:
        pages = int(p.pages / p.oversubscription)
    if pages < 1:
        raise ParameterError("oversubscription", p.oversubscription, "a share that leaves a page of device memory")
    return pages


def device_frames(parameters: HmmParameters, capacity: int) -> int:
    """Return the frames of one chunk of device memory.

    A private device needs more than it can hold: a page whose content the driver keeps elsewhere has its frame still.
    """
    p = parameters
    if p.device_type != "private":
        return capacity
    return -(-(min(capacity, p.pages) + p.pages + HUGE // PAGE) // 512) * 512


def make_memory(engine: Engine, machine: Machine, parameters: HmmParameters) -> PhysicalMemory:
    """Return host and device memory, and a swap device that the structure fits on."""
    p, host = parameters, host_pages(parameters, machine)
    chunks = 2 if p.device_type == "private" and p.thp else 1  # one of single pages, one of huge ones
    frames = device_frames(p, device_pages(p, machine))
    return PhysicalMemory(engine, host, chunks * frames, p.payload_bytes, swap_slots=p.pages)


def make_device(memory: PhysicalMemory, machine: Machine, parameters: HmmParameters) -> LimitedDevice:
    """Return the mirroring device, with the machine's costs and copy speeds."""
    p, curves, capacity = parameters, machine.curves, device_pages(parameters, machine)
    private = p.device_type == "private"
    return LimitedDevice(
        memory,
        HMM_DMIRROR_MEMORY_DEVICE_PRIVATE if private else HMM_DMIRROR_MEMORY_DEVICE_COHERENT,
        {name: machine[name] for name in ("ioctl", "device_pte", "dma_map", "devmem_alloc")},
        lambda nbytes, out: curves["copy_htod" if out else "copy_dtoh"](nbytes),
        capacity, p.eviction, p.evict_pages, device_frames(p, capacity),
    )  # fmt: skip
