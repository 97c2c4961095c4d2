"""Which tables hold a page: the layers between an address and a frame, side by side over the address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, Pages, spans_of
from kit.report.language import (
    BLUE,
    GREEN,
    GRID,
    ORANGE,
    PURPLE,
    SKY,
    bytes_unit,
    say_bytes,
    say_count,
    style,
)

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["LAYERS", "address_layers", "layer_pages"]

LAYERS = {
    "CPU page table": BLUE,
    "pfn_list": SKY,
    "dma_list": PURPLE,
    "hardware MTT": ORANGE,
    "hardware KSM": GREEN,
}
_STEPS = {
    "pfn_list": "pfn_list",
    "dma_list": "dma_list",
    "hardware_mtt": "hardware MTT",
    "hardware_ksm": "hardware KSM",
}
_CELLS = 1000


def address_layers(run: Run, stage: str = "") -> Figure:
    """Draw which pages each layer of the translation holds at the end of a stage, or of the run so far.

    From the top: what the CPU's page table maps, what the driver has noted (page frames, DMA addresses), what
    the adapter may use (MTT entries), and which gigabytes of an implicit region have a child (KSM slots).
    """
    held, moment = layer_pages(run, stage)
    pages = Pages.of(run)
    if not any(len(runs) for runs in held.values()):
        return nothing(
            "address_layers", "No page table holds anything of these areas: neither the CPU's nor the adapter's."
        )
    size = bytes_unit(pages.total * 4096)
    with style():
        drawn = canvas(250)
        axes = drawn.subplots()
        for row, (name, colour) in enumerate(LAYERS.items()):
            share = _shares(pages, held[name])
            rgba = np.zeros((1, _CELLS, 4))
            rgba[0, :, :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            rgba[0, :, 3] = np.where(share > 0, np.maximum(share, 0.2), 0)
            extent = (0, pages.total * 4096 / size.size, row + 0.4, row - 0.4)
            axes.imshow(rgba, extent=extent, aspect="auto", interpolation="nearest", zorder=2)
            axes.axhline(row + 0.5, color=GRID, linewidth=0.8)
        _name_areas(axes, pages, size.size)
        axes.set_yticks(range(len(LAYERS)), list(LAYERS))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(LAYERS) - 0.5, -0.5)
        axes.set_xlim(0, pages.total * 4096 / size.size)
        axes.set_xlabel(f"address, areas laid end to end ({size.word})")
        axes.set_title(f"Who knows which page, at the end of {moment}", pad=18)
        caption = (
            "Each row is one table; a coloured cell is an entry that is present. The adapter can write a page only "
            "where the lower rows are filled, and they may only be filled where the CPU's page table is. Only the "
            "pfn_list may say more: it keeps the last answer that the kernel gave."
        )
        return finish(drawn, "address_layers", caption, _words(held, moment))


def layer_pages(run: Run, stage: str = "") -> tuple[dict[str, NDArray[np.int64]], str]:
    """Return for each layer its runs of pages (first page, pages), shape (runs, 2), and the stage's name."""
    stages = [s for s in run.stages if not stage or s[0] == stage]
    name, _start, end = stages[-1] if stages else ("the run", 0.0, float("inf"))
    table = run.trace.spans.array()
    states = spans_of(run.trace, table, tuple(_STEPS))
    if stages:  # what the tables held was written down when the stage ended
        states = states[states[:, COLUMN["start"]] == end]
    held = {layer: np.empty((0, 2), dtype=np.int64) for layer in LAYERS}
    words = run.trace.steps.words
    for step, layer in _STEPS.items():
        rows = states[states[:, COLUMN["step"]] == run.trace.steps.ids.get(step, -1)] if step in words else states[:0]
        runs = np.stack([rows[:, COLUMN["va"]] // 4096, rows[:, COLUMN["pages"]]], axis=1).astype(np.int64)
        held[layer] = np.unique(runs, axis=0)  # stages that end at one moment have written the same twice
    held["CPU page table"] = _resident(run, end)
    return held, name.replace("_", " ")


def _resident(run: Run, end: float) -> NDArray[np.int64]:
    """Return the runs of pages that are in host memory at `end`; no page table names those of a dma-buf."""
    found = []
    if run.parameters.get("mover") == "dma_buf":
        return np.zeros((0, 2), dtype=np.int64)
    for area in run.allocations:
        first, count = area.va // 4096, -(-area.bytes // 4096)
        here = (run.trace.residency_at(end, first, count) & 1).astype(bool) if count <= 1 << 22 else np.zeros(1, bool)
        edge = np.flatnonzero(np.diff(np.concatenate(([0], here.astype(np.int8), [0]))))
        found.append(np.stack([edge[::2] + first, edge[1::2] - edge[::2]], axis=1))
    return np.concatenate(found).astype(np.int64) if found else np.empty((0, 2), dtype=np.int64)


def _shares(pages: Pages, runs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each cell that the runs cover."""
    steps = np.zeros(_CELLS + 2)
    for sign, at in ((1.0, runs[:, 0]), (-1.0, runs[:, 0] + runs[:, 1])):
        place = pages.position(at.astype(np.float64)) / pages.total * _CELLS
        cell = place.astype(np.int64)
        np.add.at(steps, cell, sign * (1 - (place - cell)))
        np.add.at(steps, cell + 1, sign * (place - cell))
    return np.clip(np.cumsum(steps)[:_CELLS], 0.0, 1.0)


def _name_areas(axes: Any, pages: Pages, size: float) -> None:
    edges = np.concatenate(([0], np.cumsum(pages.counts))) * 4096 / size
    if len(pages.names) > 16:
        return
    for name, left in zip(pages.names, edges[:-1], strict=True):
        if left:
            axes.axvline(left, color="black", linewidth=0.9)
        axes.annotate(name, (left, -0.5), xytext=(3, 3), textcoords="offset points", fontsize=8.5, va="bottom")


def _words(held: dict[str, NDArray[np.int64]], moment: str) -> str:
    parts = []
    for name in LAYERS:
        runs = held[name]
        if name == "hardware KSM":
            parts.append(f"{say_count(len(runs), 'KSM slot')} with a child")
        else:
            parts.append(f"{name} {say_bytes(int(runs[:, 1].sum()) * 4096)} in {say_count(len(runs), 'run')}")
    return f"At the end of {moment}: " + "; ".join(parts) + "."
