"""How a recovery is trained: its loss, its length, its learning rate.

Recipes give these fields too (section ``recover``). Type, default, bounds and the words for a
message are said once, here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from curvprune.schema import check_fields

STEPS = 200
# Steps until the full rate, at most a tenth of them: Adam's second moments are noise before.
WARM_UP = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How to train.

    Args:
        loss: ``"distill"``, KL from the uncompressed model's outputs (no labels), or ``"task"``,
            the objective itself.
        steps: optimizer steps; by default as many as fit into ``seconds``, or 200.
        seconds: stop, with the rate at its end, after so long. The result then depends on the
            machine's speed.
        lr: relative learning rate: the change of a number per step, over the root mean square of
            its tensor (over itself, for a scale). Cosine to zero after `WARM_UP` steps. Few steps
            want more of it: of the 0.104 nats of SmolLM2-135M at 2 to 6 bits 48 steps, with codes,
            leave 0.047 with 1e-3, 0.040 with 2e-3, 0.046 with 4e-3.
        batch_size: items per step.
        every: steps between measurements on the select split; by default a tenth of ``steps``, at
            least 10 (20 without ``steps``).
        patience: stop after so many measurements in a row that were no better than the best. By
            default the schedule runs to its end: its last steps, at small rates, often gain the
            most.
        clip: largest norm of the gradient with respect to the relative changes.
        bfloat16: multiply in bfloat16 while training, where both models are float32 on a device
            that does so twice as fast (a CPU with AVX512-BF16, a CUDA device) and the loss is large
            enough (see `HALF_TOLERANCE`). Measurements on the select split do not.
        codes: train the codes of layers of at most `CODES_UP_TO` bits as well, with the gradient
            straight through the rounding. Each weight has a place on the line of its grid, which
            starts where the uncompressed weight lies in its code's cell, or in the middle where
            that is outside; the code is the nearest. Zeros of pruned weights stay.
        seed: of the order of the items.

    Raises:
        ValueError: a field that is not what its annotation says.
    """

    loss: Annotated[Literal["distill", "task"], Field(description="distill or task")] = "distill"
    steps: Annotated[
        int | None,
        Field(ge=1, description="steps of the optimizer, a whole number of at least 1"),
    ] = None
    seconds: Annotated[
        float | None,
        Field(
            gt=0, allow_inf_nan=False, description="the longest time, a number of seconds above 0"
        ),
    ] = None
    lr: Annotated[
        float,
        Field(
            gt=0, allow_inf_nan=False, description="the relative learning rate, a number above 0"
        ),
    ] = 1e-3
    batch_size: Annotated[
        int, Field(ge=1, description="items per step, a whole number of at least 1")
    ] = 8
    every: Annotated[
        int | None,
        Field(ge=1, description="steps between measurements, a whole number of at least 1"),
    ] = None
    patience: Annotated[
        int | None,
        Field(ge=1, description="measurements without gain, a whole number of at least 1"),
    ] = None
    clip: Annotated[
        float,
        Field(
            gt=0, allow_inf_nan=False, description="largest norm of the gradient, a number above 0"
        ),
    ] = 1.0
    bfloat16: Annotated[
        bool, Field(description="true or false: products in bfloat16 where they are faster")
    ] = True
    codes: Annotated[
        bool,
        Field(description="true or false: train the codes of up to 4 bits, not their scales alone"),
    ] = False
    seed: Annotated[int, Field(description="the order of the items, a whole number")] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is None and self.seconds is None:
            object.__setattr__(self, "steps", STEPS)

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        if self.every is not None:
            return self.every
        return 20 if self.steps is None else max(10, self.steps // 10)

    def rate(self, step: int, elapsed: float) -> float:
        """Learning rate of a step, the first being 1, after so many seconds."""
        by_steps = 0.0 if self.steps is None else (step - 1) / self.steps
        by_time = 0.0 if self.seconds is None else elapsed / self.seconds
        over = min(1.0, max(by_steps, by_time))
        warm_up = WARM_UP if self.steps is None else min(WARM_UP, math.ceil(self.steps / 10))
        warmed = min(1.0, step / warm_up)
        return self.lr * warmed * (1 + math.cos(math.pi * over)) / 2
