"""What users pass: batches of every form, padding, empty choices, models whose items are not
independent, metrics that return no numbers, layers that nothing uses."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import curvprune as cp
from curvprune.model import Classification, as_split, collate, evaluate, itemize
from curvprune.run import sources
from tests.networks import seeded, vectors
from tests.tiny import byte_tokenizer


def classifier():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double())


class Named(nn.Module):
    """Takes its input by name, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, x):
        return self.net(x)


X = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3
BUDGET = cp.Budget("loss", max_drop=0.1)
VERBS = {
    "quantize": lambda model, data: cp.quantize(model, data, bits=4),
    "price": lambda model, data: cp.price(model, data, options=[cp.Quantize(bits=4)]),
    "analyze": lambda model, data: cp.analyze(model, data, quantities=["trace"]),
    "hessian": lambda model, data: cp.hessian(model, data) @ torch.ones(43, dtype=torch.float64),
    "certify": lambda model, data: cp.certify(model, model, data, BUDGET),
}

# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((X, Y, torch.ones(20)), r"a tuple of 3 \(Tensor, Tensor, Tensor\).*sample_weight"),
        (({"x": X}, Y, torch.ones(20)), r"a tuple of 3 \(dict, Tensor, Tensor\).*sample_weight"),
        (({"x": X, "labels": Y}, Y), "the dict has labels too"),
        ("text", "a str; expected"),
        (None, "a NoneType; expected"),
    ],
    ids=[
        "pair and weights",
        "dict, targets and weights",
        "targets twice",
        "text",
        "none",
    ],
)
def test_batches_that_would_lose_a_part_are_refused(verb, batch, told):
    with pytest.raises(ValueError, match=told):
        VERBS[verb](classifier(), [batch])


@pytest.mark.parametrize("make", [tuple, list])
def test_a_dict_with_its_targets_is_a_dict_with_labels(make):
    pair, whole = [make(({"x": X}, Y))], [{"x": X, "labels": Y}]
    for one, other in zip(itemize(pair), itemize(whole), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    ours, theirs = (cp.hessian(Named(), data).to_dense() for data in (pair, whole))
    assert torch.equal(ours, theirs)
    ours, theirs = (cp.analyze(Named(), data).layers for data in (pair, whole))
    assert all(ours[name].trace == theirs[name].trace for name in theirs)


def test_nothing_to_look_at_is_refused():
    for build in (cp.hessian, cp.gauss_newton, cp.fisher, cp.empirical_fisher):
        with pytest.raises(ValueError, match=r"parameters is empty: expected names or globs"):
            build(classifier(), vectors(), parameters=[])
    with pytest.raises(ValueError, match=r"layers is empty: expected names or globs"):
        cp.analyze(classifier(), vectors(), layers=[])


# ------------------------------------------------------------------------------- dependent items


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "hessian"])
def test_batch_statistics_are_named(verb):
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"layer 1: BatchNorm1d has no running statistics"):
        VERBS[verb](model, [(X, Y)])


@pytest.mark.parametrize("returned", [None, "much", [None] * 20, {"f1": 1.0}, 1j * torch.ones(20)])
def test_metrics_that_return_no_numbers_are_named(returned):
    def score(output, batch):
        return returned

    for metric in (score, cp.Metric(of=score, name="score")):
        with pytest.raises(ValueError, match=r"metric 'score' returned a .*one real number per"):
            cp.certify(classifier(), classifier(), [(X, Y)], BUDGET, metric=metric, batch_size=20)


@pytest.mark.parametrize("curvature", ["fisher", "diagonal", "kfac", "hessian"])
def test_prices_of_layers_off_the_way_to_the_loss_are_refused_by_name(curvature):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = classifier(), nn.Linear(4, 4).double()

        def forward(self, x):
            self.aside(x)
            return self.net(x)

    with pytest.raises(ValueError, match="layer aside: the loss of the price items"):
        cp.price(
            seeded(Aside),
            [(X, Y)],
            options=[cp.Quantize(bits=4)],
            layers="aside",
            curvature=curvature,
        )


# ----------------------------------------------------------------------------------------- padding

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "Llama": {**SMALL, "intermediate_size": 16},
    "Qwen2": {**SMALL, "intermediate_size": 16, "num_key_value_heads": 2},
    "GPT2": {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "Roberta": {**SMALL, "intermediate_size": 16, "max_position_embeddings": 48},
    "Bert": {**SMALL, "intermediate_size": 16, "max_position_embeddings": 48},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [0, 3, 31])
def test_items_have_the_same_loss_alone_and_padded(family, pad):
    special = {"pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 4}
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **special)
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    model = seeded(lambda: kind(config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(0)
    items = []
    for i, length in enumerate((5, 9, 3, 7)):
        ids = torch.randint(4, 31, (1, length), generator=generator)
        labels = torch.tensor([i % 4])
        items.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    # One as a tokenizer that pads on the left gives it.
    if family in ("Llama", "Qwen2"):
        ids = torch.tensor([[pad, pad, 9, 8, 7]])
        mask = torch.tensor([[0, 0, 1, 1, 1]])
        items.append({"input_ids": ids, "labels": torch.tensor([1]), "attention_mask": mask})
    together = evaluate(model, [collate(items)], Classification())
    alone = evaluate(model, items, Classification())
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-4, atol=1e-5)


def test_a_padding_token_that_is_none_is_named():
    config = transformers.LlamaConfig(**FAMILIES["Llama"], num_labels=4, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.config.pad_token_id = -1
    items = []
    for length in (3, 5):
        ids = torch.ones(1, length, dtype=torch.long)
        items.append({"input_ids": ids, "labels": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"config\.pad_token_id is -1, no token"):
        evaluate(model, as_split(items).batches(2), Classification())


# ------------------------------------------------------------------------------- first tokens

COUNTS = {"calibrate": 2, "price": 2, "select": 2, "certify": 2}


def texts():
    return {f"text {i}": [10 * i + j % 7 for j in range(200)] for i in range(8)}


def test_windows_start_with_the_token_that_the_model_was_trained_with():
    plain = sources.text_splits(texts(), length=50, counts=COUNTS, seed=0)
    begun = sources.text_splits(texts(), length=50, counts=COUNTS, seed=0, first=99)
    for purpose in COUNTS:
        for item in getattr(begun, purpose).items:
            assert item["input_ids"].shape == item["attention_mask"].shape == (1, 50)
            assert item["input_ids"][0, 0] == 99 and not bool(
                (item["input_ids"][0, 1:] == 99).any()
            )
    assert not any(bool((item["input_ids"] == 99).any()) for item in plain.calibrate.items)


def test_the_first_token_is_the_one_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    assert sources.first_token(tokenizer) is None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert sources.first_token(tokenizer) is None  # known, but not put before a text
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    assert sources.first_token(tokenizer) == begin
    assert sources.first_token(None) is None


@pytest.mark.parametrize("allocate", [False, True])
def test_uniform_without_structured_is_refused(allocate):
    with pytest.raises(ValueError, match="uniform goes with structured"):
        cp.prune(classifier(), [(X, Y)], sparsity=0.5, uniform=True, allocate=allocate)


def test_frozen_layers_are_counted_and_named():
    model = classifier()
    frozen = cp.analyze(model, [(X, Y)], quantities=["trace"])
    assert not frozen.notes
    model[0].requires_grad_(False)
    found = cp.analyze(model, [(X, Y)], quantities=["trace"])
    assert found.layers["0"].trace == frozen.layers["0"].trace
    assert [note for note in found.notes if "1 of 2 layers are frozen" in note and ": 0" in note]
