"""Records of runs to a self-contained HTML report and a short text summary."""

from curvprune.report.html import build
from curvprune.report.terminal import summary

__all__ = ["build", "summary"]
