"""Metrics and the content check of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.flows.metrics import SpanColumns, conformance_metrics, integrity_metrics, time_metrics
from kit.flows.run import Integrity
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.types import PAGE, Kind

if TYPE_CHECKING:
    from kit.flows.documented import Conformance
    from kit.flows.hmm_mirror.session import HmmSession

__all__ = ["content", "metrics"]


def content(session: HmmSession) -> Integrity:
    """Compare every page with what was last written to it, wherever it is, without touching it."""
    s, table, memory = session, session.mm.table, session.memory
    slots = table.slots_of(s.base // PAGE + np.arange(s.parameters.pages))
    kind, frame = table.kind[slots], table.frame[slots].astype(np.int64)
    held = np.zeros(len(slots), dtype=np.uint64)
    there = (kind == Kind.PRESENT) | (kind == Kind.DEVICE_PRIVATE)
    held[there] = memory.payload[s.device.backing(frame[there]), 0]
    swapped = kind == Kind.SWAP
    held[swapped] = memory.swap.payload[frame[swapped], 0]
    wrong = int((held != s.expected).sum())
    return Integrity(s.parameters.pages + s.record.compared, wrong + s.record.differed)


def metrics(session: HmmSession, conformance: Conformance, checked: Integrity) -> dict[str, float]:
    """Return flat names and numbers: counted in the trace, and in what the session compared and was told."""
    s, trace, spans = session, session.engine.trace, SpanColumns(session.engine.trace)
    found = {**time_metrics(s), **_fault_metrics(s, spans), **_copy_metrics(s, spans)}
    found["pointers_rewritten"] = s.record.rewritten
    found["visits_local"], found["visits_remote"] = s.record.near, s.record.far
    found["device_writes"], found["cpu_writes"] = s.record.device_writes, s.record.cpu_writes
    found.update(_notifier_metrics(spans))
    found["device_used_pages"] = s.device.used
    found.update(conformance_metrics(trace, conformance))
    found["words_compared"] = s.record.compared
    return {**found, **integrity_metrics(checked)}


def _fault_metrics(session: HmmSession, spans: SpanColumns) -> dict[str, float]:
    """Count faults of both processors, and the pages that they brought into the mirror or moved."""
    s, stalls = session, spans.of("device_stall")
    device_faults, range_faults = int(stalls.sum()), spans.count("hmm_range_fault")
    found: dict[str, float] = {
        "faults": device_faults + s.mm.faults, "device_faults": device_faults, "cpu_faults": s.mm.faults,
        "device_stalled_us": float(spans.duration[stalls].sum()),
        "faults_home": spans.count("dmirror_devmem_fault"),
        "hmm_range_faults": range_faults,
        "range_retries": range_faults - spans.count("dmirror_do_fault"),
    }  # fmt: skip
    done = [each for each in s.record.commands if each.result == "0"]
    mirrored = [each.cpages for each in done if each.name in ("HMM_DMIRROR_READ", "HMM_DMIRROR_WRITE")]
    found["mirrored_pages"] = sum(mirrored)
    for name, count in s.record.counts.items():
        found[f"migrate_{name}_pages"] = count
    found["evicted_pages"], found["handed_over_pages"] = s.device.evicted_pages, s.device.handed_over
    return found


def _copy_metrics(session: HmmSession, spans: SpanColumns) -> dict[str, float]:
    """Count copies by the device's engines, by direction, and the bytes that the walk without HMM copied."""
    found: dict[str, float] = {}
    copies, duration = spans.of("device_copy"), spans.duration
    for way in ("HtoD", "DtoH"):
        which, key = copies & spans.by(f"copy {way}"), way.lower()
        found[f"{key}_copies"], found[f"{key}_bytes"] = spans.total("value", which), spans.total("bytes", which)
        found[f"{key}_us"] = float(duration[which].sum())
    found["explicit_bytes"] = spans.total("bytes", copies & spans.because("explicit"))
    found["bytes_moved"] = spans.total("bytes", copies)
    return found


def _notifier_metrics(spans: SpanColumns) -> dict[str, float]:
    """Count invalidations by their reason, and what they took from the mirror."""
    starts, drops = spans.of("mmu_notifier_invalidate_range_start"), spans.of("dmirror_interval_invalidate")
    found: dict[str, float] = {
        f"notifier_{event.name.lower()}": int((starts & spans.because(event.name)).sum()) for event in EVENTS
    }
    found["notifier_release"] = spans.count("mmu_notifier_release")
    found["mirror_invalidations"], found["mirror_entries_dropped"] = int(drops.sum()), spans.total("pages", drops)
    return found
