"""What each engine can hold and run; views of an artifact for engines, and engines as judges."""

from curvprune.targets.engine import EngineModel, EngineName, check_engine, open_engine
from curvprune.targets.gguf import gguf_header_bytes, words_of
from curvprune.targets.gguf_types import GgufForm, gguf_layer_bytes, gguf_type
from curvprune.targets.gguf_writer import export_gguf
from curvprune.targets.table import named_before, target_named
from curvprune.targets.target import Target, TargetName

__all__ = [
    "EngineModel",
    "EngineName",
    "GgufForm",
    "Target",
    "TargetName",
    "check_engine",
    "export_gguf",
    "gguf_header_bytes",
    "gguf_layer_bytes",
    "gguf_type",
    "named_before",
    "open_engine",
    "target_named",
    "words_of",
]
