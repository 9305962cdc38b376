"""The ``gguf`` package, which is imported where a file is read or written."""

from __future__ import annotations

from typing import Any


def import_gguf() -> Any:
    """The package. Raises ``ImportError`` with what to install."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the package gguf: pip install 'curvprune[hf]'"
        ) from error
    return gguf
