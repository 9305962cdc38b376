"""Which loss a model has: told, or refused. A certificate without labels must not take numbers for
the logits of classes that are none."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
)

import curvprune as cp
from curvprune.model import evaluate, make_loss

BUDGET = cp.Budget("loss", max_drop=0.05)


def bert(kind: type, **config: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
            **config,
        )
    ).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(5, 40, shape, generator=torch.Generator().manual_seed(1))


def sentences() -> list[dict[str, Tensor]]:
    return [{"input_ids": row[None]} for row in tokens(40, 6)]


def emptied(model: nn.Module) -> nn.Module:
    """A copy whose Linear and convolution weights are all zero."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.zeros_(module.weight)
    return other


def refused(model: nn.Module, data: list, match: str, loss: object = "label-free") -> None:
    for verb in (
        lambda: cp.certify(model, emptied(model), data, BUDGET, loss=loss),
        lambda: cp.quantize(model, data, bits=(3, 8), budget=BUDGET, loss=loss),
    ):
        with pytest.raises(ValueError, match=match):
            verb()


# --------------------------------------------------------------- no certificate from other numbers


def test_one_output_has_no_divergence():
    model = bert(BertForSequenceClassification, num_labels=1)
    data = sentences()
    refused(model, data, r"determine no distribution.*cp\.Regression\(sigma=")
    refused(model, data, r"determine no distribution", loss="auto")
    refused(
        model, data, "one output is no distribution", cp.LabelFree(model, of=cp.Classification())
    )
    near = cp.LabelFree(model, of=cp.Regression(sigma=0.05))
    verdict = cp.certify(model, emptied(model), data, BUDGET, loss=near)
    assert verdict.status == "VIOLATED"


def test_a_multi_label_head_is_judged_label_by_label():
    model = bert(
        BertForSequenceClassification, num_labels=4, problem_type="multi_label_classification"
    )
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.classifier.bias += 3.0
    data = sentences()
    verdict = cp.certify(model, shifted, data, BUDGET, loss="label-free")
    p, q = (torch.cat([m(**x).logits for x in data]).double().sigmoid() for m in (model, shifted))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert verdict.status == "VIOLATED" and verdict.measure == "nats/label"
    assert verdict.drop == pytest.approx(float(kl.mean()), rel=1e-5)


def test_several_outputs_of_unknown_kind_are_not_guessed():
    model = bert(BertForSequenceClassification, num_labels=4)
    data = sentences()
    refused(model, data, r"neither its class nor labels.*cp\.MultiLabel\(\)")
    single = bert(
        BertForSequenceClassification, num_labels=4, problem_type="single_label_classification"
    )
    assert cp.certify(single, emptied(single), data, BUDGET, loss="label-free").status == "VIOLATED"
    named = cp.certify(model, emptied(model), data, BUDGET, loss="label-free:classification")
    assert named.status == "VIOLATED"


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    return SegformerForSemanticSegmentation(config).eval()


def test_pixels_have_their_classes_in_the_second_dimension():
    model = segformer()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decode_head.classifier.bias[0] += 100
    data = [{"pixel_values": torch.randn(1, 3, 16, 16)} for _ in range(40)]
    verdict = cp.certify(model, other, data, BUDGET, loss="label-free")
    assert verdict.status == "VIOLATED" and verdict.measure == "nats/pixel"


def test_maps_are_compared_at_the_size_of_the_labels():
    model = segformer()
    batch = {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "labels": torch.randint(0, 3, (2, 16, 16)),
    }
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decode_head.classifier.bias[0] += 1
    p, q = (
        F.interpolate(m(batch["pixel_values"]).logits, (16, 16), mode="bilinear").double()
        for m in (model, other)
    )
    kl = F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    found = evaluate(other, [batch], make_loss("label-free", model, batch))
    torch.testing.assert_close(found.loss, kl.flatten(1).sum(1).detach(), rtol=1e-4, atol=1e-6)


def test_an_untrained_head_of_transformers_is_known_by_its_class():
    """All its logits happen to lie between 0 and 1."""
    model = bert(
        BertForSequenceClassification, num_labels=4, problem_type="single_label_classification"
    )
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
        model.classifier.bias.copy_(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    data = sentences()
    assert cp.certify(model, copy.deepcopy(model), data, BUDGET, loss="label-free").drop == 0


def test_the_loss_of_pixels_is_that_of_transformers():
    model = segformer()
    labels = torch.randint(0, 3, (2, 16, 16))
    labels[0, :4] = 255
    model.config.semantic_loss_ignore_index = 255
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}
    theirs = float(model(**batch).loss)
    total, count = cp.Segmentation(ignore_index=255).loss(model, batch)
    assert float(total) / count == pytest.approx(theirs, rel=1e-5)
    assert count == int((labels != 255).sum())


class Conv(nn.Module):
    """Images → classes of pixels, or of what ``end`` makes of them."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.end = end or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.end(3 * self.conv(input))


def test_a_map_of_unknown_kind_is_not_guessed():
    model = Conv()
    images = [torch.randn(1, 1, 6, 6) for _ in range(40)]
    refused(model, [{"input": x} for x in images], r"class_axis=1")
    with pytest.raises(ValueError, match="cannot tell what its loss is"):
        make_loss("auto", model, (images[0], torch.zeros(1, 4, 6, 6)))
    labelled = [(x, torch.randint(0, 4, (1, 6, 6))) for x in images]
    assert isinstance(make_loss("auto", model, labelled[0]), cp.Segmentation)
    assert (
        cp.certify(model, emptied(model), labelled, BUDGET, loss="label-free").status == "VIOLATED"
    )


@pytest.mark.parametrize("labels", ["none", "classes"])
@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Softmax(-1)])
def test_probabilities_are_no_logits(end, labels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), end)
    x = [torch.randn(1, 6) for _ in range(40)]
    data = [{"input": row} for row in x]
    match = "a guess|probabilities"
    if labels == "classes":
        data = [(row, torch.tensor([i % 20])) for i, row in enumerate(x)]
        match = "probabilities"
        with pytest.raises(ValueError, match=match):
            cp.analyze(model, data)
    refused(model, data, match)


def test_what_ends_in_a_sigmoid_or_softmax_is_judged_by_its_probabilities():
    torch.manual_seed(0)
    data = [{"input": torch.randn(1, 6)} for _ in range(40)]
    for end, loss in (
        (nn.Sigmoid(), cp.MultiLabel(probabilities=True)),
        (nn.Softmax(-1), cp.Classification(probabilities=True)),
    ):
        model = nn.Sequential(nn.Linear(6, 20), end)
        verdict = cp.certify(
            model,
            emptied(model),
            data,
            cp.Budget("loss", max_drop=0.005),
            loss=cp.LabelFree(model, of=loss),
        )
        assert verdict.status == "VIOLATED"
    with pytest.raises(ValueError, match="each row sums to 1"):
        cp.certify(
            model, emptied(model), data, BUDGET, loss=cp.LabelFree(model, of=cp.Classification())
        )
    labelled = [(torch.cat([x["input"] for x in data]), torch.arange(40) % 20)]
    with pytest.raises(ValueError, match="each row sums to 1"):
        cp.hessian(model, labelled, loss=cp.Classification())
    with pytest.raises(ValueError, match="each row sums to 1"):
        cp.hessian(model, labelled, loss=nn.CrossEntropyLoss())
    cp.hessian(model, labelled, loss=cp.Classification(probabilities=False))
    sigmoid = nn.Sequential(nn.Linear(6, 20), nn.Sigmoid())
    yes = [(labelled[0][0], torch.ones(40, 20))]
    for loss, batches in (("classification", labelled), ("multi-label", yes)):
        with pytest.raises(ValueError, match="all lie between 0 and 1"):
            cp.hessian(sigmoid, batches, loss=loss)
        with pytest.raises(ValueError, match="all lie between 0 and 1"):
            cp.certify(sigmoid, emptied(sigmoid), batches, BUDGET, loss=loss)


class Voice(nn.Module):
    """An LSTM whose outputs are embeddings of length one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.last = nn.Linear(8, 16)

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(self.last(self.lstm(input)[0][:, -1]), dim=-1)


def test_embeddings_are_no_logits():
    model = Voice()
    x = [torch.randn(1, 5, 4) for _ in range(40)]
    refused(model, [{"input": row} for row in x], "a guess")
    refused(model, [(row, torch.tensor([0])) for row in x], "vectors of length one")


# ---------------------------------------------------------------------- told as transformers has it


def told_and_theirs(model: nn.Module, batch: dict) -> tuple[float, float]:
    loss = make_loss("auto", model, batch)
    total, count = loss.loss(model, batch)
    return float(total.detach()) / count, float(model(**batch).loss.detach())


def sentence(**labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens(3, 6), "attention_mask": torch.ones(3, 6).long(), **labels}


def ignoring(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[0, :3] = -100
    return labels


TOLD = {
    "regression": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        lambda: sentence(labels=torch.randn(3)),
    ),
    "regression of several": (
        lambda: bert(BertForSequenceClassification, num_labels=2, problem_type="regression"),
        lambda: sentence(labels=torch.randn(3, 2)),
    ),
    "one class": (
        lambda: bert(BertForSequenceClassification, num_labels=4),
        lambda: sentence(labels=torch.tensor([0, 3, 1])),
    ),
    "several labels": (
        lambda: bert(BertForSequenceClassification, num_labels=4),
        lambda: sentence(labels=torch.randint(0, 2, (3, 4)).float()),
    ),
    "tokens": (
        lambda: bert(BertForTokenClassification, num_labels=4),
        lambda: sentence(labels=ignoring(torch.randint(0, 4, (3, 6)))),
    ),
    "masked-lm": (
        lambda: bert(BertForMaskedLM),
        lambda: sentence(labels=ignoring(tokens(3, 6))),
    ),
    "question-answering": (
        lambda: bert(BertForQuestionAnswering),
        lambda: sentence(
            start_positions=torch.tensor([0, 2, 5]), end_positions=torch.tensor([3, 2, 5])
        ),
    ),
    "seq2seq": (
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=40,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        ).eval(),
        lambda: sentence(labels=ignoring(tokens(3, 6))),
    ),
}


@pytest.mark.parametrize("kind", TOLD)
def test_the_loss_told_is_transformers_own(kind):
    torch.manual_seed(0)
    model, batch = (make() for make in TOLD[kind])
    ours, theirs = told_and_theirs(model, batch)
    assert ours == pytest.approx(theirs, rel=1e-5)
    items = evaluate(model, [batch], make_loss("auto", model, batch))
    assert items.mean_loss == pytest.approx(theirs, rel=1e-5) and len(items.loss) == 3
    if "start_positions" in batch or kind == "seq2seq":
        return
    trace = cp.analyze(model, [batch], quantities=("trace",), matrix="fisher", labels=4)
    assert all(layer.trace.value >= 0 for layer in trace.layers.values())


def test_without_labels_a_decoder_counts_its_own_tokens_not_the_encoder_s():
    """Encoder and decoder are equally long, and the encoder's mask is not the decoder's."""
    model, batch = (make() for make in TOLD["seq2seq"])
    batch["attention_mask"][1, 4:] = 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
    kl = (p.exp() * (p - q)).sum(-1).detach() * (batch["labels"] != -100)
    found = evaluate(other, [batch], make_loss("label-free", model, batch))
    assert found.count.tolist() == [3, 6, 6]
    torch.testing.assert_close(found.loss, kl.sum(1), rtol=1e-4, atol=1e-6)


def test_torch_s_own_loss_modules_are_losses():
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, weight = torch.randn(5, 6).double(), torch.tensor([1.0, 3.0, 0.5]).double()
    classes, numbers = torch.randint(0, 3, (5,)), torch.randn(5, 3).double()
    yes = torch.randint(0, 2, (5, 3)).double()
    for module, y in (
        (nn.CrossEntropyLoss(), classes),
        (nn.CrossEntropyLoss(weight=weight, ignore_index=1), classes),
        (nn.MSELoss(), numbers),
        (nn.BCEWithLogitsLoss(pos_weight=weight), yes),
        (nn.PoissonNLLLoss(), yes),
        (nn.SmoothL1Loss(), numbers),
        (nn.SmoothL1Loss(reduction="sum"), numbers),
    ):
        total, count = make_loss(module, model, (x, y)).loss(model, (x, y))
        whole = module.reduction == "sum"
        ours = total if whole else total / count
        torch.testing.assert_close(ours, module(model(x), y))


# ----------------------------------------------------------------------------- losses of one's own


def regression_data() -> tuple[nn.Module, list, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    return nn.Linear(6, 3, bias=False), [(x, y)], x


class Squares(cp.Objective):
    """Summed squares, as users of the earlier interface write it."""

    name, measure = "squares", "squares/item"

    def loss_of(self, logits, batch):
        return (logits - batch[1]).square().sum(), len(logits)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_an_objective_of_one_s_own_has_its_own_curvature(matrix):
    model, data, x = regression_data()
    truth = 6 * float(x.square().sum(1).mean())
    found = cp.analyze(
        model, data, matrix=matrix, quantities=("trace",), objective=Squares(), labels=2000
    )
    trace = next(iter(found.layers.values())).trace
    assert trace.value == pytest.approx(truth, rel=1e-4 if matrix != "fisher" else 0.02)


def test_prices_of_an_objective_of_one_s_own_are_in_its_unit():
    model, data, x = regression_data()
    options = [cp.Quantize(bits=3)]
    ledger = cp.price(model, data, options=options, objective=Squares(), measure_above=None)
    row = next(r for r in ledger.rows if r.option != "keep")
    prices = x[2::3]  # every third item prices what the others solve
    solve = torch.ones(40, dtype=torch.bool)
    solve[2::3] = False
    rounded = cp.quantize(model, [(x[solve], data[0][1][solve])], bits=3, objective=Squares())
    delta = rounded.model.weight - model.weight
    exact = float((prices @ delta.T.detach()).square().sum(1).mean())
    assert row.price == pytest.approx(exact, abs=4 * row.stderr) and row.price > 0.2 * exact


def test_a_loss_of_the_model_alone_has_a_hessian_and_says_what_it_has_not():
    model, data, x = regression_data()

    def mean_square(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="none").sum(1).mean()

    loss = cp.Loss.of(mean_square)
    trace = cp.hessian(model, data, loss=loss).to_dense().trace()
    assert float(trace) == pytest.approx(6 * float(x.square().sum(1).mean()), rel=1e-4)
    found = cp.analyze(model, data, quantities=("trace",), loss=loss)
    layer = next(iter(found.layers.values()))
    assert layer.trace.value == pytest.approx(float(trace), abs=4 * layer.trace.stderr)
    assert layer.trace.stderr > 0 and layer.method != "exact"
    for call in (
        lambda: cp.gauss_newton(model, data, loss=loss).to_dense(),
        lambda: cp.fisher(model, data, loss=loss).to_dense(),
        lambda: cp.price(model, data, options=[cp.Quantize(bits=3)], loss=loss),
    ):
        with pytest.raises(ValueError, match="known as a function of the model alone"):
            call()
    ledger = cp.price(
        model,
        data,
        options=[cp.Quantize(bits=3)],
        loss=loss,
        curvature="hessian",
        measure_above=None,
    )
    row = next(r for r in ledger.rows if r.option != "keep")
    solve = torch.ones(40, dtype=torch.bool)
    solve[2::3] = False
    rounded = cp.quantize(model, [(x[solve], data[0][1][solve])], bits=3, loss=loss)
    delta = (rounded.model.weight - model.weight).detach()
    exact = float((x[2::3] @ delta.T).square().sum(1).mean())
    assert row.price == pytest.approx(exact, rel=0.02)
    empirical = cp.price(
        model, data, options=[cp.Quantize(bits=3)], loss=loss, curvature="empirical"
    )
    g = 2 * (model(x) - data[0][1]).detach()[2::3]
    along = (g * (x[2::3] @ delta.T)).sum(1)
    row = next(r for r in empirical.rows if r.option != "keep")
    assert row.price == pytest.approx(float(0.5 * along.square().mean()), rel=0.05)
    assert "empirical" in empirical.curvature


def test_a_loss_that_is_not_convex_is_not_drawn_from():
    model, data, _ = regression_data()

    def waves(outputs, batch):
        return outputs.cos().sum(1)

    loss = cp.Loss.of(waves, outputs="model")
    with pytest.raises(ValueError, match="not convex in its outputs"):
        cp.fisher(model, data, loss=loss).to_dense()
    found = cp.analyze(model, data, quantities=("trace",), loss=loss)
    z = model(data[0][0]).detach()
    truth = -float((z.cos().sum(1) * data[0][0].square().sum(1)).mean())
    trace = next(iter(found.layers.values())).trace
    assert trace.value == pytest.approx(truth, abs=4 * trace.stderr + 1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z, b: z.sum(1).max(), "neither sum nor mean"),
        (lambda z, b: z[:2].sum(1), r"returned \(2,\) for a batch of 40 items"),
        (lambda z, b: 3.0, "returned float"),
        (lambda z, b: None, "returned NoneType"),
    ],
)
def test_functions_that_are_no_losses_are_refused(function, message):
    model, data, _ = regression_data()
    with pytest.raises(ValueError, match=message):
        cp.hessian(model, data, loss=cp.Loss.of(function, outputs="model")).to_dense()


def test_one_argument_has_two_names():
    model, data, _ = regression_data()
    first = cp.hessian(model, data, loss="regression").to_dense()
    again = cp.hessian(model, data, objective="regression").to_dense()
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="two names of one argument"):
        cp.hessian(model, data, objective="regression", loss="regression")
    with pytest.raises(ValueError, match="expected auto, causal-lm, classification"):
        cp.hessian(model, data, loss="perplexity")
    with pytest.raises(ValueError, match=r"pass cp\.Loss\.of\(function, outputs='model'\)"):
        cp.hessian(model, data, loss=F.mse_loss)
    with pytest.raises(ValueError, match="of='classification': expected a loss"):
        cp.LabelFree(model, of="classification")


# ------------------------------------------------------------------------------ outputs at the edge


def test_certain_predictions_have_no_curvature_and_do_not_crash():
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(0)
        model.bias.copy_(torch.tensor([1000.0, 0, 0]))
    data = [(torch.randn(5, 4).double(), torch.zeros(5, dtype=torch.long))]
    for matrix in ("hessian", "ggn"):
        found = cp.analyze(model, data, matrix=matrix)
        layer = next(iter(found.layers.values()))
        assert layer.trace.value == 0
    mixed = [(torch.cat([data[0][0], torch.randn(3, 4).double()]), torch.zeros(8).long())]
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2.0, 0, 0]))
    assert cp.analyze(model, mixed, matrix="ggn") is not None


def test_an_output_of_minus_infinity_is_a_class_that_cannot_be():
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, input: Tensor) -> Tensor:
            z = self.linear(input)
            return torch.cat([z[:, :4], torch.full_like(z[:, 4:], -torch.inf)], 1)

    model = Masked()
    x = torch.randn(6, 4)
    loss = cp.LabelFree(model, of=cp.Classification())
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.linear.weight.mul_(0.5)
    found = evaluate(changed, [{"input": x}], loss)
    p, q = (m(x)[:, :4].double().softmax(-1) for m in (model, changed))
    torch.testing.assert_close(
        found.loss, (p * (p / q).log()).sum(1).detach(), rtol=1e-3, atol=1e-6
    )
    y = torch.randint(0, 4, (6,))
    ledger = cp.price(model, [(x, y)] * 3, options=[cp.Quantize(bits=3)], labels=8)
    assert all(row.price == row.price for row in ledger.rows)


# ------------------------------------------------------------------------------- from end to end


def with_noise(outputs: Tensor) -> Tensor:
    return outputs + 0.1 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "loss",
    [
        "regression",
        nn.MSELoss(),
        cp.Loss.of(lambda z, b: F.huber_loss(z, b[1], reduction="none").sum(1), outputs="model"),
    ],
    ids=["name", "module", "function"],
)
def test_a_regression_is_compressed_within_its_budget(loss, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(200, 8)
    data = [(x, with_noise(model(x).detach()))]
    result = cp.quantize(
        model, data, bits=(2, 4, 8), budget=cp.Budget("loss", max_drop=0.02), loss=loss
    )
    assert result.verdict.status == "CERTIFIED" and result.verdict.metric == "loss"
    assert result.plan.bytes < 32 * 11 * 2
    result.save(tmp_path)
    torch.testing.assert_close(cp.load(tmp_path, model=model)(x), result.model(x))
    accuracy = cp.Budget("accuracy", max_drop=0.1)
    for verb in (
        lambda: cp.quantize(model, data, bits=8, budget=accuracy, loss=loss),
        lambda: cp.certify(model, result.model, data, accuracy, loss=loss),
    ):
        with pytest.raises(ValueError, match="no predictions that are right or wrong"):
            verb()


def test_outputs_that_are_no_numbers_are_worse_than_the_largest_errors():
    """Squared errors of a million are finite: a plan that returns nan must not look better."""
    torch.manual_seed(0)

    class Brittle(nn.Module):
        """Only its own weight, to three digits, gives numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1, bias=False)
            self.own = self.linear.weight.detach().clone()

        def forward(self, x: Tensor) -> Tensor:
            off = (self.linear.weight - self.own).abs().max() > 1e-2
            return self.linear(x) * torch.where(off, torch.nan, 1.0)

    model = Brittle()
    x = torch.randn(64, 4)
    data = [(x, 1e4 + torch.randn(64, 1))]
    budget = cp.Budget("loss", max_drop=1e4)
    result = cp.quantize(model, data, bits=(2, 8), budget=budget, loss="regression")
    assert result.plan.choices["linear"] != "int2-pc-sym"
    assert bool(result.model(x).isfinite().all())


def test_an_absolute_error_has_no_curvature_and_says_so():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(20, 4)
    data = [(x, torch.randn(20, 2))]
    with pytest.raises(ValueError, match=r"no curvature at the model's outputs.*empirical"):
        cp.price(model, data, options=[cp.Quantize(bits=3)], loss=nn.L1Loss())
    ledger = cp.price(
        model,
        data,
        options=[cp.Quantize(bits=3)],
        loss=nn.L1Loss(),
        curvature="empirical",
        measure_above=None,
    )
    assert all(row.price > 0 for row in ledger.rows if row.option != "keep")
