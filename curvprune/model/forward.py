"""A batch, and a model's forward pass over it: on a device, in evaluation mode, without labels.

A batch is a dict of tensors as transformers models take them (labels optional) or a pair ``(inputs,
targets)``; the first dimension of every tensor counts items.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor]


def check_device(device: torch.device | str) -> None:
    """Raises ``ValueError`` for a kind of device without float64, in which losses and prices are
    added up: Apple's ``mps``."""
    if torch.device(device).type == "mps":
        raise ValueError(
            f"device {str(device)!r} has no float64, in which losses are added up; use the CPU: "
            "model.to('cpu'), device='cpu', or device: cpu in a recipe"
        )


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on ``device``. Raises ``ValueError`` as `check_device` does."""
    check_device(device)
    if not isinstance(batch, Mapping):
        return batch[0].to(device), batch[1].to(device)
    moved = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
    return moved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode (dropout off, BatchNorm frozen), restored module by module afterwards, also
    after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        # Not by ``train()``, which would give all modules below the mode of the one above.
        for module, mode in modes:
            module.training = mode


# Entries of a batch that a loss reads and a model does not.
TARGETS = ("labels", "start_positions", "end_positions", "sample_weight")


def outputs(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch, called without its labels and without a cache. One
    forward pass."""
    if not isinstance(batch, Mapping):
        return model(batch[0])
    inputs: dict[str, Any] = {name: v for name, v in batch.items() if name not in TARGETS}
    config = getattr(model, "config", None)
    # Keys and values of earlier tokens take memory, and nobody asks for a next token here.
    if getattr(config, "use_cache", False):
        inputs["use_cache"] = False
    # A decoder beside an encoder reads the target, shifted by one.
    two_parts = getattr(config, "is_encoder_decoder", False) and "labels" in batch
    if two_parts and not any(name.startswith("decoder_input") for name in inputs):
        inputs["decoder_input_ids"] = _shifted(model, batch["labels"])
    inputs = _with_padding(model, inputs)
    return model(inputs) if _takes_whole(model, inputs) else model(**inputs)


def _takes_whole(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model takes the dict as it is, its only argument, not its entries by name."""
    try:
        given = inspect.signature(model.forward).parameters.values()
    except ValueError:  # of a traced module, say
        return False
    kinds = [argument.kind for argument in given]
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return False
    needed = [argument.name for argument in given if argument.default is argument.empty]
    return len(needed) == 1 and needed[0] not in inputs


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder sees when it is to say ``labels``: a start token, then all but the last."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(own):
        return own(labels=labels)
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(model).__name__}: its config has no decoder_start_token_id; give the batch its "
            "decoder_input_ids"
        )
    shifted = labels.roll(1, -1)
    shifted[:, 0] = start
    pad = getattr(config, "pad_token_id", None)
    return shifted.masked_fill(shifted == -100, pad or 0)


def in_double(batch: Batch) -> Batch:
    """The batch with its numbers in float64, beside outputs in float64."""
    if not isinstance(batch, Mapping):
        return _double(batch[0]), _double(batch[1])
    return {name: _double(value) for name, value in batch.items()}


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def one_item(batch: Batch, number: int) -> Batch:
    """One item of a batch, as a batch of one."""
    place = slice(number, number + 1)
    if not isinstance(batch, Mapping):
        return batch[0][place], batch[1][place]
    item = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            item[name] = value[place]
    return item


def items_in(batch: Batch) -> int:
    """The number of items of a batch."""
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


def _with_padding(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the model's own padding token where the mask says that there is padding.

    Some models tell padding by its token, whatever the mask says: classifiers made of decoders look
    for the last token that is none, RoBERTa counts its positions by them.
    """
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if pad is None or not isinstance(tokens, Tensor) or not isinstance(mask, Tensor):
        return inputs
    if mask.shape != tokens.shape or bool((mask != 0).all()):
        return inputs
    if pad < 0:
        raise ValueError(
            f"{type(model).__name__}: config.pad_token_id is {pad}, no token, and sequences of "
            "different length must be padded; set model.config.pad_token_id to the tokenizer's"
        )
    return {**inputs, "input_ids": tokens.masked_fill(mask == 0, pad)}
