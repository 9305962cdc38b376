"""Sharpness while a model trains: λ_max beside the learning rate, at a few gradients a look.

Source: Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
stability".
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.compat import running_eagerly, step_callback
from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.estimators import eigenpairs, trace
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.products import MatrixFree, hessian
from curvprune.model import Batch, LossLike, make_loss, plain_model, to_device

TOL, MOST = 5e-3, 60  # asked of λ_max, and the most products that a look may take
LEAST = 3  # products of a look that starts from the last eigenvector
FRESH = (
    0.05  # share of a random direction in the start: the old eigenvector may have lost its place
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharpness:
    """One look at a model in training.

    Attributes:
        lambda_max: largest eigenvalue of the Hessian of the probe batch; nan where the model's
            numbers are not finite.
        error: its estimated numerical error.
        converged: whether that is within 0.5 %.
        max_learning_rate: ``2 (1 + momentum) / λmax``, above which gradient descent diverges along
            the top direction (heavy-ball momentum); ``None`` if λmax ≤ 0.
        learning_rate: the one in use, where it is known.
        trace: every ``trace_every`` steps, with its error over probes.
        num_products: Hessian products spent; each costs two gradients of the probe batch.
        seconds: spent.
    """

    step: int
    lambda_max: float
    error: float
    converged: bool
    max_learning_rate: float | None
    learning_rate: float | None
    trace: Estimate | None
    num_products: int
    seconds: float

    @property
    def above_edge(self) -> bool:
        """Whether the learning rate is known and above the limit."""
        rate, limit = self.learning_rate, self.max_learning_rate
        return rate is not None and limit is not None and rate > limit

    @property
    def text(self) -> str:
        """The same in a sentence."""
        said = f"step {self.step}: λmax {self.lambda_max:.4g}"
        if not self.converged:
            said += " (not converged)"
        if self.max_learning_rate is None:
            return f"{said}, no limit to the learning rate"
        said += f", stable up to a learning rate of {self.max_learning_rate:.3g}"
        if self.learning_rate is None:
            return said
        side = "above" if self.above_edge else "below"
        return f"{said}; {self.learning_rate:.3g} is in use, {side} the edge of stability"

    def logs(self) -> dict[str, float]:
        """Numbers for a logger. ``above_edge`` is 1 or 0."""
        found = {"curvature/lambda_max": self.lambda_max}
        if self.max_learning_rate is not None:
            found["curvature/max_learning_rate"] = self.max_learning_rate
        if self.learning_rate is not None:
            found["curvature/learning_rate"] = self.learning_rate
            found["curvature/above_edge"] = float(self.above_edge)
        if self.trace is not None:
            found["curvature/trace"] = self.trace.value
            found["curvature/trace_stderr"] = self.trace.stderr
        return found


class CurvatureMonitor:
    """Every ``every`` steps λ_max of the Hessian on a fixed probe batch, and every ``trace_every``
    its trace.

    Each look starts from the eigenvector of the last one, so it takes about 3 to 15 products, of
    two gradients of the probe batch each. The model is looked at in evaluation mode; its modes and
    gradients and all random numbers stay as they are. Only parameters with ``requires_grad`` count.
    The limit is that of plain gradient descent or, where it is told, with momentum: optimizers that
    scale each coordinate, such as Adam, have another one.

    >>> import torch, curvprune as cp
    >>> model = torch.nn.Linear(3, 2)
    >>> batch = torch.eye(3), torch.tensor([0, 1, 1])
    >>> monitor = cp.CurvatureMonitor(model, batch, every=50)
    >>> for step in range(101):
    ...     seen = monitor.step(step, learning_rate=0.1)  # and a step of training
    >>> [look.step for look in monitor.looks], monitor.looks[0].above_edge
    ([0, 50, 100], False)

    Args:
        batch: the probe batch, or a list of batches.
        loss: as in `curvprune.analyze`.
        trace_every: ten times ``every`` if ``None``.
        probes: Hutchinson probes of a trace.

    Raises:
        ValueError: no parameter that is trained, or a loss that cannot be told.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | list[Batch],
        *,
        loss: LossLike = "auto",
        every: int = 100,
        trace_every: int | None = None,
        probes: int = 8,
        seed: int = 0,
    ) -> None:
        if every < 1 or (trace_every is not None and trace_every < 1) or probes < 2:
            raise ValueError(
                f"CurvatureMonitor: every={every}, trace_every={trace_every} and probes={probes}; "
                "expected at least 1, 1 and 2"
            )
        model = plain_model(model)
        home = next(model.parameters()).device
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise ValueError("CurvatureMonitor: the list of probe batches is empty")
        self.model = model
        self.batches: Sequence[Batch] = [to_device(b, home) for b in batches]
        self.loss = make_loss(loss, model, self.batches[0])
        self.every, self.trace_every = every, trace_every or 10 * every
        self.probes = probes
        self.looks: list[Sharpness] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._top: Tensor | None = None
        self._began: float | None = None
        self._spent = 0.0

    def step(
        self, step: int, *, learning_rate: float | None = None, momentum: float = 0.0
    ) -> Sharpness | None:
        """To be called after every step of training; looks at every ``every``-th."""
        if self._began is None:
            self._began = time.perf_counter()
        if step % self.every:
            return None
        return self.look(step, learning_rate=learning_rate, momentum=momentum)

    def look(
        self, step: int, *, learning_rate: float | None = None, momentum: float = 0.0
    ) -> Sharpness:
        """A look now, whatever the step."""
        start = time.perf_counter()
        # 1. The Hessian of the parameters as they are; the graph goes when the look ends.
        names = [escape(n) for n, p in self.model.named_parameters() if p.requires_grad]
        if not names:
            raise ValueError("CurvatureMonitor: no parameter of the model has requires_grad")
        op = hessian(self.model, self.batches, self.loss, parameters=names)
        # 2. Its largest eigenvalue from the last eigenvector, and the trace now and then.
        with running_eagerly():
            pairs, total = self._seen(op, traced=step % self.trace_every == 0)
        # 3. What it says of the learning rate.
        high = math.nan if pairs is None else float(pairs.values[0])
        seconds = time.perf_counter() - start
        self._spent += seconds
        seen = Sharpness(
            step=step,
            lambda_max=high,
            error=math.nan if pairs is None else float(pairs.errors[0]),
            converged=pairs is not None and pairs.converged,
            max_learning_rate=2 * (1 + momentum) / high if high > 0 else None,
            learning_rate=learning_rate,
            trace=total,
            num_products=0 if pairs is None else pairs.num_products,
            seconds=seconds,
        )
        self.looks.append(seen)
        return seen

    def _seen(self, op: MatrixFree, *, traced: bool) -> tuple[EigenPairs | None, Estimate | None]:
        pairs, total = None, None
        try:
            pairs = self._largest(op)
            if traced:
                total = trace(
                    op,
                    method="hutchinson",
                    max_products=self.probes,
                    generator=self._generator,
                )
        except FloatingPointError:
            # A diverged model is something to report, not a reason to stop.
            self._top = None
        return pairs, total

    def _largest(self, op: MatrixFree) -> EigenPairs:
        start = None
        if self._top is not None and len(self._top) == op.space.dim:
            noise = torch.randn(len(self._top), generator=self._generator).to(self._top)
            start = self._top + FRESH * noise / torch.linalg.vector_norm(noise)
        pairs = eigenpairs(
            op,
            1,
            which="LA",
            method=Lanczos() if start is None else Lanczos(start=start, least=LEAST),
            tol=TOL,
            max_products=MOST,
            generator=self._generator,
        )
        self._top = pairs.vectors[:, 0]
        return pairs

    @property
    def cost(self) -> float | None:
        """Seconds of all looks per second of everything else since the first step; ``None`` before
        it."""
        if self._began is None:
            return None
        other = time.perf_counter() - self._began - self._spent
        return self._spent / other if other > 0 else None

    @property
    def summary(self) -> str:
        """What was seen and what it cost, in a sentence."""
        if not self.looks:
            return "CurvatureMonitor: no look yet"
        above = sum(look.above_edge for look in self.looks)
        said = f"CurvatureMonitor: {len(self.looks)} looks, {above} above the edge of stability"
        if self.cost is not None:
            said += f"; they took {self._spent:.2g} s, {self.cost:.1%} of the rest"
        return said

    def attach(self, trainer: Any) -> Any:
        """Add the monitor to a transformers ``Trainer``; its callback is returned.

        Numbers go where the trainer's own go, by ``trainer.log``; what the looks cost is printed at
        the end. Learning rate and momentum are those of the trainer's optimizer, the largest of its
        groups.

        Raises:
            ValueError: transformers is not installed.
        """

        def on_step(step: int, optimizer: Any) -> None:
            groups = [] if optimizer is None else optimizer.param_groups
            rates = [float(group["lr"]) for group in groups]
            momenta = [float(group.get("momentum", 0.0)) for group in groups]
            seen = self.step(
                step,
                learning_rate=max(rates, default=None),
                momentum=max(momenta, default=0.0),
            )
            if seen is not None:
                trainer.log(seen.logs())

        def on_end() -> None:
            if self.cost is not None:
                trainer.log({"curvature/cost": self.cost})
            print(self.summary)

        callback = step_callback(on_step, on_end)
        trainer.add_callback(callback)
        return callback
