"""What fields accept whose dataclasses do not say so themselves yet. To be deleted when all do."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

_COUNT = "a whole number of at least 1"
ANNOTATIONS: dict[str, dict[str, object]] = {
    "Training": {
        "loss": Literal["distill", "task"],
        "steps": Annotated[
            int | None, Field(ge=1, description=f"steps of the optimizer, {_COUNT}")
        ],
        "seconds": Annotated[
            float | None, Field(gt=0, description="the longest time, a number of seconds above 0")
        ],
        "lr": Annotated[
            float, Field(gt=0, description="the relative learning rate, a number above 0")
        ],
        "batch_size": Annotated[int, Field(ge=1, description=f"items per step, {_COUNT}")],
        "every": Annotated[
            int | None, Field(ge=1, description=f"steps between measurements, {_COUNT}")
        ],
        "patience": Annotated[
            int | None, Field(ge=1, description=f"measurements without gain, {_COUNT}")
        ],
        "clip": Annotated[
            float, Field(gt=0, description="largest norm of the gradient, a number above 0")
        ],
        "bfloat16": Annotated[
            bool,
            Field(description="true or false: products in bfloat16 where they are faster"),
        ],
        "codes": Annotated[
            bool,
            Field(
                description="true or false: train the codes of up to 4 bits, not their scales alone"
            ),
        ],
    },
    "Structured": {
        "of": Literal["macs", "parameters", "latency"],
        "batch": Annotated[
            int, Field(ge=1, description=f"items in the batch whose latency is meant, {_COUNT}")
        ],
        "uniform": Annotated[
            bool,
            Field(description="true or false: one width per kind, which a plain config describes"),
        ],
        "round_to": Annotated[
            int | None, Field(ge=1, description=f"widths are multiples of this, {_COUNT}")
        ],
    },
    "Limit": {
        "name": Annotated[
            str,
            Field(min_length=1, description="what is limited, one word such as milliseconds"),
        ],
        "most": Annotated[
            float, Field(description="the most that the layers may take together, a number")
        ],
    },
    "Budget": {
        "metric": Literal["loss", "accuracy"],
        "max_drop": Annotated[
            float | None,
            Field(
                ge=0,
                description="a number of at least 0: nats of loss, or a fraction of accuracy "
                "(0.01 is 1 pp)",
            ),
        ],
        "max_bytes": Annotated[
            int | None, Field(ge=1, description="a positive whole number of bytes")
        ],
        "max_bits": Annotated[
            float | None,
            Field(gt=0, description="stored bits per weight of the layers, a number above 0"),
        ],
        "max_macs": Annotated[
            float | None,
            Field(
                gt=0,
                description="multiply-adds per token of a language model, else per item, a number "
                "above 0",
            ),
        ],
        "max_bops": Annotated[
            float | None,
            Field(gt=0, description="bit operations per token or item, a number above 0"),
        ],
        "confidence": Annotated[
            float,
            Field(
                gt=0.5,
                lt=1,
                description="a number strictly between 0.5 and 1, for example 0.95",
            ),
        ],
    },
    "Settings": {
        "seed": Annotated[int, Field(ge=0, description="a whole number of at least 0")],
        "labels": Annotated[int, Field(ge=1, description=f"draws per item, {_COUNT}")],
        "curvature": Literal["fisher", "diagonal", "kfac", "hessian", "input"],
        "measure_above": Annotated[
            float | None,
            Field(
                ge=0,
                description="nats below which no price is measured, a number of at least 0; null: "
                "none is",
            ),
        ],
        "trials": Annotated[
            int, Field(ge=1, description=f"plans measured on the select split, {_COUNT}")
        ],
        "attempts": Annotated[
            int,
            Field(
                ge=1,
                description=f"plans applied, to be tested in order on the certify split, {_COUNT}",
            ),
        ],
        "portable": Annotated[
            bool | Literal["engines"],
            Field(
                description="true (transformers loads model/), engines (so do serving engines) or "
                "false (every kind of layer is packed, for curvprune.load)"
            ),
        ],
    },
}


def annotated(kind: type, name: str, hint: Any) -> Any:
    """The field's own annotation where it says what it accepts, else the one above."""
    said = any(isinstance(part, FieldInfo) for part in typing.get_args(hint)[1:])
    return hint if said else ANNOTATIONS[kind.__name__].get(name, hint)
