"""What the Python verbs return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from curvprune.artifact import Portable, write_card, write_model
from curvprune.certificate import Verdict
from curvprune.compression import Recovery, Solved, dequantize
from curvprune.curvature import Analysis, Estimate
from curvprune.model import find_layers
from curvprune.options import quantizer_of
from curvprune.planning import Plan
from curvprune.pricing import Ledger
from curvprune.record import Trial
from curvprune.report import model_card
from curvprune.run.card import Shown, card_of


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Result:
    """What `quantize`, `prune` and `compress` return; ``print(result)`` says it in a few lines.

    Attributes:
        model: the compressed model (weights rounded or pruned in place, in their own dtype).
        plan: the option of every layer.
        verdict: the certificate, where a budget with ``max_drop`` was given.
        ledger: the prices, where a budget was given or zeros were allocated.
        analysis: per-layer curvature from the same pass, where prices are quadratic.
        trials: the plans measured on the select split, with predicted and measured loss.
        recovery: the training of `recover`, where there was one; prices and ``plan.predicted`` are
            those before it.
        seen: hashes of the items that it was made from and chosen by, which certify nothing.
    """

    model: nn.Module
    plan: Plan
    verdict: Verdict | None
    ledger: Ledger | None
    analysis: Analysis | None
    trials: tuple[Trial, ...]
    solved: dict[str, Solved]
    portable: Portable = True
    recovery: Recovery | None = None
    seen: frozenset[bytes] = field(default=frozenset())

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for option in self.plan.choices.values():
            counts[option] = counts.get(option, 0) + 1
        options = ", ".join(f"{count} × {option}" for option, count in counts.items())
        lines = [
            f"Result: {type(self.model).__name__}, {self.plan.bytes / 1e6:.2f} MB",
            f"  plan: {len(self.plan.choices)} layers: {options}",
            _verdict_line(self.verdict),
        ]
        if self.trials:
            lines.append(f"  trials: {len(self.trials)} plans measured on the select split")
        if self.recovery is not None:
            lines.append(_recovery_line(self.recovery))
        lines += [f"  note: {note}" for note in self.plan.notes]
        return "\n".join(lines)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the packed artifact, which `load` reads. Returns the folder.

        Transformers reads it too, for its own models, unless ``Settings(target="curvprune")``: that
        packs embeddings and every other kind of layer as well. ``"engines"`` keeps to what serving
        engines have kernels for.

        Raises ``ValueError`` if a compressed layer of ``model`` is not what it was compressed to:
        codes and scales are stored, and those of a weight that was trained since are not known.
        """
        path = Path(folder)
        _check_unchanged(self.model, self.solved)
        write_model(
            path,
            self.model,
            self.solved,
            self.plan.to_dict(),
            tokenizer=tokenizer,
            portable=self.portable,
        )
        shown = Shown(choices=self.plan.choices, verdict=self.verdict, trials=self.trials)
        write_card(path, model_card(card_of(path, self.model, shown)))
        return path


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StructuredResult:
    """What `prune` returns where hidden units were removed; ``print(result)`` says it in a few
    lines.

    Attributes:
        model: the smaller model; the input model is untouched.
        cuts: cut → (units left, units before).
        macs, parameters: (after, before); multiply-adds of one item.
        latency: (after, before) in seconds, measured in turn, where a share of it was asked for.
        predicted: rise of the loss in nats from the prices, where there were widths to choose
            among.
        verdict: the certificate, where a budget with ``max_drop`` was given.
        ledger: the price of every width of every cut, where there was a choice.
        notes: which dimensions cannot be cut, and why; why the result is not ``portable``, if so.
        portable: whether a plain config describes the result, so that transformers'
            ``from_pretrained`` loads it.
        recovery: the training of `recover`, where there was one; ``predicted`` is from before it.
        seen: hashes of the items that it was made from and chosen by, which certify nothing.
    """

    model: nn.Module
    cuts: dict[str, tuple[int, int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    predicted: Estimate | None
    verdict: Verdict | None
    ledger: Ledger | None
    notes: tuple[str, ...]
    portable: bool
    latency: tuple[float, float] | None = None
    recovery: Recovery | None = None
    seen: frozenset[bytes] = field(default=frozenset())

    def __repr__(self) -> str:
        left = sum(after for after, _ in self.cuts.values())
        units = sum(before for _, before in self.cuts.values())
        lines = [
            f"StructuredResult: {type(self.model).__name__}",
            f"  units: {left:,} of {units:,} left in {len(self.cuts)} cuts",
            f"  multiply-adds: {self.macs[0]:,} of {self.macs[1]:,}",
            f"  parameters: {self.parameters[0]:,} of {self.parameters[1]:,}",
        ]
        if self.predicted is not None:
            predicted = self.predicted
            lines.append(f"  predicted: {predicted.value:.4g} ± {predicted.stderr:.2g} nats")
        lines.append(_verdict_line(self.verdict))
        if self.recovery is not None:
            lines.append(_recovery_line(self.recovery))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the artifact, which `load` reads (and transformers, where ``portable``). Returns
        the folder."""
        path = Path(folder)
        cuts: dict[str, JsonValue] = {}
        for name, (left, of) in self.cuts.items():
            cuts[name] = {"left": left, "of": of}
        write_model(path, self.model, {}, {"cuts": cuts}, tokenizer=tokenizer)
        return path


def _verdict_line(verdict: Verdict | None) -> str:
    if verdict is None:
        return "  verdict: none was asked for; pass budget=Budget(max_drop=...)"
    return (
        f"  verdict: {verdict.status}: {verdict.metric} drop {verdict.drop:.4g}, "
        f"bound {verdict.bound:.4g} of {verdict.max_drop:g} {verdict.measure}"
    )


def _recovery_line(recovery: Recovery) -> str:
    return (
        f"  recovery: loss on the select items {recovery.loss_before:.4g} → "
        f"{recovery.loss_after:.4g} in {recovery.steps} steps"
    )


def _check_unchanged(model: nn.Module, solved: Mapping[str, Solved]) -> None:
    layers = find_layers(model)
    for name, one in solved.items():
        layer = layers[name]
        weight = layer.as_matrix(layer.weight.detach())
        # The solution may be the model's own memory; but for a grid, which says what it was.
        expected, quantize = one.weight, quantizer_of(one.option)
        if quantize is not None and one.codes is not None and one.scale is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            expected = dequantize(one.codes, one.scale, one.zero, quantize.group_size, dtype=wide)
        if not torch.equal(weight.cpu(), expected.cpu().to(weight.dtype)):
            raise ValueError(
                f"save: layer {name} of the result's model is not what was compressed: its weight "
                "has changed since. To train a compressed model use curvprune.recover; for any "
                "other change, compress the model again"
            )
