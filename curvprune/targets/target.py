"""What a target must say of itself, for options to be offered and priced by what it can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from torch import nn

from curvprune.artifact import Portable
from curvprune.model import Groups, Layer, Request
from curvprune.options import Form, Option

TargetName = Literal["transformers", "gguf", "vllm", "onnx", "curvprune"]


class Target(Protocol):
    """Who runs the result. The artifact stays the source; a target reads it, or a view of it."""

    @property
    def name(self) -> TargetName:
        """As recipes write it."""

    @property
    def portable(self) -> Portable:
        """The artifact that the target, or what makes its view, reads."""

    @property
    def source(self) -> str:
        """Where its table was read, and of which version."""

    def groups(
        self, model: nn.Module, request: Request, offered: Mapping[str, Iterable[str]]
    ) -> Groups:
        """The layers that share an option: those that a request names, and those that the target
        runs as one.

        Args:
            offered: the keys of the options of every compressible layer, in the model's order.

        Raises `curvprune.model.GroupError`, whose ``key`` is ``target`` where only the target asks.
        """

    def check(self, model: nn.Module, layer: Layer, option: Option) -> None:
        """Raise ``ValueError`` naming layer and nearest valid value, if the target cannot hold or
        run the layer under this option."""

    def form_of(self, model: nn.Module, layer: Layer, option: Option) -> Form:
        """How the artifact stores the layer."""

    def layer_bytes(self, model: nn.Module, layer: Layer, option: Option) -> int:
        """Bytes of the layer in the target's file."""

    def other_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        """Bytes there of all tensors besides these layers'."""

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        """The most that the file takes besides its tensors."""
