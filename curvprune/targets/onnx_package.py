"""The packages that write and run ONNX files, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRA = "pip install 'curvprune[onnx]'"


def import_onnx_ir() -> Any:
    """``onnx_ir``, with which torch's exporter makes graphs. Raises ``ValueError`` with what to
    type where it, onnx or onnxscript is missing."""
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx_ir")
    except ImportError as error:
        raise ValueError(f"ONNX files need the extra: {_EXTRA}") from error


def import_onnxruntime() -> Any:
    """``onnxruntime``, which runs what was written. Raises as `import_onnx_ir`."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            f"an ONNX file is run once before it gets its name, which needs the extra: {_EXTRA}"
        ) from error
