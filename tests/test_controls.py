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
PRICES = {"0": 5.0, "1": 1.0, "2": 2.0, "3": 0.5}
LINEAR = 100  # weights of each layer


def rows_of(options: dict[str, list[str]], prices: dict[str, float]) -> list[Row]:
    """Bytes grow with the width; a price falls fourfold with each bit from what the layer costs at
    none."""
    rows = []
    for name, offered in options.items():
        for option in offered:
            price = prices[name] * 4.0 ** -BYTES[option]
            size = BYTES[option] * LINEAR
            rows.append(Row(layer=name, option=option, bytes=size, price=price, stderr=0.1))
    return rows


def made(rows, layers, size, *, groups=None):
    """Name → choices, with the planner that the stages pass."""
    groups = groups or [(name,) for name in layers]
    shared = tuple(group for group in groups if len(group) > 1)

    def plan(rows, size):
        return cheapest(rows, Within(max_bytes=size, same_option=shared))

    return {c.name: c.choices for c in controls(rows, layers, groups, size=size, plan=plan)}


def test_what_hand_written_rules_protect():
    layers = find_layers(tiny.llama(tied=False, layers=4))
    middle = {n for n in layers if n.startswith(("model.layers.1.", "model.layers.2."))}
    inner = {n for n in middle if not n.endswith("down_proj")}
    assert set(layers) - sensitive(layers) == inner


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def block(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (nn.Sequential(linear(), linear(), linear(), linear()), {"1", "2"}),
        (block(stem=linear(), middle=linear(), fc2=linear(), head=linear()), {"middle"}),
        (
            block(
                stem=linear(),
                blocks=nn.ModuleList([block(attention=linear(), fc1=linear()) for _ in range(3)]),
                neck=linear(),
            ),
            {"blocks.1.attention", "blocks.1.fc1"},
        ),
        (  # of two that end alike, the attention's is no down projection
            nn.ModuleList(
                [
                    block(
                        attention=block(output=block(dense=linear())), output=block(dense=linear())
                    )
                    for _ in range(3)
                ]
            ),
            {"1.attention.output.dense"},
        ),
    ],
    ids=["numbers", "names", "blocks", "bert"],
)
def test_what_the_rules_leave_of_a_model(model, others):
    layers = find_layers(model)
    assert set(layers) - sensitive(layers) == others


@pytest.fixture(scope="module")
def stack():
    return find_layers(nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)]))


@pytest.fixture(scope="module")
def rows(stack):
    return rows_of({name: list(BYTES) for name in stack}, PRICES)


def test_the_controls_near_a_size(stack, rows):
    found = made(rows, stack, 1500)
    assert found["uniform int3"] == dict.fromkeys(stack, "int3")  # 1200 bytes
    assert found["uniform int4"] == dict.fromkeys(stack, "int4")  # 1600 bytes
    # First and last wider: 2 and 4 bits (1200), 3 and 4 bits (1400); 2 and 8 bits (2000) are too
    # large.
    static = {"0": "int4", "1": "int3", "2": "int3", "3": "int4"}
    assert found["static rule, int3 and int4"] == static
    names = {"uniform int3", "uniform int4", "static rule, int3 and int4", "reversed order"}
    assert set(found) == names
    # Reversed: layer 3 is priced like layer 0, 1 like 2, and the other way round.
    opposite = {"0": 0.5, "1": 2.0, "2": 1.0, "3": 5.0}
    swapped = rows_of({name: list(BYTES) for name in stack}, opposite)
    assert found["reversed order"] == cheapest(swapped, Within(max_bytes=1500))
    names = {"uniform int2", "uniform int3", "static rule, int2 and int3", "reversed order"}
    assert set(made(rows, stack, 800)) == names


def test_layers_that_are_offered_different_options_take_the_nearest(stack):
    options = {"0": ["int8"], "1": ["int2", "int3"], "2": ["int4", "int8"], "3": ["int2", "int4"]}
    rows = rows_of(options, {"0": 1.0, "1": 1.0, "2": 2.0, "3": 1.0})
    found = made(rows, stack, 1600)
    # 1600 bytes
    assert found["uniform int2"] == {"0": "int8", "1": "int2", "2": "int4", "3": "int2"}
    for choices in found.values():
        assert list(choices) == list(stack)
        assert all(option in options[name] for name, option in choices.items())


def test_without_a_choice_there_is_no_control(stack):
    rows = rows_of({name: ["int4"] for name in stack}, dict.fromkeys(stack, 1.0))
    assert made(rows, stack, 1600) == {}


def test_controls_keep_to_layers_that_share(stack, rows):
    for size in range(800, 3300, 100):
        found = made(rows, stack, size, groups=[("0", "1"), ("2",), ("3",)])
        for choices in found.values():
            assert choices["0"] == choices["1"] and list(choices) == list(stack)


def test_every_size_has_controls_around_it(stack, rows):
    stored = {(row.layer, row.option): row.bytes for row in rows}
    uniform = {}
    for option in BYTES:
        uniform[option] = sum(stored[name, option] for name in stack)
    pairs = [2 * (uniform[a] + uniform[b]) / 4 for a, b in itertools.combinations(BYTES, 2)]
    for size in range(800, 3300, 50):
        totals = {}
        for name, plan in made(rows, stack, size).items():
            totals[name] = sum(stored[pair] for pair in plan.items())
        assert totals.pop("reversed order") <= size
        static = next(total for name, total in totals.items() if name.startswith("static"))
        assert static == max((pair for pair in pairs if pair <= size), default=min(pairs))
        same = sorted(total for name, total in totals.items() if name.startswith("uniform"))
        below = [total for total in uniform.values() if total <= size]
        above = [total for total in uniform.values() if total > size]
        assert same == [*below[-1:], *above[:1]]
