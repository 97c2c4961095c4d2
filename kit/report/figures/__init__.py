"""The pictures: each a pure function of a run that returns a `Figure` with caption and alt text."""

from kit.report.figures.copies import copy_sizes
from kit.report.figures.costs import cost_breakdown
from kit.report.figures.figure import Figure
from kit.report.figures.residency import residency_map
from kit.report.figures.steps import documented_steps
from kit.report.figures.timeline import one_batch, overview, timeline

__all__ = [
    "Figure", "copy_sizes", "cost_breakdown", "documented_steps", "one_batch", "overview", "residency_map",
    "timeline",
]  # fmt: skip
