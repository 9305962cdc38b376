"""What each engine can hold and run; views of an artifact for engines, and engines as judges."""

from curvprune.targets.engine import EngineModel, EngineName, check_engine, open_engine
from curvprune.targets.gguf import gguf_header_bytes
from curvprune.targets.gguf_names import shape_of
from curvprune.targets.gguf_sizes import gguf_other_bytes, tensors_of
from curvprune.targets.gguf_types import GgufForm, block_rows, gguf_layer_bytes, gguf_type
from curvprune.targets.gguf_writer import export_gguf, gguf_fields
from curvprune.targets.onnx_writer import export_onnx
from curvprune.targets.table import named_before, target_named
from curvprune.targets.target import Target, TargetName
from curvprune.targets.vllm import vllm_bits

__all__ = [
    "EngineModel",
    "EngineName",
    "GgufForm",
    "Target",
    "TargetName",
    "block_rows",
    "check_engine",
    "export_gguf",
    "export_onnx",
    "gguf_fields",
    "gguf_header_bytes",
    "gguf_layer_bytes",
    "gguf_other_bytes",
    "gguf_type",
    "named_before",
    "open_engine",
    "shape_of",
    "target_named",
    "tensors_of",
    "vllm_bits",
]
