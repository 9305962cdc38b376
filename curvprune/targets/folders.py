"""Targets that read a curvprune folder as it is: transformers, and `curvprune.load` alone. vLLM
reads one too: `curvprune.targets.vllm`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import Groups, Layer, Request, find_groups
from curvprune.options import Form, Option, check_fits
from curvprune.targets.target import TargetName


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderTarget:
    """A target whose bytes are those of the folder; see `curvprune.targets.target.Target`."""

    name: TargetName
    portable: Portable
    source: str

    def groups(
        self, model: nn.Module, request: Request, offered: Mapping[str, Iterable[str]]
    ) -> Groups:
        return find_groups(request, offered)

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
CURVPRUNE = FolderTarget(
    name="curvprune", portable=False, source="curvprune.load, every kind of layer packed"
)
