"""Batches of every form that loaders and processors make, and items whose rows are no items."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvprune as cp
from curvprune.model import as_batch, as_split, collate, itemize, padding_mask
from tests.networks import seeded

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
OPTIONS = [cp.Quantize(bits=3), cp.Quantize(bits=4), cp.Quantize(bits=8)]


def classifier():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


def free(model):
    return cp.LabelFree(model, of=cp.Classification())


# -------------------------------------------------------------------------------- inputs alone

ALONE = {
    "tensor": [X],
    "array": [X.numpy()],
    "tuple": [(X,)],
    "list": [[X]],
    "no targets": [(X, None)],
    "loader": DataLoader(TensorDataset(X), batch_size=8),
    "the tensor itself": X,
}
VERBS = {
    "quantize": lambda m, d: cp.quantize(m, d, bits=4).model[0].weight,
    "prune": lambda m, d: cp.prune(m, d, sparsity=0.5).model[0].weight,
    "price": lambda m, d: torch.tensor(
        [row.price for row in cp.price(m, d, options=OPTIONS, loss=free(m)).rows]
    ),
    "analyze": lambda m, d: torch.tensor(
        cp.analyze(m, d, loss=free(m), matrix="ggn", quantities=["trace"]).layers["0"].trace.value
    ),
    "ggn": lambda m, d: cp.gauss_newton(m, d, loss=free(m)).to_dense(),
    "compress": lambda m, d: torch.tensor(
        cp.quantize(
            m, d, bits=(3, 8), budget=cp.Budget("loss", max_drop=9.0), loss=free(m)
        ).verdict.drop
    ),
    "certify": lambda m, d: torch.tensor(
        cp.certify(m, other(), d, cp.Budget("loss", max_drop=9.0), loss=free(m)).drop
    ),
    "compare": lambda m, d: torch.tensor(cp.compare(m, other(), d, loss=free(m)).kl.value),
}


def other():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)))


@pytest.mark.parametrize("verb", VERBS)
def test_inputs_alone_are_as_good_as_with_targets_that_no_loss_reads(verb):
    model = classifier()
    expected = VERBS[verb](model, [(X, Y)])
    for form, data in ALONE.items():
        found = VERBS[verb](model, data)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=f"{verb}, {form}")


def test_a_loss_that_needs_targets_says_so():
    for loss in ("classification", "regression", nn.MSELoss(), nn.L1Loss()):
        with pytest.raises(ValueError, match="no labels"):
            cp.certify(classifier(), other(), [X], cp.Budget("loss", max_drop=1.0), loss=loss)


def test_tokens_alone_are_those_of_a_language_model():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    model = seeded(lambda: transformers.GPT2LMHeadModel(config)).eval()
    ids = torch.randint(0, 32, (6, 7), generator=torch.Generator().manual_seed(1))
    own = float(model(input_ids=ids, labels=ids).loss)
    for data in ([ids], [(ids,)], [{"input_ids": ids}]):
        found = cp.compare(model, model, data)
        assert found.loss_before.value == pytest.approx(own, rel=1e-5)


# --------------------------------------------------------------------------------- other forms


@dataclass
class Record:
    x: torch.Tensor
    labels: torch.Tensor


Pair = namedtuple("Pair", ["x", "target"])
Fields = namedtuple("Fields", ["x", "labels", "extra"])


@pytest.mark.parametrize(
    "given",
    [
        Record(x=X, labels=Y),
        Fields(x=X, labels=Y, extra=None),
        transformers.BatchEncoding({"x": X, "labels": Y}),
        transformers.BatchFeature({"x": X.numpy(), "labels": Y.numpy()}),
        {"x": X.tolist(), "labels": Y.tolist()},
        {"x": list(X), "labels": list(Y)},
        ({"x": X}, {"labels": Y}),
        [{"x": X, "labels": Y}],
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_behaves_like_a_dict_is_one(given):
    found = as_batch(given)
    assert type(found) is dict and sorted(found) == ["labels", "x"]
    assert torch.equal(found["x"], X) and torch.equal(found["labels"], Y)


def test_a_named_pair_is_a_pair():
    found = as_batch(Pair(x=X, target=Y))
    assert isinstance(found, tuple) and torch.equal(found[1], Y)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ((X, Y), r"a tuple of tensors of shapes \[\(24, 4\), \(24,\)\].*one batch; pass"),
        ([X, Y], r"a list of tensors of shapes.*one batch; pass"),
        ([([X, X], [{"boxes": X}])], r"a tuple of 2 \(list, list\); expected"),
        ([(X, [{"boxes": X}])], r"targets of a batch are a list of dict; expected a tensor"),
        ([(X, ["a"] * 24)], r"targets of a batch are a list of str"),
        ([({"x": X}, {"x": X})], r"the dict has x too"),
        ([(X, {"labels": Y})], r"a batch is \(tensor, dict with \['labels'\]\)"),
        ([{"x": X, "text": ["a"] * 24}], r"'text' is a list of str; expected a tensor"),
        ([{"x": [X[:1], X[:2]]}], r"'x' is a list of Tensor; expected a tensor"),
        ([torch.tensor(1.0)], r"a batch is a single number"),
        (5, r"data is a int; expected batches"),
        ("text", r"data is a str; expected batches"),
        ([{"input_ids": torch.ones(5).long()}], r"input_ids\[None\]"),
        (
            [{"input_ids": torch.ones(5, 5).long(), "attention_mask": torch.ones(5)}],
            r"attention_mask of shape \(5,\): expected \(items, tokens\)",
        ),
        (
            [{"x": torch.ones(7, 2), "edge_index": torch.ones(2, 9).long()}],
            r"different numbers of items.*cp\.Items\(items\)",
        ),
    ],
)
def test_what_is_no_batch_is_refused_in_a_sentence(data, told):
    for verb in ("quantize", "price", "analyze"):
        with pytest.raises(ValueError, match=told):
            VERBS[verb](classifier(), data)


@pytest.mark.parametrize("allocate", [False, True])
def test_an_iterator_is_read_once(allocate):
    model = classifier()

    def pruned(data):
        return cp.prune(model, data, sparsity=0.5, allocate=allocate, loss=free(model)).model[0]

    expected = pruned([X[:9], X[9:]])
    assert torch.equal(pruned(part for part in (X[:9], X[9:])).weight, expected.weight)


# --------------------------------------------------------------------------------------- masks


def test_padding_is_read_off_every_form_of_mask():
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    square = (kept[:, None, :] & torch.ones(4, 4).tril().bool()).unsqueeze(1)
    added = torch.zeros(2, 1, 4, 4).masked_fill(~square, torch.finfo(torch.float32).min)
    flat = torch.zeros(2, 4).masked_fill(~kept, -torch.inf)
    for mask in (kept, kept.long(), kept.float(), flat, square, square[:, 0], added, added.half()):
        assert padding_mask({"attention_mask": mask}).equal(kept)
    assert padding_mask({}) is None
    assert padding_mask({"attention_mask": square[1:]}) is None, "it hides nothing"
    # Rows of padding that see all, lest their softmax be empty: nothing tells them apart.
    blind = torch.ones(1, 1, 4, 4).tril().bool()
    blind[..., 0] = False
    blind[:, :, 0] = True
    with pytest.raises(ValueError, match="lets the first position see all"):
        padding_mask({"attention_mask": blind})
    with pytest.raises(ValueError, match="does not say what is padding"):
        padding_mask({"attention_mask": torch.ones(2, 1, 4, 9)})


def test_masks_of_every_form_give_the_same_loss():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = seeded(lambda: transformers.LlamaForCausalLM(config)).eval()
    items = []
    for length in (5, 8):
        ids = torch.randint(0, 32, (1, length), generator=torch.Generator().manual_seed(length))
        items.append({"input_ids": ids})
    expected = cp.compare(model, model, items).loss_before.value
    for form in ("flat", "added", "seen"):
        made = []
        for item in items:
            length = item["input_ids"].shape[1]
            causal = torch.ones(1, 1, length, length).tril().bool()
            masks = {
                "flat": torch.ones(1, length),
                "seen": causal,
                "added": torch.zeros(1, 1, length, length).masked_fill(~causal, -1e9),
            }
            made.append({**item, "attention_mask": masks[form]})
        for size in (1, 2):
            found = cp.compare(model, model, made, batch_size=size).loss_before.value
            assert found == pytest.approx(expected, rel=1e-5), (form, size)


def test_a_decoder_is_padded_by_itself():
    config = transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
    )  # fmt: skip
    model = seeded(lambda: transformers.BartForConditionalGeneration(config)).eval()
    ids = torch.arange(4, 30)[None]
    items = [
        {"input_ids": ids[:, :3], "labels": ids[:, :7]},
        {"input_ids": ids[:, 3:8], "labels": ids[:, 9:12]},
    ]
    alone = [float(model(**item).loss) * item["labels"].numel() for item in items]
    found = cp.compare(model, model, items, batch_size=2)
    assert found.positions == 10 and found.loss_before.value == pytest.approx(sum(alone) / 10)


def test_positions_in_several_axes_go_with_their_items():
    ids = torch.arange(12).view(3, 4)
    places = torch.arange(36).view(3, 3, 4)  # (axes, items, tokens)
    items = itemize([{"input_ids": ids, "position_ids": places}])
    assert [item["position_ids"].tolist() for item in items] == [
        places[:, i : i + 1].tolist() for i in range(3)
    ]
    assert torch.equal(collate(items)["position_ids"], places)


# --------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def sighted():
    """A model whose pixels have a row for every patch, and items as its processor makes them."""
    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=1)
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61,
        vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    model = seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    return model, [processed(i) for i in range(20)]


def processed(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = 2 * int(torch.randint(1, 4, (), generator=generator)), 4
    marks = [62, *[60] * (height * width // 4), 63]
    words = torch.randint(0, 50, (5 + seed % 3,), generator=generator).tolist()
    ids = torch.tensor([[*words[:2], *marks, *words[2:]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 60).long(),
        "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def test_items_whose_rows_are_patches_are_evaluated_whole(sighted):
    model, items = sighted
    sums, counts = [], []
    for item in items:
        labels = item["input_ids"].masked_fill(item["input_ids"] == 60, -100)
        counts.append(int((labels[:, 1:] != -100).sum()))
        sums.append(float(model(**item, labels=labels).loss.detach()) * counts[-1])
    for data in (cp.Items(items), items):
        found = cp.compare(model, model, data)
        assert found.positions == sum(counts) and found.items == len(items)
        assert found.loss_before.value == pytest.approx(sum(sums) / sum(counts), rel=1e-4)


def test_layers_that_see_patches_are_solved_for_all_of_them(sighted):
    model, items = copy.deepcopy(sighted[0]).double(), []
    for item in sighted[1]:
        items.append({**item, "pixel_values": item["pixel_values"].double()})
    layer = "model.visual.blocks.0.mlp.fc1"
    by_items = cp.quantize(model, cp.Items(items), bits=3, layers=f"{layer}*")
    # The same layer alone, given what it sees of every item.
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        for item in items:
            model(**item)
    hook.remove()
    alone = cp.quantize(model.get_submodule(layer), [torch.cat(seen)], bits=3)
    assert not torch.equal(alone.model.weight, model.get_submodule(layer).weight)
    torch.testing.assert_close(by_items.model.get_submodule(layer).weight, alone.model.weight)


def test_every_verb_takes_items_with_images(sighted):
    model, items = sighted
    data, layers = cp.Items(items), ["model.visual.blocks.0.*", "model.language_model.layers.0.*"]
    asked = cp.Budget("loss", max_drop=5.0)
    result = cp.quantize(model, data, bits=(3, 8), budget=asked, layers=layers)
    assert result.verdict.status in ("CERTIFIED", "VIOLATED", "INCONCLUSIVE")
    assert cp.certify(model, result.model, data, asked).items == 20
    found = cp.analyze(model, data, layers=layers, matrix="fisher", quantities=["trace"])
    assert found.layers["model.visual.blocks.0.mlp.fc1"].trace.value > 0
    pruned = cp.prune(model, data, sparsity=0.5, layers=layers).model
    assert (pruned.model.visual.blocks[0].mlp.fc1.weight == 0).float().mean() > 0.4


def test_items_are_told_apart_by_their_pixels(sighted):
    _, items = sighted
    changed = {**items[0], "pixel_values": items[0]["pixel_values"] + 1}
    split = cp.Items([items[0], changed, items[0]]).split
    assert len(set(split.clusters().tolist())) == 2
    assert split.sha256() != cp.Items([items[0]] * 3).split.sha256()


def test_documents_of_items_stay_together(sighted):
    _, items = sighted
    names = [f"page {i // 2}" for i in range(20)]
    verdict = cp.certify(
        sighted[0], sighted[0], cp.Items(items, documents=names), cp.Budget("loss", max_drop=1.0)
    )
    assert verdict.clusters == 10


def test_larger_batches_of_patches_are_refused_with_the_way_on(sighted):
    model, items = sighted
    batch = dict(collate(as_split(items).items[:2]))
    assert len(batch["input_ids"]) == 2 and len(batch["pixel_values"]) > 2
    with pytest.raises(ValueError, match=r"different numbers of items.*cp\.Items\(items\)"):
        cp.quantize(model, [batch], bits=4)


def test_items_that_do_not_go_together_are_told():
    model = seeded(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
    sides = [8, 8, 8, 6]
    items = [torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in sides]
    notes = cp.quantize(model, items, bits=4).plan.notes
    assert any("inputs of 3 of the 4 calibration items" in note for note in notes)
    assert cp.compare(model, model, items, loss=free(model)).items == 4


# --------------------------------------------------------------------------------------- graphs


class Graph(nn.Module):
    """Sums of neighbours, and a class for each graph."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, edge_index, batch=None):
        hidden = self.inner(x).relu()
        hidden = hidden.index_add(0, edge_index[1], hidden[edge_index[0]])
        batch = torch.zeros(len(x), dtype=torch.long) if batch is None else batch
        return self.outer(hidden.new_zeros(int(batch.max()) + 1, 8).index_add(0, batch, hidden))


def graphs():
    generator = torch.Generator().manual_seed(2)
    for i in range(16):
        nodes = 3 + i % 4
        yield {
            "x": torch.randn(nodes, 4, generator=generator),
            "edge_index": torch.randint(0, nodes, (2, 9), generator=generator),
            "labels": torch.tensor([i % 3]),
        }


def joined(items):
    """As graph libraries do it: numbers of nodes go on from one graph to the next."""
    sizes = [len(item["x"]) for item in items]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    edges = [item["edge_index"] + start for item, start in zip(items, starts, strict=True)]
    return {
        "x": torch.cat([item["x"] for item in items]),
        "edge_index": torch.cat(edges, 1),
        "batch": torch.repeat_interleave(torch.tensor(sizes)),
        "labels": torch.cat([item["labels"] for item in items]),
    }


def test_graphs_go_together_as_the_user_says():
    model, items = seeded(Graph), list(graphs())
    data = cp.Items(items, collate=joined)
    losses = [
        nn.functional.cross_entropy(model(i["x"], i["edge_index"]), i["labels"]) for i in items
    ]
    found = cp.compare(model, model, data, loss="classification")
    assert found.loss_before.value == pytest.approx(float(sum(losses)) / 16, rel=1e-5)
    rounded = cp.quantize(model, data, bits=4, loss="classification").model
    alone = cp.quantize(model.inner, [torch.cat([i["x"] for i in items])], bits=4).model
    torch.testing.assert_close(rounded.inner.weight, alone.weight)


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([], "there is no item"),
        (["text"], "a batch is a str"),
        ([{"input_ids": torch.ones(2, 3).long()}], r"item 0 has input_ids of shape \(2, 3\)"),
        ([(torch.ones(2, 3), torch.ones(2))], r"item 0 has inputs of shape \(2, 3\)"),
        ([{"x": torch.ones(1, 3), "size": 4}], r"entry 'size' of item 0 is a int"),
    ],
)
def test_what_is_no_item_is_named(items, told):
    with pytest.raises(ValueError, match=told):
        cp.Items(items)


def test_examples_of_a_data_set_get_a_dimension_for_items():
    (item,) = cp.Items([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 4}])
    assert {name: value.tolist() for name, value in item.items()} == {
        "input_ids": [[1, 2, 3]],
        "attention_mask": [[1, 1, 1]],
        "labels": [4],
    }


def test_a_model_that_does_not_say_where_it_looks_tokens_up_is_read_all_the_same():
    class Hashing(nn.Module):
        """Tokens of any size: a hash of each is looked up."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 3)

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(input_ids % 5).mean(1))

    batch = {"input_ids": torch.arange(64).view(16, 4), "labels": torch.arange(16) % 3}
    result = cp.quantize(Hashing(), [batch], bits=4, loss="classification")
    assert set(result.plan.choices) == {"table", "head"}
