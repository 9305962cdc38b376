"""Records (plain dicts) to a self-contained HTML report and a short text summary."""

from __future__ import annotations

from .html import build
from .terminal import summary

__all__ = ["build", "summary"]
