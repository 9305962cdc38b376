"""The targets by name."""

from __future__ import annotations

from curvprune.artifact import Portable
from curvprune.targets.folders import CURVPRUNE, TRANSFORMERS
from curvprune.targets.gguf import GGUF
from curvprune.targets.onnx_table import ONNX
from curvprune.targets.target import Target, TargetName
from curvprune.targets.vllm import VLLM

_TARGETS: dict[TargetName, Target] = {
    target.name: target for target in (TRANSFORMERS, GGUF, VLLM, ONNX, CURVPRUNE)
}
_BEFORE: dict[Portable, TargetName] = {
    True: "transformers",
    "engines": "vllm",
    False: "curvprune",
}


def target_named(name: TargetName) -> Target:
    """The target of a name."""
    return _TARGETS[name]


def named_before(portable: Portable) -> TargetName:
    """The target that an earlier version called ``portable``: true, engines or false."""
    return _BEFORE[portable]
