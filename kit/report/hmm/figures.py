"""Pictures of the HMM flow: both page tables, the arrays of a migration phase by phase, sequence numbers over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, spans_of, window_of
from kit.report.language import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    say_count,
    say_time,
    style,
    time_unit,
)  # fmt: skip

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["migration_phases", "page_tables", "sequence_numbers"]

# What an entry of the CPU's page table can be, by its code in `Tables.cpu`; read-only and writable pages differ.
_EMPTY, _READ, _WRITE = ("no entry", "#ebebee"), ("present, read-only", SKY), ("present, writable", BLUE)
_CPU = {
    0: _EMPTY, 2: ("swap entry", YELLOW), 3: ("migration entry", ORANGE), 4: ("device-private entry", GREEN),
    5: ("device-exclusive entry", PURPLE), 8: ("zero page", "#c9dff0"), 9: ("present, in device memory", "#7fceb5"),
}  # fmt: skip
_KEPT = ("device-private entry, content kept in a system page", "#b5a642")
_DEVICE = (
    ("no entry", "#ebebee"), ("reads host memory", SKY), ("reads and writes host memory", BLUE),
    ("reads device memory", "#7fceb5"), ("reads and writes device memory", GREEN), ("atomic", PURPLE),
)  # fmt: skip
_PHASES = (("setup", "after setup"), ("driver", "after the driver's copy"), ("pages", "after pages"))
_WORDS = ("nothing", "MIGRATE, a hole to fill", "VALID, may stay", "VALID and MIGRATE", "VALID, MIGRATE, WRITE")
_COLOURS = ("#ebebee", YELLOW, VERMILION, SKY, BLUE)
_ROWS = 512


def page_tables(run: Run, stage: str = "") -> Figure:
    """Draw both page tables side by side, at the end of each stage: the CPU's and the device's, one row a page."""
    tables = [t for t in run.views.get("tables", ()) if t.stage not in ("teardown", "without_hmm")]
    tables = [t for t in tables if not stage or t.stage == stage]
    if not tables:
        return nothing("page_tables", "No stage has ended yet, so there is no page table to show.")
    seen: dict[str, str] = {}
    across: dict[str, str] = {}
    with style():
        drawn = canvas(450)
        grid = drawn.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        for axes, each in zip(grid, tables, strict=True):
            pages = len(each.cpu)
            image = np.ones((pages, 9, 3))
            image[:, :4] = _coloured(_cpu_words(each), seen)[:, None]
            image[:, 5:] = _coloured(_device_words(each), across)[:, None]
            axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, 9, pages * run.views["per_page"], 0))
            axes.set_xticks([2, 7], ["CPU", "device"])
            axes.tick_params(axis="x", length=0)
            axes.set_title(each.stage.replace("_", " "))
            axes.tick_params(axis="y", length=0)
            for side in ("left", "bottom"):
                axes.spines[side].set_visible(False)
        grid[0].set_ylabel("page of the structure")
        _legend(drawn, seen, "the CPU's entry", "outside lower left")
        _legend(drawn, across, "the device's entry", "outside lower right")
        caption = (
            "Both page tables at the end of each stage, one row a page: what the CPU's entry is, and beside it what "
            "the device's entry for the same address is."
        )
        return finish(drawn, "page_tables", caption, " ".join(_table_words(each) for each in tables))


def _cpu_words(tables: Any) -> list[tuple[str, str]]:
    found = []
    for kind, writable, kept in zip(tables.cpu.tolist(), tables.writable.tolist(), tables.kept.tolist(), strict=True):
        found.append(_KEPT if kept else _CPU.get(kind, _WRITE if writable else _READ))
    return found


def _device_words(tables: Any) -> list[tuple[str, str]]:
    code = np.where(tables.device == 3, 5, np.where(tables.device > 0, tables.device + 2 * tables.near, 0))
    return [_DEVICE[each] for each in code.tolist()]


def _coloured(words: list[tuple[str, str]], seen: dict[str, str]) -> NDArray[np.float64]:
    for word, colour in words:
        seen.setdefault(word, colour)
    return np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for _word, colour in words])


def _legend(drawn: Any, seen: dict[str, str], title: str = "", where: str = "outside lower center") -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=word) for word, colour in seen.items()]
    columns = 2 if title else min(len(handles), 4)
    drawn.legend(
        handles=handles, loc=where, ncols=columns, handlelength=1.1, handleheight=1.1, title=title or None,
        alignment="left", title_fontproperties={"weight": "bold", "size": 9.5},
    )  # fmt: skip


def _table_words(tables: Any) -> str:
    parts = []
    for name, words in (("CPU", _cpu_words(tables)), ("device", _device_words(tables))):
        kinds, counts = np.unique([word for word, _colour in words], return_counts=True)
        parts.append(
            f"{name}: " + ", ".join(f"{n / len(words):.0%} {kind}" for kind, n in zip(kinds, counts, strict=True))
        )
    return f"After {tables.stage.replace('_', ' ')}: {'; '.join(parts)}."


def migration_phases(run: Run, cause: str = "to device") -> Figure:
    """Draw what src and dst hold after each phase of one migration: the one with the most to tell.

    Parameters
    ----------
    cause : str
        ``to device``, ``to system`` or ``CPU fault``.
    """
    found = [m for m in run.views.get("migrations", ()) if m.cause == cause and "pages" in m.src]
    if not found:
        return nothing("migration_phases", f"No migration {cause} in this run, so there are no arrays to show.")
    chosen = max(
        found,
        key=lambda m: (len(np.unique(np.concatenate([m.src["setup"] & 15, m.src["pages"] & 15]))), len(m.src["setup"])),
    )
    pages = len(chosen.src["setup"])
    with style():
        drawn = canvas(330)
        axes = drawn.subplots()
        rows, labels = [], []
        for phase, words in _PHASES:
            for name, arrays in (("src", chosen.src), ("dst", chosen.dst)):
                rows.append(_flags(arrays[phase]))
                labels.append(f"{words}: {name}")
        image = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _COLOURS])[np.array(rows)]
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, pages, len(rows), 0))
        axes.set_yticks(np.arange(len(rows)) + 0.5, labels)
        axes.hlines(
            np.arange(1, len(rows)), 0, pages, color="white", linewidth=[1 if r % 2 else 5 for r in range(1, len(rows))]
        )
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("page of the range that migrates")
        used = sorted({int(code) for row in rows for code in row})
        _legend(drawn, {_WORDS[code]: _COLOURS[code] for code in used})
        axes.set_title(f"One migration {cause} of {say_count(pages, 'page')}, set up at {say_time(chosen.time)}")
        caption = (
            "The two arrays of migrate_vma after each phase. The core fills src, the driver dst; a MIGRATE that is "
            "gone after pages is a page that stays where it was. A huge page has its flags in the first of 512 places."
        )
        counts = "; ".join(f"{label} {_counted(row)}" for label, row in zip(labels, rows, strict=True))
        return finish(drawn, "migration_phases", caption, f"Migration of {pages} pages. {counts}.")


def _flags(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the code of each word: nothing, hole, valid, moving, moving and writable; huge ones fill their block."""
    valid, migrate, write, huge = ((words & np.uint64(bit)) != 0 for bit in (1, 2, 8, 16))
    code = np.where(~valid, np.where(migrate, 1, 0), np.where(write & (migrate | True), 4, np.where(migrate, 3, 2)))
    code = np.where(valid & ~migrate & ~write, 2, code)
    for at in np.flatnonzero(huge).tolist():
        code[at : at + _ROWS] = code[at]
    return np.asarray(code, dtype=np.int64)


def _counted(row: NDArray[np.int64]) -> str:
    counts = np.bincount(row, minlength=len(_WORDS))
    return ", ".join(f"{n} {_WORDS[code]}" for code, n in enumerate(counts) if n)


def sequence_numbers(run: Run, stage: str = "") -> Figure:
    """Draw the notifier sequence of the process over time: odd while an invalidation runs, and who met it."""
    table, trace = run.trace.spans.array(), run.trace
    starts = spans_of(trace, table, ("mmu_notifier_invalidate_range_start",))
    ends = spans_of(trace, table, ("mmu_notifier_invalidate_range_end",))
    starts, ends = starts[starts[:, COLUMN["value"]] > 0], ends[ends[:, COLUMN["value"]] > 0]
    if not len(starts):
        return nothing("sequence_numbers", "No mirror has been told of a change yet: the sequence number stands at 2.")
    window = window_of(run, stage)
    starts, ends = window.holds(starts), window.holds(ends)
    begins = window.holds(spans_of(trace, table, ("mmu_interval_read_begin",)))
    tried = window.holds(spans_of(trace, table, ("hmm_range_fault",)))
    written = window.holds(spans_of(trace, table, ("dmirror_do_fault",)))
    unit = time_unit(window.end)
    when = np.concatenate([starts[:, 0], ends[:, 1]]) / unit.size
    value = np.concatenate([starts[:, COLUMN["value"]], ends[:, COLUMN["value"]]])
    order = np.argsort(when, kind="stable")
    with style():
        drawn = canvas(300)
        axes = drawn.subplots()
        axes.step(when[order], value[order], where="post", color=MUTED, linewidth=0.9, zorder=1)
        for event, colour in (
            ("MIGRATE", GREEN),
            ("CLEAR", BLUE),
            ("UNMAP", INK),
            ("PROTECTION_VMA", VERMILION),
            ("PROTECTION_PAGE", PURPLE),
        ):
            some = starts[starts[:, COLUMN["cause"]] == trace.causes.ids.get(event, -1)]
            if len(some):
                label = f"MMU_NOTIFY_{event}: {len(some):,}"
                axes.plot(
                    some[:, 0] / unit.size,
                    some[:, COLUMN["value"]],
                    ".",
                    color=colour,
                    markersize=5,
                    label=label,
                    zorder=3,
                )
        axes.plot(begins[:, 1] / unit.size, begins[:, COLUMN["value"]], "x", color=ORANGE, markersize=4,
                  label=f"a reader begins: {len(begins):,}", zorder=2)  # fmt: skip
        axes.set_xlim(window.start / unit.size, window.end / unit.size)
        axes.set_xlabel(f"simulated time ({unit.word})")
        axes.set_ylabel("sequence number")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        retries = len(tried) - len(written)
        told, wasted = say_count(len(starts), "invalidation"), say_count(max(retries, 0), "answer")
        axes.set_title(f"Sequence numbers: {told}, {wasted} thrown away")
        caption = (
            "The sequence number goes up by one when an invalidation that a mirror must know of starts (odd: readers "
            "wait) and by one more when the last of them ends. A reader whose number has changed starts again."
        )
        alt = (
            f"{told} take the number from {value.min():.0f} to {value.max():.0f}; "
            f"{say_count(len(begins), 'reader')} begin; {wasted} of hmm_range_fault "
            "not used because the number had moved."
        )
        return finish(drawn, "sequence_numbers", caption, alt)
