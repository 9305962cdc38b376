"""Targets that read a curvprune folder as it is: transformers, vLLM, and `curvprune.load` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import Layer, Request
from curvprune.options import Form, Option, check_fits
from curvprune.targets.target import TargetName


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderTarget:
    """A target whose bytes are those of the folder; see `curvprune.targets.target.Target`."""

    name: TargetName
    portable: Portable
    source: str
    fuses: bool = False

    def sharing(self, request: Request) -> Request:
        if not self.fuses or "fused" in request:
            return request
        return (*request, "fused")

    def check(self, model: nn.Module, layer: Layer, option: Option) -> None:
        reader = artifact.reader_of(model, layer, portable=self.portable)
        check_fits(option, layer.name, layer.shape, reader=reader)

    def form_of(self, model: nn.Module, layer: Layer, option: Option) -> Form:
        return artifact.form_of(model, layer, option, portable=self.portable)

    def layer_bytes(self, model: nn.Module, layer: Layer, option: Option) -> int:
        return artifact.layer_bytes(model, layer, option, portable=self.portable)

    def other_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return artifact.other_bytes(model, layers)

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return artifact.header_bytes(model, layers)


TRANSFORMERS = FolderTarget(
    name="transformers",
    portable=True,
    source="transformers 5.18 to 5.24 with compressed-tensors 0.20, tried before anything long",
)
VLLM = FolderTarget(
    name="vllm",
    portable="engines",
    fuses=True,
    source="vLLM 0.32, compressed_tensors_wNa16.py and marlin_utils.py",
)
CURVPRUNE = FolderTarget(
    name="curvprune", portable=False, source="curvprune.load, every kind of layer packed"
)
