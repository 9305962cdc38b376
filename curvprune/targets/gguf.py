"""The target gguf: what llama.cpp and what is built on it read.

The artifact that the file is made from is for `curvprune.load` alone: it holds codes of every kind
of layer, and so the very codes that the file gets.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from curvprune import artifact
from curvprune.artifact import Portable
from curvprune.model import Layer, Request, find_layers
from curvprune.options import Form, Option
from curvprune.targets.gguf_like import like_fields
from curvprune.targets.gguf_names import Field, gguf_name, model_fields, shape_of
from curvprune.targets.gguf_tokenizer import no_tokenizer, tokenizer_fields
from curvprune.targets.gguf_types import gguf_layer_bytes, gguf_type, padded, type_bytes
from curvprune.targets.gguf_writer import GgufTensor, general_fields, gguf_file_bytes
from curvprune.targets.target import TargetName


class GgufTarget:
    """See `curvprune.targets.target.Target`. Rounded activations will have a column of their own
    in `gguf_types`: llama.cpp rounds them to 8 bits by itself, in blocks of 32."""

    name: TargetName = "gguf"
    portable: Portable = False
    source = "ggml-common.h of ggml-org/llama.cpp, gguf 0.19; see gguf_types"

    def sharing(self, request: Request) -> Request:
        return request  # llama.cpp runs every matrix by itself

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
        for one in _dense_tensors(model):
            if one.key not in own:
                total += padded(type_bytes(one.type, one.shape))
        return total

    def header_bytes(self, model: nn.Module, layers: Mapping[str, Layer]) -> int:
        return gguf_header_bytes(model, no_tokenizer())


def gguf_header_bytes(model: nn.Module, words: list[Field]) -> int:
    """What a GGUF file takes besides its tensors.

    Args:
        words: the entries of its tokenizer, or all entries of a file that it is made like.
    """
    shape = shape_of(_config_of(model))
    tensors = _dense_tensors(model)
    known = {field.key for field in words}
    fields = [field for field in model_fields(shape) if field.key not in known]
    whole = gguf_file_bytes(shape, [*fields, *words, *general_fields(tensors)], tensors)
    return whole - sum(padded(type_bytes(one.type, one.shape)) for one in tensors)


def words_of(model: nn.Module, like: Path | None, tokenizer: Any) -> list[Field]:
    """The entries that a file of a model takes from another one, or from a tokenizer."""
    shape = shape_of(_config_of(model))
    if like is not None:
        return like_fields(like, shape, [one.name for one in _dense_tensors(model)])
    if tokenizer is None:
        return no_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer_fields(Path(folder), shape.vocabulary)


def check_architecture(model: nn.Module) -> None:
    """Raises ``ValueError`` for a model whose family is not written."""
    shape_of(_config_of(model))


def _config_of(model: nn.Module) -> Any:
    if not artifact.is_transformers(model):
        raise ValueError(
            f"target gguf: {type(model).__name__} is no model of transformers, whose config says "
            "what llama.cpp must compute; take target: curvprune"
        )
    config: Any = copy.copy(model.config)
    if not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]  # as it is saved
    return config


def _dense_tensors(model: nn.Module) -> list[GgufTensor]:
    """The tensors of a file of the uncompressed model."""
    shape = shape_of(_config_of(model))
    found = []
    for key, tensor in artifact.state_dict_on_disk(model, find_layers(model), {}).items():
        kind = "F32"
        if tensor.ndim > 1:
            kind = {"torch.float16": "F16", "torch.bfloat16": "BF16"}.get(str(tensor.dtype), "F32")
        name = gguf_name(key, shape)
        found.append(GgufTensor(name=name, shape=tuple(tensor.shape), type=kind, key=key))
    return found


GGUF = GgufTarget()
