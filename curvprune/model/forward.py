"""A batch, and a model's forward pass over it: on a device, in evaluation mode, without labels.

A batch is a dict of tensors as transformers models take them (labels optional), a pair ``(inputs,
targets)``, or ``(inputs,)`` alone; the first dimension of every tensor counts items. Where the rows
of some tensors are no items, as patches of images are none, the dict is a `Gathered` one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

Batch = Mapping[str, Tensor] | tuple[Tensor, ...]


class Gathered(dict[str, Tensor]):
    """A dict batch in which the rows of some tensors are no items: patches or tiles of images.

    Attributes:
        count: the number of items.
        rows: of these tensors, how many rows belong to each item; they lie one item after another.
            All others have one row for each.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, count: int, rows: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(tensors)
        self.count, self.rows = count, dict(rows)

    @property
    def can_be_taken_apart(self) -> bool:
        """Whether it is known which rows belong to which item: not of a packed sequence, which its
        user has put together."""
        for name, value in self.items():
            if name not in self.rows and value.shape[axis_of(name, value)] != self.count:
                return False
        return True

    def take(self, places: slice | Tensor | Sequence[int]) -> Gathered:
        """Some of the items."""
        numbers = torch.arange(self.count)
        chosen = numbers[places if isinstance(places, slice) else torch.as_tensor(places).cpu()]
        found, rows = {}, {}
        for name, value in self.items():
            if name not in self.rows:
                found[name] = value.index_select(axis_of(name, value), chosen.to(value.device))
                continue
            parts = value.split(list(self.rows[name]))
            found[name] = torch.cat([parts[i] for i in chosen.tolist()])
            rows[name] = tuple(self.rows[name][i] for i in chosen.tolist())
        return Gathered(found, count=len(chosen), rows=rows)


def axis_of(name: str, value: Tensor) -> int:
    """The dimension that counts items: the first, but of positions in several axes (time, height,
    width) the second."""
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed, as many rows as before."""
    if not isinstance(batch, Mapping):
        return tuple(change(value) for value in batch)
    found = {}
    for name, value in batch.items():
        found[name] = change(value) if isinstance(value, Tensor) else value
    if isinstance(batch, Gathered):
        return Gathered(found, count=batch.count, rows=batch.rows)
    return found


def take(batch: Batch, places: slice | Tensor | Sequence[int]) -> Batch:
    """Some of a batch's items, as a batch."""
    if isinstance(batch, Gathered):
        return batch.take(places)
    if not isinstance(batch, Mapping):
        return tuple(value[places] for value in batch)
    found = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            before = (slice(None),) * axis_of(name, value)
            value = value[(*before, places)]
        found[name] = value
    return found


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
    return changed(batch, lambda value: value.to(device))


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
    config = getattr(model, "config", None)
    # Keys and values of earlier tokens take memory, and nobody asks for a next token here.
    cache = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    if not isinstance(batch, Mapping):
        return model(batch[0], **cache)
    inputs: dict[str, Any] = {name: v for name, v in batch.items() if name not in TARGETS}
    inputs.update(cache)
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
    return changed(batch, lambda value: value.double() if value.is_floating_point() else value)


def one_item(batch: Batch, number: int) -> Batch:
    """One item of a batch, as a batch of one."""
    return take(batch, slice(number, number + 1))


def items_in(batch: Batch) -> int:
    """The number of items of a batch."""
    if isinstance(batch, Gathered):
        return batch.count
    if not isinstance(batch, Mapping):
        return len(batch[0])
    name, value = next(iter(batch.items()))
    return value.shape[axis_of(name, value)]


HIDDEN = -1e4  # what is added to a score of attention to hide a position is at most this


def padding_mask(batch: Batch, prefix: str = "") -> Bool[Tensor, "items tokens"] | None:
    """Which positions of a sequence are no padding, read off its attention mask; ``None`` if there
    is none, or if it hides nothing.

    A mask ``(items, tokens)`` is one of zeros where it hides, or, of floats none above 0, one that
    is added to scores: 0, or at most `HIDDEN` where it hides. Of a mask for every query ``(items,
    1, queries, tokens)``, or one without the heads, a position is padding if it does not even see
    itself.

    Args:
        prefix: ``"decoder_"`` for the decoder's.

    Raises ``ValueError`` for a mask that does not tell.
    """
    mask = batch.get(f"{prefix}attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    seen = _visible(mask)
    if mask.ndim == 2:
        return seen
    if mask.ndim not in (3, 4) or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(
            f"{prefix}attention_mask of shape {tuple(mask.shape)} does not say what is padding; "
            "expected (items, tokens), or (items, 1, tokens, tokens)"
        )
    # One head is as good as another here, if a position is hidden from all.
    rows = seen.flatten(1, -3).any(1) if mask.ndim == 4 else seen
    # Some make padding see all, so that no row is empty: it cannot be told from the others then.
    first_sees_all = rows[:, 0].all(-1)
    if bool((first_sees_all & ~rows.flatten(1).all(-1)).any()):
        raise ValueError(
            f"{prefix}attention_mask of shape {tuple(mask.shape)} lets the first position see all "
            "and others not, so it does not say what is padding; pass the mask (items, tokens), or "
            "items of one length without padding"
        )
    kept = rows.diagonal(dim1=-2, dim2=-1)
    return None if bool(kept.all()) else kept


def _visible(mask: Tensor) -> Tensor:
    if mask.is_floating_point() and not bool((mask > 0).any()):
        return mask > HIDDEN
    return mask != 0


def _with_padding(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the model's own padding token where the mask says that there is padding.

    Some models tell padding by its token, whatever the mask says: classifiers made of decoders look
    for the last token that is none, RoBERTa counts its positions by them.
    """
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if pad is None or not isinstance(tokens, Tensor) or not isinstance(mask, Tensor):
        return inputs
    if mask.shape != tokens.shape:
        return inputs
    kept = _visible(mask)
    if bool(kept.all()):
        return inputs
    if pad < 0:
        raise ValueError(
            f"{type(model).__name__}: config.pad_token_id is {pad}, no token, and sequences of "
            "different length must be padded; set model.config.pad_token_id to the tokenizer's"
        )
    return {**inputs, "input_ids": tokens.masked_fill(~kept, pad)}
