"""Spectra and traces as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curvprune.compat import import_pyplot
from curvprune.curvature.records import AnalysisRecord, DensityRecord

BELL = 0.12  # width of a node's bell on the warped axis
MOST_LAYERS = 60  # that the bars of traces have room for


def plot_densities(densities: Mapping[str, DensityRecord], *, knee: float, label: str) -> Any:
    """Densities on one axis: linear within ``knee`` of zero, logarithmic beyond."""
    figure, ax = import_pyplot().subplots(figsize=(8, 4), layout="constrained")
    _densities(ax, densities, knee, label)
    return figure


def plot_analysis(analysis: AnalysisRecord) -> Any:
    """Traces of the layers with their errors, and the whole model's density.

    Raises:
        ValueError: neither was asked for, or matplotlib is not installed.
    """
    traces = {n: layer.trace for n, layer in analysis.layers.items() if layer.trace is not None}
    density = None if analysis.model is None else analysis.model.density
    if not traces and density is None:
        raise ValueError(
            "plot: this analysis has neither traces nor a density; ask for quantities=['trace', "
            "'density']"
        )
    panels = bool(traces) + (density is not None)
    height = min(4 + 0.15 * len(traces), 12)
    figure, axes = import_pyplot().subplots(
        1, panels, figsize=(7 * panels, height), layout="constrained", squeeze=False
    )
    if traces:
        shown = dict(list(traces.items())[:MOST_LAYERS])
        ax = axes[0, 0]
        places = range(len(shown))
        values = [trace.value for trace in shown.values()]
        ax.barh(places, values, xerr=[trace.stderr for trace in shown.values()], color="tab:blue")
        ax.set_yticks(places, list(shown))
        ax.invert_yaxis()
        ax.set_xlabel(f"trace of the {analysis.matrix} ({analysis.measure})")
        if len(shown) < len(traces):
            ax.set_title(f"the first {len(shown)} of {len(traces)} layers")
    if density is not None:
        largest = max(abs(node) for run in density.nodes for node in run)
        label = f"eigenvalue of the {analysis.matrix} ({analysis.measure})"
        _densities(axes[0, -1], {"": density}, 1e-3 * largest or 1.0, label)
    return figure


def _densities(ax: Any, densities: Mapping[str, DensityRecord], knee: float, label: str) -> None:
    """Shares of eigenvalues per unit of the warped axis ``asinh(λ / knee)``."""
    # 1. Bells around the nodes, on the axis that is drawn.
    lowest = min(min(min(run) for run in found.nodes) for found in densities.values())
    highest = max(max(max(run) for run in found.nodes) for found in densities.values())
    low, high = np.arcsinh(np.array([min(lowest, 0.0), max(highest, 0.0)]) / knee)
    warped = np.linspace(low - 5 * BELL, high + 5 * BELL, 1200)
    for name, found in densities.items():
        nodes, weights = np.ravel(found.nodes), np.ravel(found.weights) / len(found.nodes)
        apart = (warped[:, None] - np.arcsinh(nodes / knee)) / BELL
        height = np.exp(-0.5 * apart**2) @ weights / (BELL * np.sqrt(2 * np.pi))
        ax.plot(np.sinh(warped) * knee, height, label=name)
        ax.fill_between(np.sinh(warped) * knee, height, alpha=0.15)
    # 2. The axis.
    ax.set_xscale("asinh", linear_width=knee)
    ax.set_yscale("log")
    ax.set_ylim(1e-5, None)
    ax.axvline(0.0, color="grey", linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_ylabel("share of eigenvalues, per unit of the axis")
    if len(densities) > 1:
        ax.legend()
