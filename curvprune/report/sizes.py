"""How large the model was and is: bytes, bits, the limits of the budget, the share of each
option."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from curvprune.record import LayerRecord, LimitUse, RunRecord, Size
from curvprune.report import charts
from curvprune.report.figures import (
    MISSING,
    THIN,
    TIMES,
    count,
    finite,
    fixed,
    percent,
    sig,
    size,
)
from curvprune.report.tables import (
    Cell,
    Column,
    Fact,
    Table,
    bytes_cell,
    count_cell,
    number_cell,
)

LIMITS = {  # what the budget may limit besides the drop
    "max_bytes": "bytes of the file of weights, with the most that its header can take",
    "max_bits": "stored bits per weight of the layers that had options",
    "max_macs": "multiply-adds of the layers that had options: per token of a language model, "
    "else per item",
    "max_bops": "bit operations (multiply-adds x weight bits x activation bits), likewise",
}


def option_order(record: RunRecord) -> list[str]:
    """Every option on record, least compressed first: by mean bytes relative to the layer's largest
    option."""
    # 1. The bytes of every option of every layer, from the ledger and from what was chosen.
    priced = record.ledger.rows if record.ledger is not None else ()
    choices = [(row.layer, row.option, row.bytes) for row in priced]
    choices += [(chosen.name, chosen.option, chosen.bytes) for chosen in record.layers]
    # 2. Each as a share of its layer's largest.
    largest: dict[str, int] = {}
    for layer, _, stored in choices:
        largest[layer] = max(stored, largest.setdefault(layer, stored))
    shares: dict[str, list[float]] = {}
    for layer, option, stored in choices:
        share = stored / largest[layer] if largest[layer] > 0 else 1.0
        shares.setdefault(option, []).append(share)
    # 3. Options of equal mean share stay in the order in which they first appear.
    return sorted(shares, key=lambda option: -sum(shares[option]) / len(shares[option]))


def option_colours(record: RunRecord) -> dict[str, str]:
    """Option → its colour, by depth of compression."""
    order = option_order(record)
    return {option: charts.depth_colour(k, len(order)) for k, option in enumerate(order)}


def times_smaller(sizes: Size) -> float | None:
    """Bytes before divided by bytes after."""
    return sizes.before_bytes / sizes.after_bytes if sizes.after_bytes else None


def stored_bits(sizes: Size) -> float | None:
    """Bits on disk per parameter of the uncompressed model."""
    if sizes.after_bytes is None or not sizes.parameters:
        return None
    return 8 * sizes.after_bytes / sizes.parameters


def times_text(times: float | None) -> str:
    return MISSING if times is None else f"{fixed(times, 2)}{THIN}{TIMES}"


def _source_fact(sizes: Size) -> list[Fact]:
    """The file that the model was read from, where it is another than these weights."""
    if sizes.source_bytes is None or sizes.source_bytes == sizes.before_bytes:
        return []
    read = sizes.source_bytes
    return [Fact("file read", size(read), finite(read), "", f"{count(read)} B, as the model came")]


def size_facts(record: RunRecord) -> list[Fact]:
    """Bytes before and after, their ratio, bits per parameter, what is used of each limit."""
    sizes = record.size
    before, after, folder = sizes.before_bytes, sizes.after_bytes, sizes.folder_bytes
    times, bits = times_smaller(sizes), stored_bits(sizes)
    facts = [
        Fact("weights before", size(before), finite(before), "", f"{count(before)} B"),
        *_source_fact(sizes),
        Fact("weights after", size(after), finite(after), "", f"{count(after)} B"),
        Fact(
            "ratio", times_text(times), times, "smaller", "weights before divided by weights after"
        ),
        Fact(
            "stored bits",
            fixed(bits, 2),
            bits,
            "per parameter",
            "8 x weights after / parameters, scales included",
        ),
        Fact("model folder", size(folder), finite(folder), "", "all files of model/"),
        Fact(
            "parameters",
            count(sizes.parameters),
            finite(sizes.parameters),
            "",
            "of the uncompressed model",
        ),
    ]
    for limit in record.limits:
        hint = LIMITS.get(limit.name, "a limit with a table of its own")
        facts.append(Fact(limit.name, limit_text(limit), finite(limit.used), "", hint))
    return facts


def limit_text(limit: LimitUse) -> str:
    """What the shipped plan uses of a limit, and the most that it may."""
    return f"{_amount(limit.used)} of {_amount(limit.most)}"


def _amount(value: float | None) -> str:
    return count(value) if value is not None and value >= 1e5 else sig(value, 4)


def layers_by_option(record: RunRecord) -> dict[str, list[LayerRecord]]:
    """Option → the layers that got it, least compressed option first."""
    found: dict[str, list[LayerRecord]] = {option: [] for option in option_order(record)}
    for layer in record.layers:
        found[layer.option].append(layer)
    return {option: layers for option, layers in found.items() if layers}


def size_chart(record: RunRecord) -> Markup:
    """Two stacked bars: the weights before, and after by option."""
    # 1. After: the layers by option, then what has no option, such as norms and biases.
    colours = option_colours(record)
    after = []
    for option, layers in layers_by_option(record).items():
        stored = math.fsum(layer.bytes for layer in layers)
        after.append(charts.Segment(option, stored, colours[option]))
    if record.size.after_bytes is not None:
        rest = record.size.after_bytes - math.fsum(segment.bytes for segment in after)
        if rest > 0:
            after.append(charts.Segment("everything else" if after else "weights", rest))
    # 2. Before: one part.
    bars = [("before", [charts.Segment("weights", float(record.size.before_bytes))])]
    if after:
        bars.append(("after", after))
    return charts.bars(bars)


def options_table(record: RunRecord) -> Table | None:
    """What each option holds of the model; ``None`` where no plan was chosen."""
    if not record.layers:
        return None
    columns = [
        Column("option"),
        Column("layers", "how many layers got it", "n"),
        Column("weights", "parameters of those layers", "n"),
        Column("bytes", "on disk, scales and zero points included", "n"),
        Column("share", "of the compressed weights' bytes", "n"),
        Column("bits/weight", "8 x bytes / weights", "n"),
        Column(
            f"sum of prices ({record.measure})",
            "the standard error of the whole plan is in section 3: layers share items, so errors "
            "do not add up",
            "n",
        ),
    ]
    colours, after = option_colours(record), record.size.after_bytes
    rows = []
    for option, layers in layers_by_option(record).items():
        rows.append([Cell(option, swatch=colours[option]), *_sums(layers, after)])
    foot = [Cell("all priced layers"), *_sums(record.layers, after)]
    return Table("options", columns, rows, foot)


def _sums(layers: Sequence[LayerRecord], after: int | None) -> list[Cell]:
    """Sums over layers; ``after``: bytes of all compressed weights."""
    stored = math.fsum(layer.bytes for layer in layers)
    weights = math.fsum(layer.parameters for layer in layers)
    prices = [finite(layer.price) for layer in layers]
    price = math.fsum(p for p in prices if p is not None)
    share = MISSING if not after else percent(float(f"{stored / after:.3g}"))
    bits = 8 * stored / weights if weights else None
    return [
        count_cell(len(layers)),
        count_cell(weights),
        bytes_cell(stored),
        number_cell(stored, share),
        number_cell(bits, fixed(bits, 2)),
        number_cell(price, sig(price)),
    ]
