"""What each engine can hold and run, and views of an artifact for them."""

from curvprune.targets.table import named_before, target_named
from curvprune.targets.target import Target, TargetName
from curvprune.targets.vllm import vllm_bits

__all__ = ["Target", "TargetName", "named_before", "target_named", "vllm_bits"]
