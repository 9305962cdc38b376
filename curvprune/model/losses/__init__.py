"""What "loss" means for a model, and the curvature of each loss at the model's outputs.

    what a loss is; any function as one          loss, any_function
    sums over positions, in closed form          positions, families
    the losses of usual tasks                    tasks
    divergence from another model                label_free, divergence
    which loss a model has; by name              telling, named
    curvature at the outputs by differentiation  output_hessian

Nothing outside this package may assume a softmax.
"""

from curvprune.model.losses.divergence import (
    Divergence,
    agreement_of,
    divergences_of,
    has_guesses,
    positions_that_count,
    unlabelled_positions,
)
from curvprune.model.losses.families import (
    Bernoulli,
    Exponential,
    Family,
    Gaussian,
    NegativeBinomial,
    Poisson,
    Softmax,
)
from curvprune.model.losses.label_free import LabelFree
from curvprune.model.losses.loss import BROKEN, ItemResults, Loss
from curvprune.model.losses.named import NAMES, LossLike, make_loss, named_loss
from curvprune.model.losses.positions import Objective, PositionLoss, Positions
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
)
from curvprune.model.losses.telling import Untold

__all__ = [
    "BROKEN",
    "NAMES",
    "Bernoulli",
    "CausalLM",
    "Classification",
    "Divergence",
    "Exponential",
    "Family",
    "Gaussian",
    "ItemResults",
    "LabelFree",
    "Loss",
    "LossLike",
    "MaskedLM",
    "MultiLabel",
    "NegativeBinomial",
    "Objective",
    "OutputLoss",
    "Poisson",
    "PositionLoss",
    "Positions",
    "QuestionAnswering",
    "Regression",
    "Segmentation",
    "Seq2Seq",
    "Softmax",
    "Untold",
    "agreement_of",
    "divergences_of",
    "has_guesses",
    "make_loss",
    "named_loss",
    "positions_that_count",
    "unlabelled_positions",
]
