"""Records of runs to a self-contained HTML report and a short text summary."""

from curvprune.report.card import model_card
from curvprune.report.html import build
from curvprune.report.terminal import summary
from curvprune.report.two_models import (
    comparison_evidence,
    comparison_page,
    comparison_table,
    comparison_title,
)

__all__ = [
    "build",
    "comparison_evidence",
    "comparison_page",
    "comparison_table",
    "comparison_title",
    "model_card",
    "summary",
]
