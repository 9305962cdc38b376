"""The record of a run: what `run` writes to ``report.json`` and `report` reads.

Everything is a frozen dataclass; `curvprune.schema` turns it into JSON and back. A number that is
not finite is ``null`` in the file and NaN in memory. Losses, prices and drops are in nats per
position (`RunRecord.measure`), unless a budget's metric is accuracy or top1: then its drops are
fractions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from curvprune.certificate import Estimate, ItemColumns, ModelComparison, Verdict
from curvprune.curvature import (
    AnalysisRecord,
    DensityRecord,
    DiagnosisRecord,
    DiagonalRecord,
    Disagreement,
    EigenvaluesRecord,
    EstimateRecord,
    LayerCurvatureRecord,
    ModelCurvatureRecord,
    TraceRecord,
)
from curvprune.files import StageTime
from curvprune.schema import Json, Number, decode, encode

# With the records of the packages that fill them: whoever reads a run needs no other module.
__all__ = [
    "FORMAT",
    "Alternative",
    "AnalysisRecord",
    "Attempt",
    "BudgetRecord",
    "CutRecord",
    "DensityRecord",
    "DiagnosisRecord",
    "DiagonalRecord",
    "Disagreement",
    "EigenvaluesRecord",
    "EngineRecord",
    "Estimate",
    "EstimateRecord",
    "FrontierPoint",
    "ItemColumns",
    "LayerCurvatureRecord",
    "LayerRecord",
    "LedgerRecord",
    "LimitUse",
    "ModelCard",
    "ModelComparison",
    "ModelCurvatureRecord",
    "NamedLimit",
    "OtherRun",
    "PairedLoss",
    "PriceRow",
    "Provenance",
    "RecoveryMoment",
    "RecoveryRecord",
    "RemovedUnits",
    "RunRecord",
    "Size",
    "StageTime",
    "TraceRecord",
    "Trial",
    "Verdict",
]

FORMAT = 3  # of the record; raised whenever its fields change


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A plan measured on the select split.

    Attributes:
        kind: ``"plan"``, ``"control"`` (needs no curvature) or ``"applied"`` (solved in sequence).
        bytes: tensor bytes of the whole model under the plan.
        predicted: its price by the ledger as it was first made, ± ``predicted_stderr``.
        expected: its price as earlier trials have corrected it.
        loss: rise of the mean loss over the model that the prices are of, ± ``loss_stderr``.
        drop: what the budget counts, from the uncompressed model; ``drop_stderr`` its standard
            error, ``bound`` its one-sided upper bound.
        chance: predicted probability of being certified; ``None`` without ``max_drop``.
        accepted: whether that chance is high enough; ``None`` without ``max_drop``.
        uses: what the plan uses of each limit of the budget.
        items: items of the select split.
        beats_plan: a control that was used instead of the plan.
    """

    name: str
    kind: str
    choices: dict[str, str]
    bytes: int
    predicted: Number | None
    predicted_stderr: Number | None
    expected: Number | None
    loss: Number
    loss_stderr: Number
    drop: Number
    drop_stderr: Number
    bound: Number
    chance: float | None
    accepted: bool | None
    uses: dict[str, float]
    items: int
    note: str = ""
    beats_plan: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Pruning and rounding in one plan, or one of the two alone, at the same limits.

    ``more`` is the loss beyond that of both together, paired by item. Where the options of one kind
    cannot meet the limits there is no trial: ``missed`` names those, ``smallest_bytes`` is the
    least that they allow.
    """

    name: str
    trial: str | None
    bytes: int | None = None
    predicted: Number | None = None
    predicted_stderr: Number | None = None
    loss: Number | None = None
    loss_stderr: Number | None = None
    more: Number | None = None
    more_stderr: Number | None = None
    missed: tuple[str, ...] = ()
    smallest_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A plan tested on the certify split."""

    plan: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """The engine that ran the model for its verdict.

    Attributes:
        bytes: of the file that it ran.
        weights: the drop of the same weights in torch, ± ``weights_stderr``.
        share: what the engine's own arithmetic loses beyond that, paired by item, ±
            ``share_stderr``.
    """

    name: str
    version: str
    bytes: int
    weights: Number
    weights_stderr: Number
    share: Number
    share_stderr: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitUse:
    """A limit of the budget on size or speed: the most allowed, and what the plan uses of it."""

    name: str
    most: float
    used: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryMoment:
    """A moment of a recovery: mean training loss since the one before, and the loss on select."""

    step: int
    training: Number | None
    select: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryRecord:
    """What a recovery of a plan did; see `curvprune.compression.Recovery`."""

    plan: str
    loss_before: Number
    loss_after: Number
    measure: str
    steps: int
    best_step: int
    trained: int
    flipped: int
    seconds: float
    history: tuple[RecoveryMoment, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedLimit:
    """A limit of the user's own: its name, and the most that the layers may take together."""

    name: str
    most: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRecord:
    """What was asked; see `curvprune.planning.Budget`."""

    metric: str
    max_drop: float | None
    max_bytes: int | None
    max_bits: float | None
    max_macs: float | None
    max_bops: float | None
    confidence: float
    limits: tuple[NamedLimit, ...] = ()
    quantile: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of the weights before and after, and of the whole folder; parameters before; bytes of
    the file that the model was read from, where it was one."""

    before_bytes: int
    parameters: int
    after_bytes: int | None = None
    folder_bytes: int | None = None
    source_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CutRecord:
    """Hidden units of one cut: its kind, how many are left, of how many."""

    kind: str
    left: int
    of: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovedUnits:
    """Hidden units removed before anything else; pairs are (before, after)."""

    cuts: dict[str, CutRecord]
    multiply_adds: tuple[int, int]
    parameters: tuple[int, int]
    latency_seconds: tuple[float, float] | None
    predicted: Number | None
    predicted_stderr: Number | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """What a layer got, and why."""

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    option: str
    bytes: int
    bits: float
    price: Number | None
    stderr: Number | None
    damping: float | None
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceRow:
    """One option of one layer; ``measured``: its price is no quadratic form but was measured."""

    layer: str
    option: str
    bytes: int
    price: Number
    stderr: Number
    model_stderr: float = 0.0
    measured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRecord:
    """A pass that shares of the loss are from: half their sum beside the measured divergence of the
    applied plan, per position."""

    plan: str
    shares: float
    shares_stderr: Number
    divergence: float
    divergence_stderr: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRecord:
    """The ledger without the items behind it."""

    measure: str
    curvature: str
    num_items: int
    labels_per_item: int
    rows: tuple[PriceRow, ...]
    kept: float = 0.0
    prices: str = "quadratic"
    audits: tuple[AuditRecord, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """The best plan of a size, by prices that add up."""

    bytes: int
    predicted: Number
    predicted_stderr: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What a run was made from and with."""

    recipe_sha256: str
    model_sha256: str
    data_sha256: dict[str, str]
    device: str
    seed: int
    curvprune: str
    torch: str
    python: str
    platform: str
    threads: int
    libraries: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything that a report says.

    Attributes:
        objective, measure: the loss, and what it is counted in, such as ``"nats/token"``.
        verdict: of the model that ships; ``None`` where no ``max_drop`` was asked.
        measured: the verdict, or the same test where there is no budget to judge by.
        items: results of every item of the certify split.
        engine: what ran the model for the verdict, where it was not torch.
        attempts: the plans that were tested, in order.
        corrections: option → factor on its prices, as the trials say.
        together: pruning and rounding together against each alone.
        structured: hidden units removed first.
        analysis: curvature, where it was asked for.
        state_bytes: size of the run folder's ``state/``, which ``curvprune clean`` removes.
    """

    title: str
    objective: str
    measure: str
    size: Size
    provenance: Provenance
    recipe: str
    budget: BudgetRecord | None = None
    verdict: Verdict | None = None
    measured: Verdict | None = None
    items: ItemColumns | None = None
    engine: EngineRecord | None = None
    attempts: tuple[Attempt, ...] = ()
    limits: tuple[LimitUse, ...] = ()
    corrections: dict[str, float] = field(default_factory=dict)
    together: tuple[Alternative, ...] = ()
    recoveries: tuple[RecoveryRecord, ...] = ()
    structured: RemovedUnits | None = None
    layers: tuple[LayerRecord, ...] = ()
    ledger: LedgerRecord | None = None
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    analysis: AnalysisRecord | None = None
    stages: tuple[StageTime, ...] = ()
    peak_memory_bytes: int = 0
    state_bytes: int = 0
    notes: tuple[str, ...] = ()
    format: int = FORMAT

    def to_json(self) -> Json:
        """Plain JSON values."""
        return encode(self)

    @staticmethod
    def from_json(value: Json, *, source: str) -> RunRecord:
        """The inverse of `to_json`. Raises ``ValueError`` naming ``source`` for a record that an
        earlier version wrote, or that is no record."""
        written = value.get("format") if isinstance(value, dict) else None
        if written != FORMAT:
            raise ValueError(
                f"{source} was written by another version of curvprune (format {written}, this one "
                f"reads {FORMAT}); run the recipe again with a new --out"
            )
        return decode(RunRecord, value, source=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What the ``README.md`` of a saved folder says.

    Attributes:
        architecture: the model's class.
        portable: who reads the folder besides `curvprune.load`; see `curvprune.targets`.
        packed: whether others read layers of it packed.
        builds_itself: whether `curvprune.load` needs no ``model=``.
        base_model: its name on a hub, or empty.
        source_bytes: of the file that the model was read from, where that is known.
        options: option → number of layers.
    """

    title: str
    architecture: str
    portable: bool | str
    packed: bool
    builds_itself: bool
    parameters: int
    bytes: int
    curvprune: str
    base_model: str = ""
    source_bytes: int | None = None
    options: dict[str, int] = field(default_factory=dict)
    verdict: Verdict | None = None
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedLoss:
    """How much worse one run's compressed model is than another's, paired by item."""

    metric: str
    measure: str
    baseline: Number
    compressed: Number
    drop: Number
    stderr: Number
    items: int
    clusters: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRun:
    """Another run to compare with: its record, and the paired differences on the same items, or
    why there are none (``unpaired``)."""

    name: str
    record: RunRecord
    paired: tuple[PairedLoss, ...] = ()
    unpaired: str = ""
