"""Losses by name, from torch's loss modules and from functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from curvprune.model.forward import Batch, evaluating
from curvprune.model.losses.families import Poisson
from curvprune.model.losses.label_free import LabelFree
from curvprune.model.losses.loss import Loss
from curvprune.model.losses.positions import Objective, PositionLoss
from curvprune.model.losses.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    MultiLabel,
    OutputLoss,
    QuestionAnswering,
    Regression,
    Segmentation,
    Seq2Seq,
    labels_of,
)
from curvprune.model.losses.telling import Ending, check_are_logits, tell, tell_by_class

LOSSES: dict[str, Callable[[], PositionLoss]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "masked-lm": MaskedLM,
    "multi-label": MultiLabel,
    "poisson": lambda: OutputLoss(Poisson()),
    "question-answering": QuestionAnswering,
    "regression": Regression,
    "segmentation": Segmentation,
    "seq2seq": Seq2Seq,
}
FREE = "label-free"
# Those whose outputs are a distribution without a scale that only the user knows.
FREE_OF = tuple(f"{FREE}:{name}" for name in LOSSES if name not in ("regression", "poisson"))
NAMES = ("auto", *LOSSES, FREE, *FREE_OF)


LossLike = str | Loss | nn.Module  # what verbs take as their loss
P = ParamSpec("P")
R = TypeVar("R")


def named_loss(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that also takes ``objective=``, the earlier name of its argument ``loss``."""

    @wraps(verb)
    def called(*args: P.args, **named: P.kwargs) -> R:
        if "objective" in named:
            if "loss" in named:
                raise ValueError(
                    f"{verb.__name__}: loss and objective are two names of one argument; pass loss"
                )
            named["loss"] = named.pop("objective")
        return verb(*args, **named)

    return called


def make_loss(loss: LossLike, model: nn.Module, batch: Batch) -> Loss:
    """Turn a name or a loss module of torch into a `Loss`; ``"auto"`` reads it off the model's
    class, its config and its labels.

    ``"label-free"`` keeps ``model`` as its reference: the caller must hand over a copy that stays
    uncompressed. ``"label-free:classification"`` says which loss its outputs belong to.

    Raises ``ValueError`` when the loss cannot be told, or outputs that are not what it takes them
    for, or a model that fails on the batch. Cost: up to two forward passes over ``batch``.
    """
    with _saying_what_failed(model, batch):
        return _made(loss, model, batch)


@contextmanager
def _saying_what_failed(model: nn.Module, batch: Batch) -> Iterator[None]:
    """An error of the model's own on its first batch, with what it was given."""
    try:
        yield
    # It is a RuntimeError too, but says nothing about the batch.
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:
        given = dict(batch) if isinstance(batch, Mapping) else {"inputs": batch[0]}
        shown = []
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                shown.append(f"{name}: {value.dtype} {tuple(value.shape)}")
        kinds = sorted({str(weight.dtype) for weight in model.parameters()})
        raise ValueError(
            f"{type(model).__name__} fails on the first batch ({', '.join(shown)}; parameters "
            f"{', '.join(kinds)}): {type(error).__name__}: {str(error).strip().splitlines()[0]}; "
            "give it batches that model(inputs), or model(**batch) without labels, can read"
        ) from error


def _made(loss: LossLike, model: nn.Module, batch: Batch) -> Loss:
    if isinstance(loss, Loss):
        _check_declared(loss, model, batch)
        return loss
    if isinstance(loss, nn.Module):
        meant = _of_module(loss)
        _check_declared(meant, model, batch)
        return meant
    if callable(loss):
        raise ValueError(
            "loss is a function: pass cp.Loss.of(function, outputs='model') for one of (outputs, "
            "batch), cp.Loss.of(function) for one of (model, batch)"
        )
    if not isinstance(loss, str) or loss not in NAMES:
        raise ValueError(
            f"loss={loss!r}: expected {', '.join(NAMES)}, a cp.Loss (an Objective is one), or one "
            "of torch's loss modules"
        )
    if loss in LOSSES:
        named = LOSSES[loss]()
        _check_declared(named, model, batch)
        return named
    by_class = tell_by_class(model, batch)
    # A language model's labels are its own tokens.
    if loss == "auto" and (_has_labels(batch) or isinstance(by_class, CausalLM)):
        return tell(model, batch)
    if loss.startswith(f"{FREE}:"):
        return LabelFree(model, of=LOSSES[loss.split(":")[1]]())
    return _label_free(model, batch)


def _has_labels(batch: Batch) -> bool:
    return labels_of(batch) is not None or "start_positions" in batch


def _label_free(model: nn.Module, batch: Batch) -> LabelFree:
    """Which distribution it is of is asked where it is first needed: a rounding without a budget
    measures no divergence."""
    by_class = tell_by_class(model, batch)
    if isinstance(by_class, QuestionAnswering):  # which returns no logits
        return LabelFree(model, of=by_class)
    with torch.no_grad(), evaluating(model):
        per_token = Objective().outputs(model, batch).ndim == 3
    return LabelFree(model, per_token=per_token)


def _check_declared(loss: Loss, model: nn.Module, batch: Batch) -> None:
    """Whether the outputs can be what the user says that they are."""
    if not isinstance(loss, (Classification, MultiLabel)) or loss.curvature != "closed form":
        return
    if isinstance(loss, (MaskedLM, Seq2Seq)) or tell_by_class(model, batch) is not None:
        return
    try:
        with torch.no_grad(), evaluating(model):
            with Ending() as ending:
                outputs = loss.outputs(model, batch)
            rows = loss.places(outputs, batch).logits
    except (IndexError, RuntimeError):
        return  # An item that the model cannot read is for the check of the items to name.
    check_are_logits(loss, rows, probabilities=ending.made(outputs), embeddings=False)


def _of_module(module: nn.Module) -> Loss:
    """A loss module of torch, with its weights and settings. Whether it takes the mean or the sum
    does not matter: means are over positions here."""
    if isinstance(module, nn.CrossEntropyLoss):
        return Classification(
            class_axis=1,
            weight=module.weight,
            label_smoothing=module.label_smoothing,
            ignore_index=module.ignore_index,
        )
    if isinstance(module, nn.BCEWithLogitsLoss):
        return MultiLabel(weight=module.weight, pos_weight=module.pos_weight)
    if isinstance(module, nn.MSELoss):
        return Regression()
    if isinstance(module, nn.PoissonNLLLoss) and module.log_input and not module.full:
        return OutputLoss(Poisson())

    def compared(outputs: Any, batch: Batch) -> Any:
        labels = labels_of(batch)
        if labels is None:
            raise ValueError(f"{type(module).__name__}: the batch has no labels")
        return module(outputs, labels)

    return Loss.of(compared, outputs="model", name=type(module).__name__)
