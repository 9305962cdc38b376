"""What an ONNX file holds exactly, its bytes, and what ONNX Runtime has kernels for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import Groups, Layer, Request, find_groups
from curvprune.options import Form, Option, Quantize, check_fits, quantizer_of, stored_bytes
from curvprune.targets.onnx_blocks import BITS, BLOCKS, blocks_for
from curvprune.targets.onnx_graph import FEW
from curvprune.targets.target import TargetName

HELD = ("linear", "conv1d", "embedding")  # kinds of layers that keep their codes
# Rounded activations (QDQ) are to have their row here; nothing writes them yet.
KERNELS: dict[int, str] = {
    4: "yes",
    2: "only with accuracy_level=4; exact products decode the weight at every call",
    8: "only with accuracy_level=4; exact products decode the weight at every call",
}
# The most that names, nodes and shapes of a graph were seen to take, and half as much again.
_GRAPH_BYTES, _MODULE_BYTES = 24_000, 3_000


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxTarget:
    """A target whose bytes are those of the file that `export_onnx` writes; see
    `curvprune.targets.target.Target`. The artifact is for `curvprune.load` alone, which packs every
    kind of layer: so codes of embeddings reach the file too."""

    name: TargetName
    portable: Portable
    source: str

    def groups(
        self, model: nn.Module, request: Request, offered: Mapping[str, Iterable[str]]
    ) -> Groups:
        return find_groups(request, offered)

    def check(self, model: nn.Module, layer: Layer, option: Option) -> None:
        check_fits(option, layer.name, layer.shape)
        quantize = quantizer_of(option)
        if quantize is not None and layer.kind in HELD:
            _check_grid(layer, option, quantize)

    def form_of(self, model: nn.Module, layer: Layer, option: Option) -> Form:
        return artifact.form_of(model, layer, option, portable=self.portable)

    def layer_bytes(self, model: nn.Module, layer: Layer, option: Option) -> int:
        quantize = quantizer_of(option)
        dtype = layer.dtype
        if quantize is not None:
            form = blocks_for(quantize, layer.shape)
            if layer.kind in HELD and form is not None:
                return form.nbytes
            # Values that no 16-bit type needs to have.
            dtype = "float32"
        return stored_bytes(option, layer.shape, dtype=dtype, form="dense")

    def other_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return artifact.other_bytes(model, layers)

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        # 1. The graph: some nodes for every module, with their names.
        total = _GRAPH_BYTES + _MODULE_BYTES * len(list(model.modules()))
        # 2. What no state dict holds, and short tensors, which are float32 in the file.
        held = model.state_dict()
        for name, buffer in model.named_buffers():
            if name not in held:
                total += buffer.numel() * max(4, buffer.element_size())
        return total + sum(4 * one.numel() for one in held.values() if one.numel() <= FEW)


def _check_grid(layer: Layer, option: Option, quantize: Quantize) -> None:
    """Raise ``ValueError`` with the nearest grid that the operators have."""
    if quantize.bits not in BITS:
        nearest = next(bits for bits in BITS if bits >= quantize.bits)
        raise ValueError(
            f"layer {layer.name}: option {option.key}: ONNX Runtime holds codes of 2, 4 or 8 bits, "
            f"not {quantize.bits}, which would take the bytes of {nearest}; nearest: {nearest} (or "
            "target: curvprune)"
        )
    if blocks_for(quantize, layer.shape) is None:
        asked = quantize.group_size or 0
        nearest = min(BLOCKS, key=lambda size: (abs(size - asked), -size))
        raise ValueError(
            f"layer {layer.name}: option {option.key}: ONNX Runtime holds groups that are "
            f"multiples of 16, or one scale per channel (null), not {asked}; nearest: {nearest}"
        )


ONNX = OnnxTarget(
    name="onnx",
    portable=False,
    source=(
        "ONNX Runtime 1.32 (CPU), its schemas of com.microsoft MatMulNBits and "
        "GatherBlockQuantized; every form run there"
    ),
)
