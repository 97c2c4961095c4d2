"""The one visual language: what colour a place has, what lane an actor has, how axes say their units.

Every picture of every flow takes its colours and units from here and nowhere else; which lanes a flow has, its
`kit.report.flow_report.FlowReport` says. The colours are the Okabe-Ito palette, which stays readable with the common
kinds of colour blindness; each place is also named in a legend, so that no picture leans on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = [
    "BLUE", "DARK", "FAINT", "GREEN", "GRID", "INK", "MUTED", "ORANGE", "PLACES", "PURPLE",
    "SKY", "VERMILION", "YELLOW", "Lane", "Place", "Unit",
    "bytes_unit", "say_bytes", "say_count", "say_time", "style", "time_unit",
]  # fmt: skip

BLUE, GREEN, ORANGE, SKY = "#0072B2", "#009E73", "#E69F00", "#56B4E9"
VERMILION, PURPLE, YELLOW = "#D55E00", "#CC79A7", "#F0E442"
INK, MUTED, FAINT, GRID = "#1a1a1a", "#666666", "#a0a0a8", "#e4e4e8"
DARK = "#005a8c"  # a darker host blue, for what a lane wants set apart


@dataclass(frozen=True)
class Place:
    """Where a page can be: a key for code, words for legends, a colour."""

    key: str
    words: str
    colour: str


PLACES = {
    place.key: place
    for place in (
        Place("nowhere", "nowhere", "#ebebee"),
        Place("host", "host memory", BLUE),
        Place("device", "device memory", GREEN),
        Place("both", "both (read-duplicated)", YELLOW),
        Place("flight", "in flight", ORANGE),
        Place("error", "error", VERMILION),
    )
}


@dataclass(frozen=True)
class Lane:
    """One row of the timeline.

    Attributes
    ----------
    name : str
        Shown at the left.
    steps : tuple of str
        Spans drawn in it: the first of these names that the trace holds (they are alternatives,
        from the most telling to the plainest), or all of them where `together`.
    colour : str
        Of its bars.
    actor : str
        Only this actor's spans, when given.
    others : tuple of str
        Not the spans of these actors.
    words, accent_words, under_words : str
        What the legend calls the lane's own bars, those in `accent_colour`, and the faint ones; empty: not in it.
    accent : tuple of str
        Steps drawn over the lane in `accent_colour`.
    accent_cause : str
        Spans of the lane's own steps with this cause take `accent_colour`.
    under : str
        A step drawn faintly behind the lane.
    together : bool
        Whether every step of `steps` is drawn.
    """

    name: str
    steps: tuple[str, ...]
    colour: str
    actor: str = ""
    accent: tuple[str, ...] = ()
    accent_cause: str = ""
    accent_colour: str = ""
    under: str = ""
    together: bool = False
    others: tuple[str, ...] = ()
    words: str = ""
    accent_words: str = ""
    under_words: str = ""


@dataclass(frozen=True)
class Unit:
    """An axis unit: its word, and how many base units (microseconds, bytes) it is."""

    word: str
    size: float


def time_unit(us: float) -> Unit:
    """Return the unit in which a span of `us` microseconds reads best."""
    if us >= 2e6:
        return Unit("s", 1e6)
    return Unit("ms", 1e3) if us >= 1e4 else Unit("µs", 1.0)


def bytes_unit(nbytes: float) -> Unit:
    """Return the binary unit in which `nbytes` reads best."""
    for word, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 2 << shift or (nbytes >= 1 << shift and shift == 10):
            return Unit(word, float(1 << shift))
    return Unit("B", 1.0)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def say_time(us: float) -> str:
    """Return microseconds in words of the fitting unit: ``say_time(1234.5)`` is ``"1.23 ms"``."""
    for word, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{_short(us / size)} {word}"
    return f"{_short(us)} µs"


def say_bytes(nbytes: float) -> str:
    """Return bytes in words of the fitting binary unit: ``say_bytes(65536)`` is ``"64 KiB"``."""
    for word, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{_short(nbytes / (1 << shift))} {word}"
    return f"{_short(nbytes)} B"


def say_count(count: int, noun: str, plural: str = "") -> str:
    """Return ``"1 copy"`` or ``"1,200 copies"``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


@contextmanager
def style() -> Iterator[None]:
    """Draw with the kit's fonts, sizes and thin frames; matplotlib's own settings come back after."""
    from matplotlib import rc_context

    with rc_context({
        "font.family": ["DejaVu Sans"], "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.labelsize": 10, "axes.edgecolor": INK, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
        "legend.frameon": False, "legend.fontsize": 9.5, "text.color": INK, "axes.labelcolor": INK,
        "figure.facecolor": "white", "savefig.facecolor": "white", "axes.unicode_minus": False,
        "axes.formatter.useoffset": False,
    }):  # fmt: skip
        yield
