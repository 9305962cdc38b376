"""What a model is traced with: its inputs, which of their axes may be of any length, and the names
of what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.compat import cached_tensors, plain_cache

Axes = Mapping[int, str]
TOKENS, PAST = 4, 5  # of an example; lengths of one would be taken for constants


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Inputs of a model, in order.

    Attributes:
        names: of the inputs in the file.
        axes: of each input, those that may be of any length, with a name.
        batches: inputs to trace the model with, and of other lengths to try what was written.
        cached: how many inputs at the end are keys and values of earlier tokens.
        named: the model takes its inputs by name.
    """

    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    batches: tuple[tuple[Tensor, ...], ...]
    cached: int = 0
    named: bool = True


class Traced(nn.Module):
    """A model as a function of a list of tensors, which gives a tuple of tensors."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.outputs(tensors).values())

    def outputs(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the model gives, by the names that the file has."""
        example: Example = self.example
        if not example.named:
            return _named(self.model(*tensors))
        own = len(tensors) - example.cached
        arguments: dict[str, object] = dict(zip(example.names[:own], tensors[:own], strict=True))
        if not example.cached:
            if _caches(self.model):
                arguments["use_cache"] = False
            return _named(self.model(**arguments))
        cache = plain_cache(tensors[own:])
        given = self.model(**arguments, past_key_values=cache, use_cache=True)
        found = {"logits": given.logits}
        present = cached_tensors(given.past_key_values)
        assert present is not None
        for place, tensor in enumerate(present):
            found[cache_name("present", place)] = tensor
        return found


def cache_name(word: str, place: int) -> str:
    """``present.0.key``, ``present.0.value``, ``present.1.key``, …"""
    return f"{word}.{place // 2}.{('key', 'value')[place % 2]}"


def _named(given: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of what a model gives, which may lie in tuples and records."""
    if isinstance(given, Tensor):
        return {name or "output": given}
    parts: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        parts = [(str(key), value) for key, value in given.items()]
    elif isinstance(given, (tuple, list)):
        parts = [(str(place) if name else f"output.{place}", v) for place, v in enumerate(given)]
    found: dict[str, Tensor] = {}
    for key, value in parts:
        found |= _named(value, f"{name}.{key}" if name else key)
    return found


def _caches(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


# ------------------------------------------------------------------------------ a user's own inputs


def example_of(
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    axes: Mapping[str, Axes] | None,
) -> Example:
    """Inputs as they were given. The first axis of each is ``batch``, and the second one of tokens
    ``sequence``, unless ``axes`` says which may be of any length."""
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    named = isinstance(inputs, Mapping)
    tensors = dict(inputs) if isinstance(inputs, Mapping) else _by_place(inputs)
    if not tensors or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise ValueError(
            "inputs: expected tensors, by name or in a list, for example "
            "inputs={'pixel_values': torch.zeros(2, 3, 224, 224)}"
        )
    unknown = sorted(set(axes or {}) - set(tensors))
    if unknown:
        raise ValueError(f"axes: no input is called {unknown[0]!r}; there are {list(tensors)}")
    found = []
    for name, tensor in tensors.items():
        found.append(_axes_of(tensor) if axes is None else dict(axes.get(name, {})))
    return Example(
        names=tuple(tensors),
        axes=tuple(found),
        batches=_with_other_lengths(list(tensors.values()), found),
        named=named,
    )


def _by_place(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(inputs) == 1:
        return {"input": inputs[0]}
    return {f"input.{place}": tensor for place, tensor in enumerate(inputs)}


def _axes_of(tensor: Tensor) -> dict[int, str]:
    if tensor.ndim == 0:
        return {}
    if tensor.ndim == 2 and not tensor.is_floating_point():
        return {0: "batch", 1: "sequence"}
    return {0: "batch"}


def _with_other_lengths(
    tensors: Sequence[Tensor], axes: Sequence[Axes]
) -> tuple[tuple[Tensor, ...], ...]:
    """The example with no axis of length one that may be of any, and its first item alone."""
    whole, one = [], []
    for tensor, names in zip(tensors, axes, strict=True):
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        single = tensor
        for axis, name in names.items():
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
            if name == "batch":
                single = single.narrow(axis, 0, 1)
        whole.append(tensor)
        one.append(single.contiguous())
    return tuple(whole), tuple(one)


# -------------------------------------------------------------------------- models of transformers


def example_for(model: Any, *, cache: bool) -> Example:
    """Inputs for a model of transformers, from its config.

    Raises ``ValueError`` for models whose inputs are not known, and caches that forget.
    """
    accepted, config = inspect.signature(model.forward).parameters, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(_unknown(model, "it has an encoder and a decoder"))
    if "pixel_values" in accepted and "input_ids" not in accepted:
        return _images(config)
    if "input_ids" not in accepted or "pixel_values" in accepted:
        raise ValueError(_unknown(model, f"it takes {', '.join(list(accepted)[:3])}"))
    writes = getattr(model, "can_generate", lambda: False)()
    if cache and writes and _caches(model):
        return _decoder(model, accepted)
    return _texts(config, accepted)


def _unknown(model: nn.Module, why: str) -> str:
    return (
        f"model: the inputs of {type(model).__name__} are not known ({why}); pass "
        "inputs={name: tensor} to export_onnx"
    )


def _images(config: Any) -> Example:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    shape = (getattr(config, "num_channels", 3), height, width)
    draws = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, *shape, generator=draws),) for n in (2, 1)]
    return Example(names=("pixel_values",), axes=({0: "batch"},), batches=tuple(batches))


def _tokens(config: Any, shape: tuple[int, int]) -> Tensor:
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _texts(config: Any, accepted: Mapping[str, object]) -> Example:
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) and "token_type_ids" in accepted:
        names.append("token_type_ids")
    batches = []
    for items, length in ((2, TOKENS), (3, TOKENS + 3)):
        mask = torch.ones(items, length, dtype=torch.long)
        mask[1, -1] = 0
        tensors = (_tokens(config, (items, length)), mask, torch.zeros_like(mask))
        batches.append(tensors[: len(names)])
    axes = tuple({0: "batch", 1: "sequence"} for _ in names)
    return Example(names=tuple(names), axes=axes, batches=tuple(batches))


def _decoder(model: Any, accepted: Mapping[str, object]) -> Example:
    """Tokens, and keys and values of those before them."""
    config = model.config
    # 1. What the cache is like.
    like = _past(model, 1, 2)
    if not like:
        raise ValueError(
            f"model: the cache of {type(model).__name__} is not one that keeps every token's keys "
            "and values, which is the one that is written; pass cache=False"
        )
    # 2. Tokens after a past, and without one.
    placed = "position_ids" in accepted
    batches = []
    for items, length, past in ((2, TOKENS, PAST), (1, TOKENS + 2, 0), (3, 1, PAST + 1)):
        mask = torch.ones(items, past + length, dtype=torch.long)
        if past:
            mask[1:, 0] = 0
        tensors = [_tokens(config, (items, length)), mask]
        if placed:
            tensors.append(torch.arange(past, past + length).expand(items, -1))
        # Of tokens: any numbers would be no keys, and enlarge every rounding that follows.
        before = _past(model, items, max(past, 1)) or []
        batches.append((*tensors, *(one[:, :, :past].contiguous() for one in before)))
    # 3. Their names.
    own = ["input_ids", "attention_mask", *(["position_ids"] if placed else [])]
    axes: list[Axes] = [{0: "batch", 1: "sequence"} for _ in own]
    axes[1] = {0: "batch", 1: "past_and_sequence"}
    axes += [{0: "batch", 2: "past"} for _ in like]
    cached = [cache_name("past_key_values", place) for place in range(len(like))]
    return Example(
        names=(*own, *cached), axes=tuple(axes), batches=tuple(batches), cached=len(like)
    )


def _past(model: Any, items: int, length: int) -> list[Tensor] | None:
    """Keys and values of some tokens; ``None`` where the cache is of another kind."""
    with torch.no_grad():
        given = model(input_ids=_tokens(model.config, (items, length)), use_cache=True)
    return cached_tensors(getattr(given, "past_key_values", None))
