"""Optional libraries, imported on first use, and every private name of torch or transformers that
curvprune uses."""

from __future__ import annotations

from typing import Any


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "Hugging Face models need the extra: pip install 'curvprune[hf]'"
        ) from error
    return transformers


def versions() -> dict[str, str]:
    """Versions of the optional libraries that shape an artifact, where installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("transformers", "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
