"""The target gguf: what llama.cpp and what is built on it read.

The artifact that the file is made from is for `curvprune.load` alone: it holds codes of every kind
of layer, and so the very codes that the file gets.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import Groups, Layer, Request, find_groups
from curvprune.options import Form, Option
from curvprune.targets.gguf_names import shape_of
from curvprune.targets.gguf_sizes import header_bytes, tensors_of
from curvprune.targets.gguf_types import gguf_layer_bytes, gguf_type, padded, type_bytes
from curvprune.targets.gguf_writer import gguf_fields
from curvprune.targets.target import TargetName


class GgufTarget:
    """See `curvprune.targets.target.Target`. Rounded activations will have a column of their own
    in `gguf_types`: llama.cpp rounds them to 8 bits by itself, in blocks of 32."""

    name: TargetName = "gguf"
    portable: Portable = False
    source = "ggml-common.h of ggml-org/llama.cpp, gguf 0.19; see gguf_types"

    def groups(
        self, model: nn.Module, request: Request, offered: Mapping[str, Iterable[str]]
    ) -> Groups:
        return find_groups(request, offered)  # llama.cpp runs every matrix by itself

    def check(self, model: nn.Module, layer: Layer, option: Option) -> None:
        check_architecture(model)
        form = gguf_type(option, layer.shape, dtype=layer.dtype)
        if form.type is None:
            assert form.nearest is not None
            raise ValueError(
                f"layer {layer.name}: option {option.key}: {form.why_not}; nearest: "
                f"{form.nearest.key} (or another target)"
            )

    def form_of(self, model: nn.Module, layer: Layer, option: Option) -> Form:
        return artifact.form_of(model, layer, option, portable=False)

    def layer_bytes(self, model: nn.Module, layer: Layer, option: Option) -> int:
        return gguf_layer_bytes(option, layer.shape, dtype=layer.dtype)

    def other_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        own = {key for layer in layers.values() for key in layer.keys}
        total = 0
        for one in tensors_of(plain(model)):
            if one.key not in own:
                total += padded(type_bytes(one.type, one.shape))
        return total

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return gguf_header_bytes(model, None, None)


def gguf_header_bytes(model: nn.Module, like: Path | None, tokenizer: Any) -> int:
    """What a GGUF file of a model takes besides its tensors.

    Args:
        like: the file that it is made like, if there is one.
        tokenizer: else that of transformers; ``None``: the file will have no vocabulary.
    """
    shape = shape_of(config_of(model))
    tensors = tensors_of(plain(model))
    names = [one.name for one in tensors]
    with tempfile.TemporaryDirectory() as folder:
        words: Path | None = None
        if like is None and tokenizer is not None:
            words = Path(folder)
            tokenizer.save_pretrained(words)
        fields = gguf_fields(shape, words, names, like=like)
    return header_bytes(shape.family.architecture, fields, tensors)


def check_architecture(model: nn.Module) -> None:
    """Raises ``ValueError`` for a model whose family is not written."""
    shape_of(config_of(model))


def config_of(model: nn.Module) -> Any:
    if not artifact.is_transformers(model):
        raise ValueError(
            f"target gguf: {type(model).__name__} is no model of transformers, whose config says "
            "what llama.cpp must compute; take target: curvprune"
        )
    config: Any = copy.copy(model.config)
    if not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]  # as it is saved
    return config


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """What `tensors_of` asks of a model: its config, as it is saved, and its tensors."""

    config: Any
    model: nn.Module

    def state_dict(self, *, keep_vars: bool) -> Mapping[str, Tensor]:
        return self.model.state_dict(keep_vars=keep_vars)


def plain(model: nn.Module) -> Plain:
    """A model with the config that its folder will have."""
    return Plain(config=config_of(model), model=model)


GGUF = GgufTarget()
