"""Inline SVG charts. Colours are CSS classes, so one drawing serves light, dark and print."""

from curvprune.report.charts.bars import Segment, bars
from curvprune.report.charts.colours import depth_colour
from curvprune.report.charts.heat_map import HeatMap, heat_map
from curvprune.report.charts.interval import interval
from curvprune.report.charts.plans import FrontierMark, Point, frontier, scatter
from curvprune.report.charts.spectra import Panel, spectra, spectral_axis, spectrum
from curvprune.report.charts.svg import legend, progress
from curvprune.report.charts.traces import Dot, traces

__all__ = [
    "Dot",
    "FrontierMark",
    "HeatMap",
    "Panel",
    "Point",
    "Segment",
    "bars",
    "depth_colour",
    "frontier",
    "heat_map",
    "interval",
    "legend",
    "progress",
    "scatter",
    "spectra",
    "spectral_axis",
    "spectrum",
    "traces",
]
