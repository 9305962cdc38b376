"""What each engine can hold and run, and views of an artifact for them."""

from curvprune.targets.onnx_writer import export_onnx
from curvprune.targets.table import named_before, target_named
from curvprune.targets.target import Target, TargetName

__all__ = ["Target", "TargetName", "export_onnx", "named_before", "target_named"]
