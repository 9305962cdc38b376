"""The parameters that an operator is over."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def parameter_names(model: nn.Module, globs: str | Sequence[str]) -> list[str]:
    """Names of the parameters that some globs match, in the model's order."""
    own = dict(model.named_parameters())
    # A glob may name a shared parameter by any of its names; it counts once, under the first.
    tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    globs = [globs] if isinstance(globs, str) else list(globs)
    if not globs:
        raise ValueError("parameters is empty: expected names or globs, such as '*.weight'")
    wanted: set[int] = set()
    for glob in globs:
        found = [key for name, key in tied.items() if fnmatchcase(name, glob)]
        if not found:
            raise ValueError(
                f"parameters={glob!r} matches none of the {len(own)} parameters, e.g. "
                f"{next(iter(own))!r}"
            )
        wanted.update(found)
    names = [name for name, p in own.items() if id(p) in wanted]
    for name in names:
        if not own[name].is_floating_point():
            raise ValueError(
                f"parameter {name} has type {own[name].dtype}: only floating-point ones have "
                "curvature"
            )
    return names
