"""What the outputs at one position mean, and the curvature that follows from it.

A family is a distribution of the target, given the ``k`` outputs ``z`` of a position. Its loss is
``−log p(y | z)`` in nats, up to a constant of ``y``.

    family        loss                      Hessian at the outputs   a draw with that covariance
    Softmax       lse(z) − z_y              diag(p) − p pᵀ           s∘√p − p (s·√p)
    Separate      A(z) − y z, per output    diag(A″(z))              s∘√A″(z)

``s`` are random signs and ``A`` is the log-partition of an exponential family in its canonical
parameter: of Bernoulli, Poisson, Gaussian, exponential and negative binomial targets. None of the
Hessians depends on the target.

Source: Martens 2020, "New insights and perspectives on the natural gradient method", §9; Wainwright
& Jordan 2008, "Graphical models, exponential families, and variational inference", §3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

IGNORED = -100  # the label that torch and transformers skip


class Family(ABC):
    """What the outputs of one position say of its target. All methods work row by row.

    Attributes:
        name: for messages and records.
        distribution: the outputs determine a distribution of the target, so that two models have
            a divergence.
        has_accuracy: a prediction is right or wrong.
    """

    name: str
    distribution: bool = True
    has_accuracy: bool = False

    @abstractmethod
    def losses(self, rows: Float[Tensor, "n k"], targets: Tensor) -> Float[Tensor, " n"]:
        """Loss of each row, in nats; differentiable. Raises ``ValueError`` for targets of another
        form."""

    @abstractmethod
    def draws(self, rows: Float[Tensor, "n k"], generator: torch.Generator) -> Tensor:
        """Vectors ``(n, k)`` of mean zero whose covariance is the Hessian at the row, from random
        signs."""

    @abstractmethod
    def scores(self, rows: Float[Tensor, "n k"], generator: torch.Generator) -> Tensor:
        """Gradients ``(n, k)`` of ``−log p(ŷ | z)`` for targets ŷ sampled from the rows
        themselves."""

    @abstractmethod
    def hessians(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k k"]:
        """The Hessian at each row, in float64."""

    @abstractmethod
    def diagonals(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The diagonal of the Hessian at each row."""

    def root_columns(self, rows: Float[Tensor, "n k"]) -> Iterator[Float[Tensor, "n k"]]:
        """``k`` vectors for each row, whose outer products sum to the Hessian there."""
        values, vectors = torch.linalg.eigh(self.hessians(rows))
        roots = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(rows.dtype)
        yield from roots.unbind(-1)

    @abstractmethod
    def divergences(self, before: Float[Tensor, "n k"], after: Float[Tensor, "n k"]) -> Tensor:
        """KL divergence ``(n,)`` of what ``after`` says from what ``before`` says, in nats."""

    def scales(
        self, targets: Tensor
    ) -> (
        Float[
            Tensor,
            (
                n  # k
            ),
        ]
        | None
    ):
        """s where the loss weighs its targets: the Hessian is ``√s ∘ hessians ∘ √s`` then."""
        return None

    def counts(self, rows: Tensor, targets: Tensor | None) -> Float[Tensor, " n"] | None:
        """What each row counts in the mean, as torch's own mean has it; ``None``: one."""
        return None

    def right(self, rows: Float[Tensor, "n k"], targets: Tensor) -> Tensor | None:
        """Whether each row's best guess is the target; ``None`` where there is no such notion."""
        return None

    def guesses(self, rows: Float[Tensor, "n k"]) -> Tensor | None:
        """The best guess of each row, in the form of `right`'s targets."""
        return None

    def check(self, rows: Float[Tensor, "n k"]) -> None:
        """Raises ``ValueError`` for outputs that cannot be this family's parameters."""
        return None


def random_signs(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Whether each sign is plus. From the CPU generator, so that draws do not depend on the
    device."""
    signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
    return signs.to(rows.device).bool()


# ------------------------------------------------------------------------------------------ softmax


class Softmax(Family):
    """One of ``k`` classes, with logits ``z``.

    Args:
        weight: what each class counts, ``(k,)``: torch's ``weight``.
        smoothing: torch's ``label_smoothing``.
    """

    name = "softmax"
    has_accuracy = True

    def __init__(self, weight: Tensor | None = None, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing={smoothing!r}: expected a number from 0 to 1")
        self.weight, self.smoothing = weight, smoothing

    def check(self, rows: Tensor) -> None:
        if rows.shape[-1] == 1:
            raise ValueError(
                "one output is no distribution over classes: its softmax is 1 whatever the model "
                "says; for a yes or no use loss='multi-label', for a number loss='regression'"
            )

    def losses(self, rows: Tensor, targets: Tensor) -> Tensor:
        soft = targets.ndim == rows.ndim
        given = targets.to(rows.dtype) if soft else class_indices(targets)
        weight = self._weight(rows)
        return F.cross_entropy(
            rows, given, weight=weight, label_smoothing=self.smoothing, reduction="none"
        )

    def _weight(self, rows: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(rows.device, rows.dtype)

    def scales(self, targets: Tensor) -> Tensor | None:
        # The loss is Σ a_c (lse(z) − z_c) with a = weight ∘ smoothed target: Σ a_c times the
        # Hessian of lse.
        if self.weight is None:
            return None
        weight = self.weight.to(targets.device)
        if targets.is_floating_point():
            own = (targets * weight).sum(-1)
        else:
            own = weight[class_indices(targets)]
        total = (1 - self.smoothing) * own + self.smoothing * weight.mean()
        return total.unsqueeze(-1)

    def counts(self, rows: Tensor, targets: Tensor | None) -> Tensor | None:
        if self.weight is None or targets is None or targets.is_floating_point():
            return None
        return self.weight.to(targets.device)[class_indices(targets)]

    def draws(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        # v = s∘√p − p (s·√p), where s·√p is the sum of the first term. Every class takes part in
        # every draw, where a sampled label shows a rare class rarely and then with a large
        # gradient: per image of a classifier the squares vary four times less.
        p = rows.softmax(-1)
        v = p.sqrt()
        v = torch.where(random_signs(p, generator), v, -v)
        v -= p * v.sum(-1, keepdim=True)
        return v

    def scores(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        # 1. F(y) = p(0) + … + p(y), and u uniform in [0, 1), for every position.
        p = rows.softmax(-1)
        cumulative = p.cumsum(-1)
        uniform = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
        # 2. ŷ is the first class with F(ŷ) > u. Scaling by the last entry keeps it inside the
        # classes where the sum rounds to less than one.
        aim = uniform.to(rows.device).to(cumulative.dtype) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, aim, right=True).clamp_(max=rows.shape[-1] - 1)
        # 3. The gradient of −log p(ŷ) is p − e_ŷ.
        return p.scatter_add(-1, drawn, torch.full_like(aim, -1.0))

    def hessians(self, rows: Tensor) -> Tensor:
        p = rows.double().softmax(-1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def diagonals(self, rows: Tensor) -> Tensor:
        p = rows.softmax(-1)
        return p - p.square()

    def root_columns(self, rows: Tensor) -> Iterator[Tensor]:
        # √p_c (e_c − p): their outer products sum to Σ p_c e_c e_cᵀ − p pᵀ.
        p = rows.softmax(-1)
        for c in range(rows.shape[-1]):
            column = -p
            column[:, c] += 1
            yield column * p[:, c : c + 1].sqrt()

    def divergences(self, before: Tensor, after: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(before, -1), F.log_softmax(after, -1)
        p = log_p.exp()
        # A class that cannot be (−∞) adds nothing, whatever the other model says of it.
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    def right(self, rows: Tensor, targets: Tensor) -> Tensor:
        best = targets.argmax(-1) if targets.ndim == rows.ndim else targets
        return rows.argmax(-1) == best

    def guesses(self, rows: Tensor) -> Tensor:
        return rows.argmax(-1)


def class_indices(labels: Tensor) -> Tensor:
    """Labels as int64, in which −100 is itself: among uint8 it would be 156."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels of type {labels.dtype}: expected whole numbers, the index of a class; for "
            "targets of another kind pass a loss that is made for them (loss='regression', "
            "'multi-label', a cp.Loss, or objective='label-free')"
        )
    return labels.long()


# ------------------------------------------------------------------- one parameter for each output


class Separate(Family):
    """Outputs that each are the canonical parameter of a target of their own: ``A(z) − y z``.

    Subclasses say what ``A`` is, its first two derivatives and how targets are sampled.
    """

    @abstractmethod
    def log_partition(self, z: Tensor) -> Tensor:
        """``A(z)``."""

    @abstractmethod
    def means(self, z: Tensor) -> Tensor:
        """``A′(z)``, the mean of the target."""

    @abstractmethod
    def variances(self, z: Tensor) -> Tensor:
        """``A″(z)``, the target's variance."""

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Targets ŷ with parameter ``z``, on the CPU."""

    def losses(self, rows: Tensor, targets: Tensor) -> Tensor:
        return self._elements(rows, self._fitting(rows, targets)).sum(-1)

    def _elements(self, rows: Tensor, targets: Tensor) -> Tensor:
        return self.log_partition(rows) - targets * rows

    def _fitting(self, rows: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != rows.shape:
            raise ValueError(
                f"{self.name}: targets of {targets.shape[-1] if targets.ndim > 1 else 1} numbers a "
                f"position for {rows.shape[-1]} outputs; expected one target for each output"
            )
        if targets.is_complex():
            raise ValueError(f"{self.name}: complex targets; expected real numbers")
        return targets.to(rows.dtype)

    def counts(self, rows: Tensor, targets: Tensor | None) -> Tensor | None:
        # A position is one output, as in the mean of torch's own losses.
        return rows.new_full((len(rows),), rows.shape[-1], dtype=torch.float64)

    def draws(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        v = self.variances(rows).sqrt()
        return torch.where(random_signs(v, generator), v, -v)

    def scores(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        sampled = self.sample(rows.detach().cpu(), generator)
        return self.means(rows) - sampled.to(rows.device, rows.dtype)

    def hessians(self, rows: Tensor) -> Tensor:
        return torch.diag_embed(self.variances(rows.double()))

    def diagonals(self, rows: Tensor) -> Tensor:
        return self.variances(rows)

    def root_columns(self, rows: Tensor) -> Iterator[Tensor]:
        roots = self.variances(rows).sqrt()
        for c in range(rows.shape[-1]):
            column = torch.zeros_like(roots)
            column[:, c] = roots[:, c]
            yield column

    def divergences(self, before: Tensor, after: Tensor) -> Tensor:
        # The Bregman divergence of A.
        rise = self.log_partition(after) - self.log_partition(before)
        return (rise - self.means(before) * (after - before)).sum(-1)


class Bernoulli(Separate):
    """Independent yes-or-no targets with logits ``z``: ``A(z) = log(1 + eᶻ)``.

    Args:
        weight: what each output counts, ``(k,)``.
        pos_weight: what a positive target counts, ``(k,)``. The Hessian then depends on the target:
            ``(1 + (w − 1) y) p (1 − p)``.

    Both as in torch's ``BCEWithLogitsLoss``.
    """

    name = "independent sigmoids"
    has_accuracy = True

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        self.weight, self.pos_weight = weight, pos_weight

    def _elements(self, rows: Tensor, targets: Tensor) -> Tensor:
        if bool(((targets < 0) | (targets > 1)).any()):
            raise ValueError(
                f"{self.name}: a target is not between 0 and 1; expected one yes (1) or no (0) for "
                "each output"
            )
        weight, pos_weight = self._weights(rows)
        return F.binary_cross_entropy_with_logits(
            rows, targets, weight=weight, pos_weight=pos_weight, reduction="none"
        )

    def _weights(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights = []
        for given in (self.weight, self.pos_weight):
            weights.append(None if given is None else given.to(like.device, like.dtype))
        return weights[0], weights[1]

    def scales(self, targets: Tensor) -> Tensor | None:
        given = targets.double()
        weight, pos_weight = self._weights(given)
        if weight is None and pos_weight is None:
            return None
        total = torch.ones_like(given)
        if pos_weight is not None:
            total = total + (pos_weight - 1) * given
        return total if weight is None else total * weight

    def log_partition(self, z: Tensor) -> Tensor:
        return F.softplus(z)

    def means(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def variances(self, z: Tensor) -> Tensor:
        p = z.sigmoid()
        return p * (1 - p)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(z.double().sigmoid(), generator=generator)

    def right(self, rows: Tensor, targets: Tensor) -> Tensor:
        # The whole row: all yes and no at once.
        return ((rows > 0) == (targets > 0.5)).all(-1)

    def guesses(self, rows: Tensor) -> Tensor:
        return (rows > 0).to(rows.dtype)


class Gaussian(Separate):
    """Numbers with a normal error: ``½ (y − z)² / σ²`` for each output.

    Args:
        sigma: the standard deviation of the error, in the unit of the targets. ``None``: the loss
            is ``(y − z)²``, as torch and transformers have it, and is no likelihood: of how large
            an error matters nothing is known.
    """

    name = "squared error"

    def __init__(self, sigma: float | None = None) -> None:
        if sigma is not None and not sigma > 0:
            raise ValueError(f"sigma={sigma!r}: expected a positive number")
        self.precision = 2.0 if sigma is None else 1 / sigma**2
        self.distribution = sigma is not None

    def log_partition(self, z: Tensor) -> Tensor:
        return 0.5 * self.precision * z.square()

    def means(self, z: Tensor) -> Tensor:
        return self.precision * z

    def variances(self, z: Tensor) -> Tensor:
        return torch.full_like(z, self.precision)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        return self.precision * z.double() + noise * self.precision**0.5

    def _elements(self, rows: Tensor, targets: Tensor) -> Tensor:
        # With ½ y² / σ², which A(z) − y z leaves out.
        return 0.5 * self.precision * (targets - rows).square()


class Poisson(Separate):
    """Counts with rate ``eᶻ``: ``A(z) = eᶻ``."""

    name = "Poisson"

    def log_partition(self, z: Tensor) -> Tensor:
        return z.exp()

    def means(self, z: Tensor) -> Tensor:
        return z.exp()

    def variances(self, z: Tensor) -> Tensor:
        return z.exp()

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(z.double().exp(), generator=generator)


class Exponential(Separate):
    """Positive targets with rate ``−z``, for outputs below 0: ``A(z) = −log(−z)``."""

    name = "exponential"

    def check(self, rows: Tensor) -> None:
        if bool((rows >= 0).any()):
            raise ValueError(
                "exponential: an output is not below 0; the canonical parameter is minus the rate"
            )

    def log_partition(self, z: Tensor) -> Tensor:
        return -torch.log(-z)

    def means(self, z: Tensor) -> Tensor:
        return -1 / z

    def variances(self, z: Tensor) -> Tensor:
        return 1 / z.square()

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(z.shape, generator=generator, dtype=torch.float64)
        return -torch.log1p(-uniform) / -z.double()


class NegativeBinomial(Separate):
    """Failures before the ``successes``-th success, where one more failure has the probability
    ``eᶻ``, for outputs below 0: ``A(z) = −r log(1 − eᶻ)``."""

    name = "negative binomial"

    def __init__(self, successes: float) -> None:
        if not successes > 0:
            raise ValueError(f"successes={successes!r}: expected a positive number")
        self.successes = successes

    def check(self, rows: Tensor) -> None:
        if bool((rows >= 0).any()):
            raise ValueError(
                "negative binomial: an output is not below 0; it is the logarithm of a probability"
            )

    def log_partition(self, z: Tensor) -> Tensor:
        return -self.successes * torch.log(-torch.expm1(z))

    def means(self, z: Tensor) -> Tensor:
        return self.successes / torch.expm1(-z)

    def variances(self, z: Tensor) -> Tensor:
        # r e⁻ᶻ / (e⁻ᶻ − 1)²
        return self.successes * torch.exp(-z) / torch.expm1(-z).square()

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        # torch has no such sampler that takes a generator.
        seed = torch.randint(2**63 - 1, (), generator=generator)
        success = -torch.expm1(z.double())
        random = np.random.default_rng(int(seed))
        return torch.from_numpy(random.negative_binomial(self.successes, success.numpy()))
