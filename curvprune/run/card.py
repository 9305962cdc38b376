"""What a model card is made from, for recipes and for `Result.save`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import curvprune
from curvprune import artifact
from curvprune.certificate import Verdict
from curvprune.record import ModelCard, Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The plan that a folder holds, its verdict, and what it was held against."""

    choices: Mapping[str, str]
    verdict: Verdict | None
    trials: tuple[Trial, ...]


def card_of(
    folder: Path,
    model: nn.Module,
    shown: Shown,
    *,
    title: str = "",
    source_bytes: int | None = None,
) -> ModelCard:
    """The card of a folder that a model was written to.

    Args:
        model: of the same class and shapes; its parameters are counted.
        source_bytes: of the file that it was read from, where that is known.
    """
    manifest = artifact.read_manifest(folder)
    ours = artifact.is_transformers(model)
    name = type(model).__name__
    # A path is no name on a hub.
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    on_a_hub = base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "/"))
    packed = False
    if ours and manifest.portable:
        packed = any(stored.form in ("packed", "blocks") for stored in manifest.layers.values())
    counts = Counter(shown.choices.values())
    return ModelCard(
        title=title or f"{name}, compressed",
        architecture=name,
        portable=manifest.portable if ours else False,
        packed=packed,
        builds_itself=ours,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=artifact.weights_file(folder).stat().st_size,
        curvprune=curvprune.__version__,
        base_model=base if on_a_hub else "",
        source_bytes=source_bytes,
        options=dict(counts.most_common()),
        verdict=shown.verdict,
        trials=shown.trials,
    )
