"""Controls against plans written out by hand."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from curvprune.model import find_layers
from curvprune.planning import Within, cheapest
from curvprune.pricing import Row
from curvprune.run import controls, sensitive
from tests import tiny

BYTES = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}


def rows_of(
    options: dict[str, list[str]], prices: dict[str, float], weights: dict[str, int]
) -> list[Row]:
    """Bytes grow with the width; a price falls fourfold with each bit from what the layer costs at
    none."""
    return [
        Row(
            layer=n,
            option=o,
            bytes=BYTES[o] * weights[n],
            price=prices[n] * 4.0 ** -BYTES[o],
            stderr=0.1,
        )
        for n in options
        for o in options[n]
    ]


def made(rows, layers, size, *, units=None):
    """Name -> choices, with the planner that the stages pass."""
    units = units or [(n,) for n in layers]
    groups = [measure for measure in units if len(measure) > 1]
    plan = lambda rows, size: cheapest(rows, Within(max_bytes=size, same_option=tuple(groups)))  # noqa: E731
    return {c.name: c.choices for c in controls(rows, layers, units, size=size, plan=plan)}


def test_what_hand_written_rules_protect():
    names = set(find_layers(tiny.llama(tied=False, layers=4)))
    protected = sensitive(find_layers(tiny.llama(tied=False, layers=4)))
    middle = {n for n in names if n.startswith(("model.layers.1.", "model.layers.2."))}
    assert names - protected == {n for n in middle if not n.endswith("down_proj")}
    stack = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    assert sensitive(find_layers(stack)) == {"0", "3"}
    named = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("stem", "middle", "fc2", "head")})
    assert sensitive(find_layers(named)) == {"stem", "fc2", "head"}
    blocks = nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "blocks": nn.ModuleList(), "neck": nn.Linear(4, 4)}
    )
    blocks["blocks"].extend(
        nn.ModuleDict({"attention": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)}) for _ in range(3)
    )
    assert set(find_layers(blocks)) - sensitive(find_layers(blocks)) == {
        "blocks.1.attention",
        "blocks.1.fc1",
    }
    bert = nn.ModuleList(
        nn.ModuleDict(
            {"attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(4, 4)})}),
             "output": nn.ModuleDict({"dense": nn.Linear(4, 4)})}
        )
        for _ in range(3)
    )  # fmt: skip
    assert set(find_layers(bert)) - sensitive(find_layers(bert)) == {"1.attention.output.dense"}


@pytest.fixture
def stack():
    return find_layers(nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)]))


def test_the_controls_near_a_size(stack):
    weights = {n: layer.numel for n, layer in stack.items()}
    rows = rows_of(
        {n: list(BYTES) for n in stack}, {"0": 5.0, "1": 1.0, "2": 2.0, "3": 0.5}, weights
    )
    found = made(rows, stack, 1500)
    assert found["uniform int3"] == dict.fromkeys(stack, "int3")  # 1200 bytes
    assert found["uniform int4"] == dict.fromkeys(stack, "int4")  # 1600 bytes
    # First and last wider: 2 and 4 bits (1200), 3 and 4 bits (1400); 2 and 8 bits (2000) are too
    # large.
    assert found["static rule, int3 and int4"] == {
        "0": "int4",
        "1": "int3",
        "2": "int3",
        "3": "int4",
    }
    assert set(found) == {
        "uniform int3",
        "uniform int4",
        "static rule, int3 and int4",
        "reversed order",
    }
    # Reversed: layer 3 is priced like layer 0, 1 like 2, and the other way round.
    swapped = rows_of(
        {n: list(BYTES) for n in stack}, {"0": 0.5, "1": 2.0, "2": 1.0, "3": 5.0}, weights
    )
    assert found["reversed order"] == cheapest(swapped, Within(max_bytes=1500))
    smallest = made(rows, stack, 800)
    assert set(smallest) == {
        "uniform int2",
        "uniform int3",
        "static rule, int2 and int3",
        "reversed order",
    }


def test_layers_that_are_offered_different_options_take_the_nearest(stack):
    weights = {n: layer.numel for n, layer in stack.items()}
    options = {"0": ["int8"], "1": ["int2", "int3"], "2": ["int4", "int8"], "3": ["int2", "int4"]}
    rows = rows_of(options, {"0": 1.0, "1": 1.0, "2": 2.0, "3": 1.0}, weights)
    found = made(rows, stack, 1600)
    assert found["uniform int2"] == {
        "0": "int8",
        "1": "int2",
        "2": "int4",
        "3": "int2",
    }  # 1600 bytes
    assert {
        n: o in options[n] for choices in found.values() for n, o in choices.items()
    } == dict.fromkeys(stack, True)
    assert (
        made(rows_of({n: ["int4"] for n in stack}, dict.fromkeys(stack, 1.0), weights), stack, 1600)
        == {}
    )


def test_controls_keep_to_layers_that_share(stack):
    weights = {n: layer.numel for n, layer in stack.items()}
    rows = rows_of(
        {n: list(BYTES) for n in stack}, {"0": 5.0, "1": 1.0, "2": 2.0, "3": 0.5}, weights
    )
    for size in range(800, 3300, 100):
        for choices in made(rows, stack, size, units=[("0", "1"), ("2",), ("3",)]).values():
            assert choices["0"] == choices["1"] and list(choices) == list(stack)


def test_every_size_has_controls_around_it(stack):
    weights = {n: layer.numel for n, layer in stack.items()}
    rows = rows_of(
        {n: list(BYTES) for n in stack}, {"0": 5.0, "1": 1.0, "2": 2.0, "3": 0.5}, weights
    )
    stored = {(r.layer, r.option): r.bytes for r in rows}
    uniform = {o: sum(stored[n, o] for n in stack) for o in BYTES}
    pairs = [2 * (uniform[a] + uniform[b]) / 4 for a, b in itertools.combinations(BYTES, 2)]
    for size in range(800, 3300, 50):
        totals = {
            name: sum(stored[pair] for pair in plan.items())
            for name, plan in made(rows, stack, size).items()
        }
        assert totals.pop("reversed order") <= size
        static = next(total for name, total in totals.items() if name.startswith("static"))
        assert static == max((p for p in pairs if p <= size), default=min(pairs))
        same = sorted(total for name, total in totals.items() if name.startswith("uniform"))
        below, above = (
            [u for u in uniform.values() if u <= size],
            [u for u in uniform.values() if u > size],
        )
        assert same == [*below[-1:], *above[:1]]
