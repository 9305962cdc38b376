"""Multiply-adds against torch's own counter of floating-point operations, and the limits that are
made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import curvprune as cp
from curvprune.model import CausalLM, Classification, find_layers
from curvprune.planning import Budget, Choice
from curvprune.pricing import LayerWork, limits_of, macs_left, multiply_adds, work_of
from tests import tiny
from tests.plans import table
from tests.test_experts import mixtral


class Convolutions(nn.Module):
    """Strides, dilation, groups, a layer that is called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2)
        self.line = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = self.grouped(self.grouped(x).relu())
        return self.head(self.line(x.flatten(2)).mean(-1))


def counted(model: nn.Module, run: Any) -> dict[str, float]:
    """Multiply-adds of every module in one call, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    flops = counter.get_flop_counts()
    root = type(model).__name__
    return {name.removeprefix(f"{root}."): sum(parts.values()) / 2 for name, parts in flops.items()}


def test_convolutions_multiply_once_for_each_place_and_call():
    model = Convolutions()
    x = torch.randn(6, 3, 12, 10)
    layers = find_layers(model)
    macs = multiply_adds(
        model, Classification(), [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))], layers
    )
    expected = counted(model, lambda: model(x))
    assert set(macs) == {"first", "grouped", "line", "head"}
    assert macs == {name: expected[name] / 6 for name in macs}


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_counted_per_token_without_padding(tied):
    model = tiny.llama(tied=tied)
    layers = find_layers(model)
    ids = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(0))
    whole = multiply_adds(model, CausalLM(), [{"input_ids": ids}], layers)
    expected = counted(model, lambda: model(input_ids=ids, use_cache=False))
    head = "model.embed_tokens" if tied else "lm_head"
    assert whole[head] == expected["lm_head"] / 30 == 256 * 32
    for name in layers:
        if "layers" in name:
            assert whole[name] == expected[name] / 30
    if not tied:
        assert whole["model.embed_tokens"] == 0, "a look-up multiplies nothing"
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    assert (
        multiply_adds(model, CausalLM(), [{"input_ids": ids, "attention_mask": mask}], layers)
        == whole
    )


@pytest.mark.filterwarnings("ignore:.*belong to no Linear")
def test_experts_multiply_the_tokens_that_the_router_sends_them():
    model = mixtral(experts=3)  # of which each token visits two
    layers = find_layers(model)
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        macs = multiply_adds(model, CausalLM(), [batch], layers)
        for name, layer in layers.items():
            if layer.kind == "experts":
                assert macs[name] == pytest.approx(2 / 3 * layer.numel)


def test_zeros_lower_the_work_only_where_hardware_skips_them():
    assert macs_left(cp.Prune(pattern="2:4")) == 0.5
    assert (
        macs_left(cp.PruneQuantize(prune=cp.Prune(pattern="2:4"), quantize=cp.Quantize(bits=4)))
        == 0.5
    )
    for option in (
        cp.Prune(sparsity=0.9),
        cp.Prune(pattern="1:8"),
        cp.Quantize(bits=2),
        cp.Cast(dtype="float16"),
    ):
        assert macs_left(option) == 1.0


def test_the_limits_of_a_budget_in_closed_form():
    work = {
        "a": LayerWork(weights=10, bits=32, macs=100.0),
        "b": LayerWork(weights=30, bits=16, macs=7.0),
    }
    keys = (
        "keep",
        "float16",
        "int4-g64-sym",
        "prune2:4+int3-pc-sym",
        "prune0.5",
        "prune2:4+float16",
    )
    rows = table(list(work), [(key, number + 3, 0.0) for number, key in enumerate(keys)])
    own = cp.Limit(name="ms", most=2.0, use={(row.layer, row.option): 1.0 for row in rows})
    bits, macs, bops, last = limits_of(
        Budget(max_bits=4, max_macs=150, max_bops=1e4, limits=[own]), rows, work
    )
    plan = {"a": "float16", "b": "int4-g64-sym"}
    assert [limit.name for limit in (bits, macs, bops, last)] == [
        "max_bits",
        "max_macs",
        "max_bops",
        "ms",
    ]
    assert bits.used(plan) == 8 * (4 + 5) / 40
    assert macs.used(plan) == 107 and bops.used(plan) == 100 * 16 * 32 + 7 * 4 * 16
    assert bops.used({"a": "prune2:4+float16", "b": "keep"}) == 50 * 16 * 32 + 7 * 16 * 16
    plan = {"a": "prune2:4+int3-pc-sym", "b": "keep"}
    assert macs.used(plan) == 57 and bops.used(plan) == 50 * 3 * 32 + 7 * 16 * 16
    assert macs.used({"a": "prune0.5", "b": "prune0.5"}) == 107 and last.used(plan) == 2


def test_work_that_is_not_known_is_an_error():
    row = Choice(layer="a", option="keep", bytes=1, price=0.0)
    with pytest.raises(ValueError, match=r"layer 'a': its size is not known.*curvprune\.price"):
        limits_of(Budget(max_bits=4), [row], {})
    work = work_of(find_layers(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="not counted"):
        limits_of(Budget(max_macs=4), [Choice(layer="0", option="keep", bytes=1, price=0.0)], work)
