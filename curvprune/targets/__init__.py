"""What engines can hold and run: views of an artifact for each of them."""

from curvprune.targets.gguf_types import GgufForm, gguf_layer_bytes, gguf_type
from curvprune.targets.gguf_writer import export_gguf

__all__ = ["GgufForm", "export_gguf", "gguf_layer_bytes", "gguf_type"]
