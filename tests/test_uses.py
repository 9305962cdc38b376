"""What made a model does not certify it, and what a certify split was used for is told."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune import run as runs
from curvprune.certificate import IN_THIS_PROCESS, Use, UsesInMemory
from curvprune.model import Split, as_split, collate, seen_by
from tests import tiny

LEAK = "have also made or chosen the model"


def pairs(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return [(x[i : i + 8], x[i : i + 8, :4].argmax(1)) for i in range(0, count, 8)]


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


MAKERS = {
    "quantize": lambda net, data: cp.quantize(net, data, bits=4),
    "quantize, in place": lambda net, data: cp.quantize(
        copy.deepcopy(net), data, bits=4, inplace=True
    ),
    "prune": lambda net, data: cp.prune(net, data, sparsity=0.5),
    "prune, allocated": lambda net, data: cp.prune(net, data, sparsity=0.5, allocate=True),
    "prune, structured": lambda net, data: cp.prune(net, data, structured=0.25),
    "compress": lambda net, data: cp.compress(
        net, data, options=[cp.Quantize(bits=b) for b in (4, 8)], budget=cp.Budget(max_drop=0.5)
    ),
    "recover": lambda net, data: cp.recover(
        cp.quantize(net, pairs(64, 9), bits=4), net, data, steps=1
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_items_that_made_a_model_are_told_when_they_certify_it(maker: str, net: nn.Module) -> None:
    data, fresh = pairs(128, 1), pairs(128, 2)
    model = MAKERS[maker](net, data).model
    budget = cp.Budget("loss", max_drop=5.0)
    # As other types, and in a dict: the same items.
    same = [{"inputs": x.double().float(), "targets": y.int()} for x, y in data]
    with pytest.warns(UserWarning, match=LEAK):
        verdict = cp.certify(net, model, data, budget)
    assert LEAK in verdict.note
    assert as_split(same).leak(seen_by(model)) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LEAK not in cp.certify(net, model, fresh, budget).note
    assert not seen_by(net), "the baseline has seen nothing"
    with pytest.warns(UserWarning, match=LEAK):
        verdict = cp.certify(net, copy.deepcopy(model), fresh[:-1] + data[-1:], budget)
    assert LEAK in str(verdict)


def test_what_made_a_model_is_saved_with_it(net: nn.Module, tmp_path: Path) -> None:
    data = pairs(64, 3)
    result = cp.quantize(net, data, bits=4)
    result.save(tmp_path / "net")
    loaded = cp.load(tmp_path / "net", model=copy.deepcopy(net))
    assert seen_by(loaded) == seen_by(result.model) == result.seen
    packed = cp.load(tmp_path / "net", model=copy.deepcopy(net), packed=True)
    with pytest.warns(UserWarning, match=rf"64 of the 64 items .*{LEAK}"):
        cp.certify(net, packed, data, cp.Budget("loss", max_drop=5.0))


def test_masks_do_not_hide_what_made_a_language_model() -> None:
    model = tiny.llama()
    rng = torch.Generator().manual_seed(0)
    items = [{"input_ids": torch.randint(0, 256, (1, 6 + i), generator=rng)} for i in range(8)]
    compressed = cp.quantize(model, items, bits=8, group_size=16).model
    budget = cp.Budget("loss", max_drop=5.0)
    ones = [{**item, "attention_mask": torch.ones_like(item["input_ids"])} for item in items]
    for hidden in (ones, [collate(items)], [{**i, "labels": i["input_ids"]} for i in items]):
        with pytest.warns(UserWarning, match="8 of the 8 items"):
            assert LEAK in cp.certify(model, compressed, hidden, budget).note


def test_budgets_on_one_certify_split_are_counted(net: nn.Module) -> None:
    data = pairs(128, 4)
    model = cp.quantize(net, pairs(64, 5), bits=8).model
    asked = [cp.Budget("loss", max_drop=drop) for drop in (0.5, 0.4, 0.3)]
    first, second, third = (cp.certify(net, model, data, budget) for budget in asked)
    assert first.earlier == () and "before" not in first.note
    assert second.earlier == ("loss drop of at most 0.5 at 95 % confidence",)
    assert len(third.earlier) == 2 and "used for 2 verdicts before" in third.note
    # The same again is no other look, and other items are others.
    again = cp.certify(net, model, data, asked[1], batch_size=3)
    assert (again.earlier, again.note) == (second.earlier, second.note)
    assert cp.certify(net, model, pairs(128, 6), asked[0]).earlier == ()
    # Nor does another order, another type or only a part of the items start anew.
    part = [(x.clone(), y.int()) for x, y in reversed(data[:4])]
    assert len(cp.certify(net, model, part, cp.Budget("accuracy", max_drop=0.9)).earlier) == 3
    score = cp.Metric(of=lambda out, batch: out[:, 0], name="first")
    assert len(cp.certify(net, model, data, asked[0], metric=score).earlier) == 4


def test_compress_and_certify_count_together(net: nn.Module) -> None:
    parts = [as_split(pairs(64, 10 + i), str(i)) for i in range(3)]
    certify = as_split(pairs(256, 20))
    splits = cp.Splits(calibrate=parts[0], price=parts[1], select=parts[2], certify=certify)
    options = [cp.Quantize(bits=b) for b in (4, 8)]
    first = cp.compress(net, splits, options=options, budget=cp.Budget(max_drop=0.5))
    assert first.verdict.earlier == ()
    second = cp.compress(net, splits, options=options, budget=cp.Budget(max_drop=0.2))
    assert len(second.verdict.earlier) >= 1
    again = cp.certify(net, first.model, certify, cp.Budget(max_drop=0.5))
    assert again.status == first.verdict.status and again.earlier == ()


def test_uses_know_each_other_by_their_items() -> None:
    def split(*numbers: int) -> Split:
        return as_split([{"x": torch.tensor([[float(number)]])} for number in numbers])

    uses = UsesInMemory()
    assert uses.enter(split(1, 2), Use(keys=("a",), text="A")) == ()
    assert uses.enter(split(2, 3), Use(keys=("b", "c"), text="B")) == ("A",)
    assert uses.enter(split(3, 4), Use(keys=("d",), text="D")) == ("B",)
    assert uses.enter(split(1, 2), Use(keys=("x", "c"), text="B")) == ("A",)
    assert uses.enter(split(5), Use(keys=("a",), text="A")) == ()
    assert IN_THIS_PROCESS is not uses


@pytest.mark.slow
def test_runs_beside_each_other_tell_what_the_split_was_used_for(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path)
    beside = tmp_path / "runs"
    first = runs.run(recipe, beside / "first", progress=False)
    assert first.record.verdict.earlier == ()

    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("max_drop: 0.2", "max_drop: 0.3"))
    second = runs.run(other, beside / "second", progress=False, reuse=beside / "first")
    told = ("loss drop of at most 0.2 at 95 % confidence",)
    assert second.record.verdict.earlier == told
    assert "used for 1 verdict before (loss drop of at most 0.2" in second.summary
    assert "which no earlier step touched" not in second.summary
    assert "- uses of the certify split before this verdict: 1 (loss drop" in second.summary
    written = json.loads((beside / "second" / "verdict.json").read_text())
    assert written["earlier"] == list(told)
    assert "earlier uses" in (beside / "second" / "report.html").read_text()

    # Made again, under another name or after it was interrupted, a run is the same use.
    for out in ("second", "third"):
        folder = beside / out
        (folder / "state" / "done.json").unlink(missing_ok=True)
        again = runs.run(other, folder, progress=False)
        assert again.record.verdict.earlier == told
    assert runs.run(recipe, tmp_path / "elsewhere" / "out", progress=False).record.verdict == (
        first.record.verdict
    )
