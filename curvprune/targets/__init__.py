"""What engines can hold and run: views of an artifact for each of them."""

from curvprune.targets.gguf_names import shape_of
from curvprune.targets.gguf_sizes import gguf_other_bytes, tensors_of
from curvprune.targets.gguf_types import GgufForm, block_rows, gguf_layer_bytes, gguf_type
from curvprune.targets.gguf_writer import export_gguf, gguf_fields

__all__ = [
    "GgufForm",
    "block_rows",
    "export_gguf",
    "gguf_fields",
    "gguf_layer_bytes",
    "gguf_other_bytes",
    "gguf_type",
    "shape_of",
    "tensors_of",
]
