"""A batch, and a model's forward pass over it: on a device, in evaluation mode, without labels.

A batch is a dict of tensors as transformers models take them (labels optional) or a pair ``(inputs,
targets)``; the first dimension of every tensor counts items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor]


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on ``device``."""
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


def outputs(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch, called without its labels and without a cache. One
    forward pass."""
    if not isinstance(batch, Mapping):
        return model(batch[0])
    inputs: dict[str, Tensor | bool] = {**batch}
    inputs.pop("labels", None)
    # Keys and values of earlier tokens take memory, and nobody asks for a next token here.
    if getattr(getattr(model, "config", None), "use_cache", False):
        inputs["use_cache"] = False
    return model(**inputs)
