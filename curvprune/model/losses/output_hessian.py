"""The Hessian of any loss at its outputs, by differentiation.

The loss of an item does not depend on the other items, so the Hessian is block-diagonal by items,
and one product serves all items at once: products with k unit vectors give every item's ``k × k``
block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

MAX_WIDTH = 128  # outputs of an item up to which its whole block is formed
STEPS = 32  # of Lanczos, beyond that width
# How far a block may be from positive semidefinite, relative to its largest eigenvalue.
_NEGATIVE = 1e-4


class OutputHessian:
    """Products with the Hessian H of a summed loss at some outputs.

    Args:
        loss: outputs → summed loss.
        outputs: where; the first dimension counts items.
    """

    def __init__(self, loss: Callable[[Tensor], Tensor], outputs: Tensor) -> None:
        self.at = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(self.at)
            self.slope: Tensor | None = None
            if value.requires_grad:
                self.slope = torch.autograd.grad(value, self.at, create_graph=True)[0]

    def product(self, v: Float[Tensor, "*outputs"]) -> Float[Tensor, "*outputs"]:
        """``H v``."""
        # A slope without a graph is constant: the loss is linear.
        if self.slope is None or not self.slope.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(self.slope, self.at, v, retain_graph=True)[0]

    def of_items(self) -> Float[Tensor, "items k k"]:
        """Every item's block: one product for each of its k outputs."""
        return self._blocks(self.at.flatten(1).shape)

    def draw(self, generator: torch.Generator) -> Float[Tensor, "*outputs"]:
        """``H^½ s`` with random signs s: mean zero, covariance H.

        Exact where H is diagonal, where the last dimension or an item has at most `MAX_WIDTH`
        outputs; else by `STEPS` steps of Lanczos for each item.

        Raises ``ValueError`` if H is not positive semidefinite.
        """
        signs = torch.randint(0, 2, self.at.shape, generator=generator, dtype=torch.int8)
        s = (2 * signs - 1).to(self.at.device, self.at.dtype)
        if self._diagonal is not None:
            _check_signs(self._diagonal.min(), self._diagonal.max())
            return self._diagonal.clamp_min(0).sqrt() * s
        if self._roots is not None:
            rows = s.reshape(self._roots.shape[0], -1, 1)
            return (self._roots @ rows).view_as(s)
        return self._lanczos(s)

    # ------------------------------------------------------------------------------- its form

    @cached_property
    def _test(self) -> tuple[Tensor, Tensor]:
        """A vector and its product, to see whether a form holds."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.at.shape, generator=generator, dtype=torch.float64)
        v = v.to(self.at.device, self.at.dtype)
        return v, self.product(v)

    def _holds(self, guess: Tensor) -> bool:
        product = self._test[1]
        error = torch.linalg.vector_norm(guess - product)
        return bool(error <= 1e-4 * torch.linalg.vector_norm(product))

    @cached_property
    def _diagonal(self) -> Tensor | None:
        """H where it is diagonal: the loss is a sum over outputs."""
        diagonal = self.product(torch.ones_like(self.at))
        return diagonal if self._holds(diagonal * self._test[0]) else None

    @cached_property
    def _roots(self) -> Float[Tensor, "blocks k k"] | None:
        """Square roots of blocks: of the last dimension, if H has no more, else of items."""
        width = self.at.flatten(1).shape[1]
        last = self.at.shape[-1]
        if self.at.ndim > 2 and last <= MAX_WIDTH:
            rows = self.at.numel() // last
            blocks = self._blocks(torch.Size((rows, last)))
            v = self._test[0].reshape(rows, last, 1)
            if self._holds((blocks.to(v.dtype) @ v).view_as(self.at)):
                return square_root(blocks).to(self.at.dtype)
        if width <= MAX_WIDTH:
            return square_root(self.of_items()).to(self.at.dtype)
        return None

    def _blocks(self, shape: torch.Size) -> Float[Tensor, "blocks k k"]:
        """The diagonal blocks of the outputs seen as ``(blocks, k)``."""
        columns = []
        for j in range(shape[1]):
            unit = torch.zeros(shape, dtype=self.at.dtype, device=self.at.device)
            unit[:, j] = 1
            columns.append(self.product(unit.view_as(self.at)).reshape(shape))
        return torch.stack(columns, -1).double()

    def _lanczos(self, s: Tensor) -> Tensor:
        """``H^½ s`` item by item: ``‖s‖ Q √T e₁`` with the Lanczos basis Q and T = QᵀHQ."""
        # 1. The basis, with full reorthogonalisation; an item whose space is used up adds zeros.
        norm = torch.linalg.vector_norm(s.flatten(1).double(), dim=1, keepdim=True)
        basis = [s.flatten(1).double() / norm]
        images = []
        for _ in range(STEPS):
            image = self.product(basis[-1].to(s.dtype).view_as(s)).flatten(1).double()
            images.append(image)
            q = torch.stack(basis, 1)
            left = image
            for _ in range(2):
                left = left - ((q @ left.unsqueeze(-1)) * q).sum(1)
            length = torch.linalg.vector_norm(left, dim=1, keepdim=True)
            used_up = length <= 1e-6 * torch.linalg.vector_norm(image, dim=1, keepdim=True)
            basis.append(torch.where(used_up, 0.0, left / length.clamp_min(1e-300)))
        # 2. The small matrix, and its root.
        q = torch.stack(basis[:-1], 1)
        small = q @ torch.stack(images, -1)
        root = square_root((small + small.transpose(1, 2)) / 2)
        return (norm * (root[:, :, :1] * q).sum(1)).to(s.dtype).view_as(s)


def square_root(blocks: Float[Tensor, "blocks k k"]) -> Float[Tensor, "blocks k k"]:
    """The symmetric square root of each block."""
    values, vectors = torch.linalg.eigh(blocks)
    if values.numel():
        _check_signs(values.min(), values.max())
    roots = values.clamp_min(0).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.transpose(-1, -2)


def _check_signs(lowest: Tensor, highest: Tensor) -> None:
    if float(lowest) < -_NEGATIVE * max(float(highest), 0.0):
        raise ValueError(
            "the loss is not convex in its outputs (an eigenvalue of its Hessian there is "
            f"{float(lowest):.3g}, the largest {float(highest):.3g}), so no draws have it as their "
            "covariance: use matrix='hessian' or 'ggn', for prices curvature='hessian'"
        )
