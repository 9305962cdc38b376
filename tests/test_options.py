"""Option records: keys, YAML forms, and bytes against the tensors that are really written."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from curvprune.artifact import stored_tensors
from curvprune.compression import solve
from curvprune.model import find_layers
from curvprune.options import (
    BITS,
    Cast,
    Keep,
    Prune,
    PruneCast,
    PruneQuantize,
    Quantize,
    check_fits,
    option_from_key,
    parse_option,
    pruner_of,
    quantizer_of,
    stored_bytes,
)

OPTIONS = [
    Keep(),
    Cast(dtype="bfloat16"),
    *[
        Quantize(bits=bits, group_size=group_size, symmetric=symmetric)
        for bits, group_size, symmetric in product(BITS, (None, 8, 7), (True, False))
    ],
    Prune(sparsity=0.25),
    Prune(sparsity=1 / 3),
    Prune(pattern="2:4"),
    PruneCast(prune=Prune(sparsity=2e-5), cast=Cast(dtype="float16")),
    PruneCast(prune=Prune(pattern="3:8"), cast=Cast(dtype="bfloat16")),
    PruneQuantize(prune=Prune(pattern="1:4"), quantize=Quantize(bits=3, group_size=8)),
    PruneQuantize(prune=Prune(sparsity=0.5), quantize=Quantize(bits=4, symmetric=False)),
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.key)
def test_keys_read_back(option):
    assert option_from_key(option.key) == option


def test_keys_are_unique():
    assert len({o.key for o in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.key)
@pytest.mark.parametrize("shape", [(5, 24), (33, 40), (1, 8)])
def test_bytes_are_those_of_the_tensors_on_disk(option, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    layer = find_layers(model)["0"]
    x = torch.randn(100, shape[1])
    solved = solve(layer.weight.detach(), [option], x.t() @ x / 100, layer="0")[0]
    forms = [
        "dense",
        *(["packed"] if quantizer_of(option) else []),
        *(["sparse"] if pruner_of(option) else []),
    ]
    for form in forms:
        tensors = stored_tensors(layer, solved, form=form)
        on_disk = sum(t.numel() * t.element_size() for t in tensors.values())
        assert stored_bytes(option, shape, dtype="float32", form=form) == on_disk


@pytest.mark.parametrize(
    ("value", "option"),
    [
        ("keep", Keep()),
        ({"cast": "float16"}, Cast(dtype="float16")),
        ({"quantize": {"bits": 4}}, Quantize(bits=4)),
        (
            {"prune": {"pattern": "2:4"}, "quantize": {"bits": 4, "group_size": 8}},
            PruneQuantize(prune=Prune(pattern="2:4"), quantize=Quantize(bits=4, group_size=8)),
        ),
        (
            {"cast": "bfloat16", "prune": {"sparsity": 0.5}},
            PruneCast(prune=Prune(sparsity=0.5), cast=Cast(dtype="bfloat16")),
        ),
    ],
)
def test_yaml_forms(value, option):
    assert parse_option(value) == option


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quantize": {"bits": 9}}, r"bits=9 is not offered; .*nearest: 8"),
        ({"quantize": {"bits": 0}}, r"bits=0 is not offered; .*nearest: 1"),
        (
            {"prune": {"sparsity": 0.5}, "quantize": {"bits": 1}},
            r"bits=1 has two values .*nearest: 2",
        ),
        ({"quantize": {"bits": 4, "groupsize": 64}}, "expected a mapping with keys from"),
        ({"quantize": {"bits": 4, "group_size": 0}}, "positive integer"),
        ({"quantize": {"bits": True}}, "not offered"),
        ({"prune": {"sparsity": 1.5}}, "strictly between 0 and 1"),
        ({"prune": {"sparsity": 0.5, "pattern": "2:4"}}, "exactly one"),
        ({"prune": {"pattern": "4:2"}}, "0 < N < M"),
        ({"cast": "int8"}, "choose float16 or bfloat16"),
        ({"cast": "float16", "quantize": {"bits": 4}}, "prune with quantize or with cast"),
        ({"cast": "int8", "prune": {"sparsity": 0.5}}, "choose float16 or bfloat16"),
        ({"squeeze": {}}, "expected keep, cast"),
        (None, "expected one of"),
    ],
)
def test_bad_options_say_what_to_write(value, message):
    with pytest.raises(ValueError, match=message):
        parse_option(value)


def test_options_that_do_not_fit_name_layer_and_nearest_value():
    with pytest.raises(
        ValueError,
        match=r"layer a\.b: group_size=64 does not divide its 96 inputs.*transformers.*"
        "nearest that does: 48.*target: curvprune",
    ):
        check_fits(Quantize(bits=4, group_size=64), "a.b", (10, 96), reader="transformers")
    with pytest.raises(
        ValueError, match=r"layer x: pattern 2:4 needs a multiple of 4 inputs.*sparsity: 0.5"
    ):
        check_fits(Prune(pattern="2:4"), "x", (10, 30))
    check_fits(Quantize(bits=4, group_size=32), "a.b", (10, 96), reader="transformers")
    check_fits(Quantize(bits=4, group_size=64), "a.b", (10, 96))
    check_fits(
        Quantize(bits=1, group_size=64), "a.b", (10, 96), reader="transformers"
    )  # stored dense
