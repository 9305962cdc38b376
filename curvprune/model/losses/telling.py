"""Which loss a model is trained with, told from its class, its config and the data's labels; and
whether its outputs are what that loss takes them for. Where it cannot be told, it is refused: a
loss is never guessed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvprune.model.forward import Batch, evaluating
from curvprune.model.losses.positions import Objective, PositionLoss
from curvprune.model.losses.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Segmentation,
    Seq2Seq,
    labels_of,
)

# How the names of transformers' classes end, and the loss of those models.
_ENDINGS: tuple[tuple[str, Callable[[], PositionLoss]], ...] = (
    ("ForCausalLM", CausalLM),
    ("LMHeadModel", CausalLM),
    ("GenerationDecoder", CausalLM),
    ("ReformerModelWithLMHead", CausalLM),
    ("ForVisionText2Text", CausalLM),
    ("ForProteinText2Text", CausalLM),
    ("ForTextToText", Seq2Seq),
    ("ForSpeechToText", Seq2Seq),
    ("ForMaskedLM", MaskedLM),
    ("ForTokenClassification", Classification),
    ("ForAudioFrameClassification", MultiLabel),
    ("ForMultipleChoice", Classification),
    ("ForNextSentencePrediction", Classification),
    ("ForSemanticSegmentation", Segmentation),
    ("ForQuestionAnswering", QuestionAnswering),
    ("MTModel", Seq2Seq),
    ("EncoderDecoderModel", Seq2Seq),
)
# Those whose config says, or leaves open, what their labels are.
_BY_PROBLEM = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
    "ForImageClassificationLearned",
    "ForImageClassificationFourier",
    "ForImageClassificationConvProcessing",
    "ForAudioClassification",
)
_PROBLEMS: dict[str, Callable[[], PositionLoss]] = {
    "regression": Regression,
    "single_label_classification": Classification,
    "multi_label_classification": MultiLabel,
}
_ENOUGH = 64  # outputs, all between 0 and 1, that are no coincidence
_ROWS = 8  # sums of half-precision numbers, all 1, that are none
_PROBABILITIES = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax")  # functions of torch
_FITTING = (
    "loss='classification' (one class for each item or token), 'segmentation' (classes in the "
    "second dimension), 'multi-label', 'regression', 'causal-lm', 'masked-lm', 'seq2seq', a "
    "cp.Loss, or cp.Loss.of(function, outputs='model')"
)
_FITTING_WITHOUT = (
    "cp.LabelFree(model, of=cp.Classification()) for the logits of classes, with class_axis=1 if "
    "they are the second dimension; of=cp.MultiLabel() for independent sigmoids; "
    "of=cp.Regression(sigma=...) for numbers whose error has that scale; in a recipe "
    "loss: label-free:classification and the like"
)


class Untold(ValueError):
    """Neither the model nor the data say what its outputs are."""


def tell(model: nn.Module, batch: Batch) -> PositionLoss:
    """The loss that a model's class, its config and the labels speak for.

    Raises ``ValueError`` with those that may fit where it cannot be told.
    """
    found = tell_by_class(model, batch)
    if found is not None:
        return found
    with torch.no_grad(), evaluating(model):
        outputs = Objective().outputs(model, batch)
        found = _by_labels(outputs, batch)
        if found is None:
            raise Untold(
                f"{type(model).__name__} with outputs {tuple(outputs.shape)} and "
                f"{_told_of(labels_of(batch))}: cannot tell what its loss is; pass {_FITTING}; "
                f"without labels {_FITTING_WITHOUT}"
            )
        with Ending() as ending:
            outputs = found.outputs(model, batch)
        rows = found.places(outputs, batch).logits
    check_are_logits(found, rows, probabilities=ending.made(outputs))
    return found


def tell_without_labels(model: nn.Module, batch: Batch) -> PositionLoss:
    """The loss whose outputs a model returns, where the data's labels are not used. Raises
    ``ValueError`` where that is not known."""
    found = tell_by_class(model, batch)
    if found is not None:
        return found
    with torch.no_grad(), evaluating(model):
        outputs = Objective().outputs(model, batch)
    found = _by_labels(outputs, batch)
    if found is None:
        raise Untold(
            f"label-free: {type(model).__name__} returns {tuple(outputs.shape)}, and neither its "
            "class nor labels say what these numbers are, so how far two models are apart is a "
            f"guess; pass {_FITTING_WITHOUT}"
        )
    return found


def class_names(model: nn.Module) -> list[str]:
    """Names of the model's class and of those that it comes from; of a wrapper with adapters,
    those of the model inside."""
    inside = getattr(model, "get_base_model", None)
    own = inside() if callable(inside) else model
    return [kind.__name__ for kind in type(own).__mro__]


def tell_by_class(model: nn.Module, batch: Batch) -> PositionLoss | None:
    """By the names and config of transformers' models; ``None`` for others."""
    found = _by_name(model, batch)
    # What these models return are logits.
    if isinstance(found, (Classification, MultiLabel)):
        found.probabilities = False
    return found


def _by_name(model: nn.Module, batch: Batch) -> PositionLoss | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    for name in class_names(model):
        for ending, loss in _ENDINGS:
            if name.endswith(ending):
                return loss()
        if name.endswith("ForConditionalGeneration"):
            if getattr(config, "is_encoder_decoder", False):
                return Seq2Seq()
            return CausalLM(never=_stand_ins(config))
        if name.endswith(_BY_PROBLEM):
            return _by_problem(config, labels_of(batch))
    return None


def _stand_ins(config: Any) -> list[int]:
    """Tokens that stand for pieces of an image or of sound: nobody predicts them."""
    found = []
    for kind in ("image", "video", "audio"):
        for ending in ("token_id", "token_index"):
            token = getattr(config, f"{kind}_{ending}", None)
            if isinstance(token, int):
                found.append(token)
    return found


def _by_problem(config: Any, labels: Tensor | None) -> PositionLoss | None:
    """What transformers' classifiers compute: told by ``problem_type``, else by the number of
    outputs and the labels' type."""
    problem = getattr(config, "problem_type", None)
    if problem in _PROBLEMS:
        return _PROBLEMS[problem]()
    if getattr(config, "num_labels", None) == 1:
        return Regression()
    if labels is None:
        return None
    several = labels.ndim > 1 and labels.shape[-1] > 1
    return MultiLabel() if several or labels.is_floating_point() else Classification()


def _by_labels(outputs: Tensor, batch: Batch) -> PositionLoss | None:
    """By labels that can be nothing but the indices of classes, of which there is one for each item
    or, in the second dimension, for each pixel."""
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    # One class is none. A label beyond the classes is for the check of the items to name.
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return None
    if outputs.ndim == 2 and labels.shape == outputs.shape[:1]:
        return Classification()
    pixels = (outputs.shape[0], *outputs.shape[2:])
    if outputs.ndim == 4 and labels.shape == pixels and labels.shape != outputs.shape[:-1]:
        return Segmentation()
    return None


def _told_of(labels: Tensor | None) -> str:
    if labels is None:
        return "no labels"
    return f"labels {tuple(labels.shape)} of {labels.dtype}"


class Ending(TorchFunctionMode):
    """Watches a forward pass for the sigmoids and softmaxes that it ends in."""

    def __init__(self) -> None:
        super().__init__()
        # Kept, so that no other tensor takes their place in memory; the last ones, because those
        # of attention are large.
        self.results: deque[Tensor] = deque(maxlen=2)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PROBABILITIES and isinstance(result, Tensor):
            self.results.append(result)
        return result

    def made(self, outputs: Tensor) -> bool:
        """Whether the outputs are what one of them returned, or a view of it."""
        return any(result.data_ptr() == outputs.data_ptr() for result in self.results)


def check_are_logits(
    loss: PositionLoss, rows: Tensor, *, probabilities: bool, embeddings: bool = True
) -> None:
    """Whether outputs can be the logits that a softmax or independent sigmoids take.

    Args:
        loss: one whose ``probabilities`` are given has been told what its outputs are.
        probabilities: the forward pass was seen to end in a sigmoid or a softmax.
        embeddings: whether vectors of length one are refused too.

    Raises ``ValueError`` for what looks like probabilities, or like embeddings.
    """
    loss.family.check(rows)
    if not isinstance(loss, (Classification, MultiLabel)) or not rows.numel():
        return
    if loss.probabilities is not None:
        return
    found = rows.detach().float()
    # Outputs that are all the same are those of a head that has not been trained.
    inside = bool(((found >= 0) & (found <= 1)).all()) and bool(found.max() > found.min())
    if inside and _all_one(found.sum(-1), rows.dtype):
        raise ValueError(
            "the model's outputs are probabilities (each row sums to 1), no logits: its softmax "
            "is a part of the model; pass cp.Classification(probabilities=True), without labels "
            "cp.LabelFree(model, of=cp.Classification(probabilities=True)); if they are logits all "
            "the same, probabilities=False"
        )
    if probabilities or (inside and found.numel() >= _ENOUGH):
        raise ValueError(
            "the model's outputs all lie between 0 and 1, as a sigmoid's do: whether they are "
            "logits is a guess; pass cp.MultiLabel(probabilities=True) for probabilities of "
            "independent labels, cp.Classification(probabilities=False) for logits of classes, "
            "without labels cp.LabelFree(model, of=...) with one of these"
        )
    if embeddings and _all_one(torch.linalg.vector_norm(found, dim=-1), rows.dtype):
        raise ValueError(
            "the model's outputs are vectors of length one, embeddings and no logits; pass a "
            "function to logits, cp.LabelFree(model, of=lambda output, batch: ...), such as the "
            "similarities to other embeddings over a temperature, or a metric to certify"
        )


def _all_one(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all are 1 to rounding. One row may be so by chance where rounding is coarse."""
    rounding = min(32 * torch.finfo(dtype).eps, 5e-3)
    if rounding > 1e-4 and values.numel() < _ROWS:
        return False
    return bool(((values - 1).abs() <= rounding).all())
