"""Cuts that no tracer shows: layouts written out by hand are the ground truth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import curvprune as cp
from curvprune.compression import visit_layers
from curvprune.model import Classification, find_layers
from curvprune.structured import (
    Consumer,
    find_cuts,
    removal_order,
    remove_,
    silence_,
    steadied,
)
from tests.test_experts import mixtral


class Fused(nn.Module):
    """Queries, keys and values in one projection, head by head; gate and up in another, in halves;
    a scale for every head that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.size, self.inner = 4, 3, 10
        self.qkv = nn.Linear(8, 36)
        self.out = nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.gate_up = nn.Linear(8, 20, bias=False)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        items, tokens, _ = x.shape
        heads = self.qkv(x).view(items, tokens, self.num_heads, 3 * self.size)
        q, k, v = heads.transpose(1, 2).split(self.size, -1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v * self.scale[:, None, None]
        x = x + self.out(mixed.transpose(1, 2).reshape(items, tokens, -1))
        gate, up = self.gate_up(nn.functional.layer_norm(x, (8,))).chunk(2, -1)
        x = x + self.down(nn.functional.silu(gate) * up)
        return self.head(x.mean(1))


def fused() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Fused().eval()
        data = [(torch.randn(8, 6, 8), torch.randint(0, 5, (8,))) for _ in range(2)]
    return model, data


def test_fused_projections_are_cut_where_their_layout_says():
    model, data = fused()
    cuts = find_cuts(model, Classification(), data[0], kinds=("mlp", "heads")).cuts
    by_reader = {next(iter(cut.readers)): cut for cut in cuts.values()}
    assert by_reader["out"].units == 4 and by_reader["down"].units == 10
    # Gate i is row i, up i is row 10 + i; a head has its 9 rows one after another.
    gone = {cuts_name(cuts, "out"): [1], cuts_name(cuts, "down"): [0, 7]}
    smaller = copy.deepcopy(model)
    remove_(smaller, cuts, gone)
    left = [r for r in range(36) if r // 9 != 1]
    assert torch.equal(smaller.qkv.weight, model.qkv.weight[left])
    rows = [i for i in range(20) if i % 10 not in (0, 7)]
    assert torch.equal(smaller.gate_up.weight, model.gate_up.weight[rows])
    assert torch.equal(smaller.scale, model.scale[[0, 2, 3]])
    assert smaller.num_heads == 3
    silenced = copy.deepcopy(model)
    silence_(find_layers(silenced), cuts, gone)
    torch.testing.assert_close(smaller(data[1][0]), silenced(data[1][0]))


def cuts_name(cuts, reader: str) -> str:
    return next(name for name, cut in cuts.items() if reader in cut.readers)


def test_stacked_experts_lose_the_same_inner_units():
    model = mixtral(inner=16)
    data = [{"input_ids": torch.randint(0, 20, (6, 8), generator=torch.manual_seed(1))}]
    result = cp.prune(model, data, structured={"mlp": 0.5}, uniform=True)
    (cut,) = [name for name in result.cuts if "experts" in name]
    assert result.cuts[cut] == (8, 16)
    before = dict(model.named_parameters())
    for name, after in result.model.named_parameters():
        if name.endswith("gate_up_proj"):
            whole = before[name]
            # Which units stay is seen in expert 0; all experts have the same, gate and up alike.
            kept = [(whole[0, :16] == row).all(1).nonzero().item() for row in after[0, :8]]
            assert torch.equal(after, whole[:, [*kept, *(16 + i for i in kept)]])
        if name.endswith("down_proj"):
            assert after.shape[2] == 8
    result.model(data[0]["input_ids"])


def test_heads_that_share_a_bias_have_one_width():
    """The first block's bias serves all: other widths in the next could not run."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=30)).eval()
        tokens = torch.randint(1, 30, (8, 6))
    data = [{"input_ids": tokens, "decoder_input_ids": tokens, "labels": tokens}]
    result = cp.prune(model, data, structured={"heads": 0.5}, widths=4, labels=1)
    result.model(**data[0])
    for stack in (result.model.encoder, result.model.decoder):
        widths = [m.n_heads for m in stack.modules() if hasattr(m, "n_heads")]
        attentions = len(stack.block[0].layer) - 1
        for kind in range(attentions):
            assert len(set(widths[kind::attentions])) == 1


def test_a_singular_moment_is_damped_tenfold_until_it_has_a_factor():
    # Eigenvalues −1 and 5: λ must exceed 1, and the mean of the diagonal is 2.
    A = torch.tensor([[2.0, 3.0], [3.0, 2.0]], dtype=torch.float64)
    steady, note = steadied(A, 2, 0.01, name="layer")
    assert torch.linalg.eigvalsh(steady + 0.01 * 2 * torch.eye(2)).min() > 0
    assert "layer layer" in note and "damping 1" in note
    same, none = steadied(torch.eye(2, dtype=torch.float64), 2, 0.01, name="layer")
    assert torch.equal(same, torch.eye(2, dtype=torch.float64)) and none is None
    with pytest.raises(ValueError, match="layer layer"):
        steadied(A * float("nan"), 2, 0.01, name="layer")


def test_units_that_are_never_active_go_first():
    A = torch.diag(torch.tensor([1e-8, 0.0, 1.0, 0.0], dtype=torch.float64))
    consumer = Consumer(
        weight=torch.ones(2, 4, dtype=torch.float64),
        second=A,
        columns=torch.arange(4)[:, None],
        rows=torch.ones(2, dtype=torch.float64),
        name="layer",
    )
    assert set(removal_order([consumer], until=2)) == {1, 3}


def test_a_model_that_keeps_tensors_of_a_graph_is_copied():
    model, data = fused()
    model.last = model.head.weight * 2
    result = cp.prune(model, data, structured={"mlp": 0.5}, widths=3, labels=1)
    assert result.model.down.in_features < 10
    assert model.last.grad_fn is not None


@pytest.mark.slow
def test_many_places_of_a_convolution_are_sampled_and_a_note_says_so():
    """The moment of white noise is the identity, from all places or from some."""
    conv = nn.Conv2d(1, 4, (1024, 1))
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(4 * 9000, 2)).eval()
    x = torch.randn(6, 1, 10023, 1, generator=torch.Generator().manual_seed(0))
    seen = {}

    def visit(layer, moments) -> None:
        seen[layer.name] = moments()

    layers = {"0": find_layers(model)["0"]}
    data = (x, torch.zeros(6, dtype=torch.long))
    visit_layers(model, Classification(), data, layers, visit)
    (note,) = seen["0"].notes
    assert int(note.split(" of 54000 places")[0].split()[-1]) == pytest.approx(8 * 1024, rel=0.1)
    A = seen["0"].second[0]
    assert (A.diagonal() - 1).abs().mean() < 0.05


class Two(nn.Module):
    """An MLP that the outputs depend on, and one whose gradient is zero: behind a scale of zero, or
    because it only says which of two answers is taken."""

    def __init__(self, *, chooses: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.more, self.less = nn.Linear(8, 16), nn.Linear(16, 8)
        self.zero = nn.Parameter(torch.zeros(8))
        self.heads, self.chooses = nn.ModuleList(nn.Linear(8, 3) for _ in range(2)), chooses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x + self.down(self.up(x).relu())
        other = self.less(self.more(x).relu())
        if not self.chooses:
            return self.heads[0](mixed + self.zero * other)
        total = other.sum(-1, keepdim=True)
        first = (total > 0).float() + 0 * total  # in the graph, with a gradient of zero
        return first * self.heads[0](mixed) + (1 - first) * self.heads[1](mixed)


@pytest.mark.parametrize("chooses", [False, True])
def test_units_that_no_gradient_comes_to_are_free_only_where_the_outputs_do_without(chooses):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Two(chooses=chooses).eval()
        x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))

    result = cp.prune(model, [(x, y)], structured=0.2, kinds=["mlp"], loss="classification")

    left = {name: counts for name, counts in result.cuts.items() if counts[1] == 16}
    with torch.no_grad():
        gap = float((result.model(x) - model(x)).abs().max())
    if chooses:
        # It may decide, whatever its gradient: all of its units are there.
        assert all(counts[0] == 16 for counts in left.values())
        assert any("received no gradient" in note for note in result.notes)
    else:
        # A fifth of the work is in it, so nothing else is taken.
        assert [before for after, before in left.values() if after < before] == [16]
        assert gap < 1e-6 and result.predicted.value == 0
        assert any("their units go for free" in note for note in result.notes)
