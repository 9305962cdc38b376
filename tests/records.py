"""Records of runs that were never made: whole, typed, with numbers a test can work out."""

from __future__ import annotations

import math
import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

from curvprune.record import (
    Alternative,
    AnalysisRecord,
    Attempt,
    BudgetRecord,
    CutRecord,
    DensityRecord,
    DiagnosisRecord,
    DiagonalRecord,
    Disagreement,
    EigenvaluesRecord,
    EstimateRecord,
    FrontierPoint,
    ItemColumns,
    LayerCurvatureRecord,
    LayerRecord,
    LedgerRecord,
    LimitUse,
    ModelCurvatureRecord,
    PriceRow,
    Provenance,
    RecoveryMoment,
    RecoveryRecord,
    RemovedUnits,
    RunRecord,
    Size,
    StageTime,
    TraceRecord,
    Trial,
    Verdict,
)

HOSTILE = (
    "\"'></pre></title></style><script>alert(1)</script><img src=http://evil.example/x "
    "onerror=alert(2)>\x00\x1b[31m\ud800{{ 7*7 }}"
)
KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
BITS = {
    "keep": 16.0,
    "int8-g64-sym": 8.25,
    "int4-g64-asym": 4.31,
    "int3-g64-asym": 3.3,
    "prune0.5+int4-g64-sym": 4.25,
    "int2-g64-asym": 2.28,
}
ERROR = {
    "keep": 0.0,
    "int8-g64-sym": 3e-8,
    "int4-g64-asym": 9e-6,
    "int3-g64-asym": 4.5e-5,
    "prune0.5+int4-g64-sym": 7e-5,
    "int2-g64-asym": 4e-4,
}
LIGHT = ["int3-g64-asym", "int4-g64-asym", "int3-g64-asym", "prune0.5+int4-g64-sym"]
RECIPE = """model: HuggingFaceTB/SmolLM2-135M
budget:
  metric: loss
  max_drop: 0.02
options:
  - keep
  - quantize: {bits: 4, group_size: 64}
# source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M
"""
SECONDS = {
    "load": 4.2,
    "layers": 0.06,
    "curvature": 611.4,
    "price": 288.3,
    "plan": 3.9,
    "apply": 402.8,
    "certify": 96.1,
}
BUDGET = BudgetRecord(
    metric="loss",
    max_drop=0.02,
    max_bytes=None,
    max_bits=None,
    max_macs=None,
    max_bops=None,
    confidence=0.95,
)
PROVENANCE = Provenance(
    recipe_sha256="9f" * 32,
    model_sha256="c4" * 32,
    data_sha256={"calibrate": "01" * 32, "select": "ab" * 32, "certify": "7e" * 32},
    device="cpu",
    seed=0,
    curvprune="0.1.0",
    torch="2.13.0",
    python="3.12.4",
    platform="Linux x86_64",
    threads=2,
    libraries={"transformers": "5.22.2"},
)


def verdict(drop: float, stderr: float, status: str) -> Verdict:
    return Verdict(
        status=status,
        metric="loss",
        measure="nats/token",
        baseline=2.91374,
        compressed=2.91374 + drop,
        drop=drop,
        stderr=stderr,
        bound=drop + 1.6449 * stderr,
        max_drop=0.02,
        confidence=0.95,
        items=65408,
        clusters=511,
        needed=None,
        method="paired, one-sided t over clusters (documents)",
    )


def trial(
    name: str, kind: str, size: int, predicted: float, measured: float, note: str = ""
) -> Trial:
    stderr = 0.0011 + 0.05 * abs(measured)
    return Trial(
        name=name,
        kind=kind,
        choices={},
        bytes=size,
        predicted=predicted,
        predicted_stderr=0.06 * abs(predicted) + 3e-4,
        expected=predicted,
        loss=measured,
        loss_stderr=stderr,
        drop=measured,
        drop_stderr=stderr,
        bound=measured + 1.7 * stderr,
        chance=None,
        accepted=kind != "control" and measured < 0.02,
        uses={},
        items=32704,
        note=note,
    )


def trials(after: int) -> tuple[Trial, ...]:
    """Plans, controls and the applied plan that ships, which has ``after`` bytes."""
    note = "over budget on select: re-planned with the measured loss"
    return (
        trial("plan-1", "plan", round(after * 0.86), 0.0271, 0.0312, note),
        trial("plan-2", "plan", round(after * 1.12), 0.00795, 0.0083),
        trial("plan-3", "plan", after, 0.01312, 0.0143),
        trial("uniform int4-g64-asym", "control", round(after * 1.07), 0.0214, 0.0231),
        trial("uniform int3-g64-asym", "control", round(after * 0.8), 0.147, 0.171),
        trial("reversed order", "control", after, 0.2214, 0.296),
        trial("applied plan-3", "applied", after, 0.01312, 0.01405),
    )


def fisher_trace(
    parameters: int, shape: tuple[int, int], trace: EstimateRecord
) -> LayerCurvatureRecord:
    """What a run knows of a layer's curvature without a second-order analysis."""
    return LayerCurvatureRecord(
        parameters=parameters,
        shape=shape,
        trace=TraceRecord(
            value=trace.value, stderr=trace.stderr, num_products=0, converged=True, method="items"
        ),
        diagonal=DiagonalRecord(
            mean=trace.value / parameters,
            max=900 * trace.value / parameters,
            q50=0.2 * trace.value / parameters,
            q99=11 * trace.value / parameters,
        ),
        exact=False,
        gauss_newton_trace=None,
        eigenvalues=None,
        density=None,
    )


def prices_of(rng: random.Random, name: str, parameters: int, weight: float) -> dict[str, PriceRow]:
    """Every option of a layer; deeper compression costs more, in a layer of more ``weight``."""
    prices = {}
    for option, bits in BITS.items():
        price = ERROR[option] * weight * math.exp(rng.gauss(0, 0.2))
        stderr = price * rng.uniform(0.04, 0.2)
        if option == "int8-g64-sym":
            price, stderr = price + rng.gauss(0, 2e-8), 2e-8
        prices[option] = PriceRow(
            layer=name,
            option=option,
            bytes=round(parameters * bits / 8),
            price=price,
            stderr=stderr,
        )
    return prices


def chosen_option(rng: random.Random, name: str, weight: float) -> str:
    if name == "lm_head" or weight > 6:
        return "int8-g64-sym"
    return "int4-g64-asym" if weight > 1.4 else rng.choice(LIGHT)


def layer_record(
    shape: tuple[int, int], row: PriceRow, least: float, *, noted: bool
) -> LayerRecord:
    """A layer that got the option of ``row``; ``least``: the price of its smallest option."""
    parameters = shape[0] * shape[1]
    return LayerRecord(
        name=row.layer,
        kind="Linear",
        shape=shape,
        parameters=parameters,
        option=row.option,
        bytes=row.bytes,
        bits=BITS[row.option],
        price=row.price,
        stderr=row.stderr,
        damping=0.01,
        reason=f"int2-g64-asym saves {parameters // 4} B more for {least:.2g} nats",
        notes=("damping raised to 0.05 after a failed Cholesky",) if noted else (),
    )


def frontier_below(after: int) -> tuple[FrontierPoint, ...]:
    """Eighteen plans, each larger by the same bytes and better by the same factor."""
    points = []
    for k in range(18):
        points.append(
            FrontierPoint(
                bytes=round(after * (0.62 + 0.05 * k)),
                predicted=0.11 * math.exp(-0.31 * k),
                predicted_stderr=0.009 * math.exp(-0.28 * k),
            )
        )
    return tuple(points)


def language_model(*, blocks: int = 30, seed: int = 0) -> RunRecord:
    """A run like a 135 M parameter causal language model's: ``7 blocks + 1`` layers, six options
    each."""
    rng = random.Random(seed)
    shapes = {}
    for block in range(blocks):
        for kind, shape in KINDS.items():
            shapes[f"model.layers.{block}.{kind}"] = shape
    shapes["lm_head"] = (49152, 576)
    layers: list[LayerRecord] = []
    rows: list[PriceRow] = []
    curvature: dict[str, LayerCurvatureRecord] = {}
    for k, (name, shape) in enumerate(shapes.items()):
        parameters, depth = shape[0] * shape[1], k / len(shapes)
        weight = math.exp(rng.gauss(0, 0.6)) * (1 + 3 * (depth - 0.5) ** 2)
        weight *= 6 if "down" in name else 2 if "v_proj" in name else 1
        trace = 40 * weight * math.exp(rng.gauss(0, 0.3))
        estimate = EstimateRecord(value=trace, stderr=trace * rng.uniform(0.02, 0.15))
        curvature[name] = fisher_trace(parameters, shape, estimate)
        prices = prices_of(rng, name, parameters, weight)
        rows += prices.values()
        option, least = chosen_option(rng, name, weight), prices["int2-g64-asym"].price
        layers.append(layer_record(shape, prices[option], least, noted=k % 53 == 7))
    total = sum(layer.parameters for layer in layers)
    after = sum(layer.bytes for layer in layers) + 250_000
    certified = verdict(0.014713, 0.001876, "CERTIFIED")
    return RunRecord(
        title="SmolLM2-135M, budget 0.02 nats/token",
        objective="causal-lm",
        measure="nats/token",
        budget=BUDGET,
        verdict=certified,
        attempts=(
            Attempt(plan="plan-2", verdict=verdict(0.008112, 0.00143, "CERTIFIED")),
            Attempt(plan="plan-3", verdict=certified),
        ),
        items=ItemColumns(
            documents=tuple(f"topic {k}" for k in range(9)),
            document=tuple(k % 9 for k in range(48)),
            index=tuple(range(48)),
            count=(127,) * 48,
            before=tuple(rng.gauss(2.9, 0.5) for _ in range(48)),
            after=tuple(rng.gauss(2.92, 0.5) for _ in range(48)),
        ),
        size=Size(
            before_bytes=2 * total + 250_000,
            after_bytes=after,
            folder_bytes=after + 2_412_118,
            parameters=total + 125_000,
        ),
        layers=tuple(layers),
        ledger=LedgerRecord(
            measure="nats/token",
            curvature="Kronecker-factored Fisher, labels sampled from the model",
            num_items=512,
            labels_per_item=2,
            rows=tuple(rows),
        ),
        trials=trials(after),
        frontier=frontier_below(after),
        analysis=AnalysisRecord(
            matrix="Fisher (labels sampled from the model)",
            measure="nats/token",
            num_items=512,
            layers=curvature,
        ),
        stages=tuple(
            StageTime(name=name, seconds=seconds, resumed=name == "layers")
            for name, seconds in SECONDS.items()
        ),
        peak_memory_bytes=3_412_213_760,
        provenance=PROVENANCE,
        recipe=RECIPE,
        notes=(
            "layer lm_head is tied to model.embed_tokens and was untied",
            "2 calibration documents were shorter than 16 tokens and were left out",
        ),
    )


def without_verdict(record: RunRecord) -> RunRecord:
    """The same run, asked for a size instead of a drop."""
    budget = replace(BUDGET, max_drop=None, max_bytes=40_000_000)
    return replace(record, verdict=None, attempts=(), budget=budget)


def classifier(*, after: list[float], right: list[int], documents: list[int]) -> RunRecord:
    """A classifier's record with four items on the certify split."""
    items = ItemColumns(
        documents=("a", "b", "c", "d"),
        document=tuple(documents),
        index=(0, 1, 2, 3),
        count=(1,) * 4,
        before=(1.0,) * 4,
        after=tuple(after),
        right_before=(1,) * 4,
        right_after=tuple(right),
    )
    record = language_model(blocks=1)
    return replace(record, objective="classification", measure="nats/example", items=items)


def two_classifiers(documents: list[int]) -> tuple[RunRecord, RunRecord]:
    """The first one's losses are 1, 2, 3 and 6 higher; it is wrong on the first two items, the
    second on the last."""
    here = classifier(after=[2.0, 2.5, 5.0, 6.25], right=[0, 0, 1, 1], documents=documents)
    there = classifier(after=[1.0, 0.5, 2.0, 0.25], right=[1, 1, 1, 0], documents=documents)
    return here, there


REMOVED = RemovedUnits(
    cuts={
        "a.mlp": CutRecord(kind="mlp", left=30, of=40),
        "b.mlp": CutRecord(kind="mlp", left=10, of=40),
        "a.attn": CutRecord(kind="heads", left=4, of=4),
    },
    multiply_adds=(2000, 1250),
    parameters=(800, 700),
    latency_seconds=None,
    predicted=0.0123,
    predicted_stderr=0.0021,
    notes=("40 units of 3 cuts were removed first",),
)


def everything(small: RunRecord) -> RunRecord:
    """A record with something in every field."""
    assert small.verdict is not None
    history = (
        RecoveryMoment(step=0, training=None, select=3.2),
        RecoveryMoment(step=80, training=3.0, select=3.1),
    )
    recovery = RecoveryRecord(
        plan="plan-3",
        loss_before=3.2,
        loss_after=3.1,
        measure="nats/token",
        steps=100,
        best_step=80,
        trained=12345,
        flipped=678,
        seconds=77.7,
        history=history,
    )
    together = (
        Alternative(name="pruning and rounding", trial="plan-3", bytes=123_456, loss=0.01),
        Alternative(name="rounding", trial="r", bytes=123_000, more=0.01, more_stderr=0.001),
        Alternative(name="pruning", trial=None, missed=("max_bytes",), smallest_bytes=200_000),
    )
    return replace(
        small,
        measured=small.verdict,
        limits=(LimitUse(name="max_bits", most=4.25, used=4.2),),
        corrections={"int4-g64-asym": 1.1},
        together=together,
        recoveries=(recovery,),
        structured=REMOVED,
        analysis=ANALYSIS,
        state_bytes=5_000_000,
    )


# The same with other values


def judged(record: RunRecord, **changes: Any) -> RunRecord:
    """The record with another verdict."""
    assert record.verdict is not None
    return replace(record, verdict=replace(record.verdict, **changes))


def as_accuracy(record: RunRecord) -> RunRecord:
    return judged(
        record,
        metric="accuracy",
        measure="fraction",
        baseline=0.8123,
        compressed=0.8101,
        drop=0.0022,
        stderr=0.00171,
        bound=0.00501,
        max_drop=0.007,
    )


def poisoned(value: Any) -> Any:
    """Every text of a record made hostile, keys included."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, tuple):
        return tuple(poisoned(v) for v in value)
    if isinstance(value, dict):
        return {k + HOSTILE: poisoned(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: poisoned(getattr(value, name)) for name in names})
    return value


def numbers_as(value: Any, number: float) -> Any:
    """Every float of a record replaced."""
    if isinstance(value, float):
        return number
    if isinstance(value, tuple):
        return tuple(numbers_as(v, number) for v in value)
    if isinstance(value, dict):
        return {k: numbers_as(v, number) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: numbers_as(getattr(value, name), number) for name in names})
    return value


# A second-order analysis


def _bump(x: float, at: float, width: float) -> float:
    return math.exp(-0.5 * ((x - at) / width) ** 2) / (width * math.sqrt(2 * math.pi))


def density(points: int = 400) -> DensityRecord:
    """A bulk at zero, a negative shoulder and an outlier three decades away with a millionth of the
    mass."""
    grid = [1e-3 * math.sinh(-7 + 19 * k / (points - 1)) for k in range(points)]
    heights = []
    for x in grid:
        bulk, shoulder = 0.9 * _bump(x, 0, 0.004), 0.1 * _bump(x, -0.05, 0.03)
        heights.append(bulk + shoulder + 1e-6 * _bump(x, 40.0, 1.0))
    return DensityRecord(
        grid=tuple(grid),
        density=tuple(heights),
        nodes=((-0.2, 0.0, 40.0), (-0.1, 0.01, 39.9)),
        weights=((0.1, 0.8, 0.1), (0.2, 0.7, 0.1)),
        num_products=80,
        dim=2400,
    )


def eigenvalues(*values: float, converged: bool = True) -> EigenvaluesRecord:
    n = len(values)
    return EigenvaluesRecord(
        values=values,
        residuals=(1e-4,) * n,
        errors=(1e-6,) * n,
        converged=converged,
        num_products=40,
    )


def layer_curvature(
    trace: float, *, exact: bool = False, converged: bool = True, other: float | None = None
) -> LayerCurvatureRecord:
    return LayerCurvatureRecord(
        parameters=600,
        shape=(20, 30),
        trace=TraceRecord(
            value=trace, stderr=0.1, num_products=32, converged=converged, method="joint probes"
        ),
        diagonal=DiagonalRecord(mean=trace / 600, max=1.0, q50=-0.01, q99=0.5),
        exact=exact,
        gauss_newton_trace=None if other is None else EstimateRecord(value=other, stderr=0.2),
        eigenvalues=eigenvalues(3.0, -0.5),
        density=density(60),
    )


ANALYSIS = AnalysisRecord(
    matrix="Hessian",
    measure="nats/token",
    num_items=16,
    layers={
        "a.first": layer_curvature(-40.0, other=60.0),
        "a.second": layer_curvature(0.3, exact=True, other=0.3),
        "a.third": layer_curvature(900.0, converged=False),
        "a.fourth": layer_curvature(12.0),
    },
    model=ModelCurvatureRecord(
        parameters=2400,
        loss=2.5,
        gradient_norm=0.3,
        trace=EstimateRecord(value=872.3, stderr=4.0),
        eigenvalues=eigenvalues(40.0, 7.0, -0.2),
        density=density(),
    ),
    diagnosis=DiagnosisRecord(
        lambda_max=40.0,
        lambda_min=-0.2,
        sharpness=41.0,
        max_learning_rate=0.05,
        negative_share=EstimateRecord(value=0.031, stderr=0.004),
        near_zero_share=EstimateRecord(value=0.912, stderr=0.011),
        near_zero_below=0.004,
        effective_rank=11.2,
        gradient_norm=0.3,
        relative_gradient=0.02,
        kind="saddle",
        text=("This point is a saddle.", "Steps above 0.05 diverge."),
        disagreements=(
            Disagreement(layer="a.first", hessian=-40.0, gauss_newton=60.0, ratio=-1.5),
        ),
    ),
    notes=("fused attention was switched off",),
)


def analysed(analysis: AnalysisRecord = ANALYSIS) -> RunRecord:
    """A run of ``curvprune analyze``: nothing but prices and curvature."""
    record = language_model(blocks=1)
    return RunRecord(
        title="t",
        objective="causal-lm",
        measure="nats/token",
        size=Size(before_bytes=record.size.before_bytes, parameters=2400),
        provenance=PROVENANCE,
        recipe=RECIPE,
        analysis=analysis,
    )
