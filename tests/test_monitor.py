"""The monitor of a training: sharpness against dense matrices, the rate at which gradient descent
diverges, and a user's model that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import curvprune as cp
from curvprune.model import Classification
from tests.dense_curvature import dense
from tests.networks import mlp, seeded


def digits(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0.5).long()


def train(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rate: float) -> float:
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad
    return float(loss)


def test_sharpness_follows_the_dense_matrix_through_a_training() -> None:
    model, batch = mlp(), digits()
    model.eval()
    names = [n for n, _ in model.named_parameters()]
    monitor = cp.CurvatureMonitor(model, batch, loss="classification", every=20, trace_every=40)
    for step in range(101):
        seen = monitor.step(step, learning_rate=0.2)
        assert (seen is None) == (step % 20 != 0)
        if seen is not None:
            matrix = dense(model, [batch], Classification(), "hessian", names).detach()
            top = float(torch.linalg.eigvalsh(matrix)[-1])
            assert seen.converged and seen.lambda_max == pytest.approx(top, rel=0.01)
            assert seen.max_learning_rate == pytest.approx(2 / top, rel=0.01)
            assert (seen.trace is not None) == (step % 40 == 0)
            if seen.trace is not None:
                assert abs(seen.trace.value - float(matrix.trace())) < 4 * seen.trace.stderr
        train(model, batch, 0.2)
    assert [look.step for look in monitor.looks] == [0, 20, 40, 60, 80, 100]
    # It starts from what it found the last time.
    assert max(look.num_products for look in monitor.looks[1:]) <= 8
    assert "6 looks, 0 above" in monitor.summary and monitor.cost > 0


@pytest.mark.parametrize(("share", "diverges"), [(0.99, False), (1.01, True)])
def test_gradient_descent_diverges_at_the_rate_that_it_says(share: float, diverges: bool) -> None:
    """At a minimum of a linear softmax model the loss is nearly quadratic: along the top direction
    a step multiplies the distance by ``1 − rate · λ``."""
    model, (x, y) = seeded(lambda: nn.Linear(4, 3).double()), digits(96)
    y = torch.where(torch.rand(96, generator=torch.Generator().manual_seed(1)) < 0.3, 0, y)
    for _ in range(3000):
        train(model, (x, y), 1.0)
    monitor = cp.CurvatureMonitor(model, (x, y), loss="classification")
    seen = monitor.look(0, learning_rate=10.0)
    assert seen.above_edge and "above the edge of stability" in seen.text
    operator = cp.hessian(model, [(x, y)], objective="classification")
    v = torch.linalg.eigh(operator.to_dense())[1][:, -1]
    home = [p.detach().clone() for p in model.parameters()]
    parts = operator.space.split(1e-6 * v)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += parts[name]
    for _ in range(300):
        train(model, (x, y), share * seen.max_learning_rate)
    moved = zip(model.parameters(), home, strict=True)
    distance = sum(float((p.detach() - q).square().sum()) for p, q in moved) ** 0.5
    assert (distance > 1e-5) == diverges and (distance < 1e-7) != diverges


def test_the_model_is_left_as_it_was() -> None:
    model, batch = mlp(), digits()
    model.train()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    seen = cp.CurvatureMonitor(model, batch, loss="classification").look(0)
    assert seen.trace is not None
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "0.weight")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    # Frozen parameters are not trained: they have no sharpness.
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    matrix = dense(model, [batch], Classification(), "hessian", names).detach()
    assert seen.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=0.01)


def test_a_diverged_model_is_reported_and_not_a_crash() -> None:
    model, batch = mlp(), digits()
    monitor = cp.CurvatureMonitor(model, batch, loss="classification")
    monitor.look(0)
    with torch.no_grad():
        model[0].weight.mul_(float("nan"))
    seen = monitor.look(1, learning_rate=0.1)
    assert seen.lambda_max != seen.lambda_max and not seen.converged and not seen.above_edge
    with pytest.raises(ValueError, match="every=0"):
        cp.CurvatureMonitor(model, batch, loss="classification", every=0)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad"):
        monitor.look(2)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_trainer_logs_what_it_sees(tmp_path, capsys) -> None:
    x, y = digits()
    rows = [{"x": a.float(), "labels": b} for a, b in zip(x, y, strict=True)]
    model = seeded(WithLoss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=50.0,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    probe = {"x": x.float(), "labels": y}
    monitor = cp.CurvatureMonitor(model, probe, loss="classification", every=2)
    monitor.attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "curvature/lambda_max" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert [entry["curvature/lambda_max"] for entry in logged] == [
        look.lambda_max for look in monitor.looks
    ]
    assert logged[0]["curvature/learning_rate"] == 50.0
    assert logged[0]["curvature/above_edge"] == 1.0 and "curvature/trace" in logged[0]
    assert any("curvature/cost" in entry for entry in trainer.state.log_history)
    assert "CurvatureMonitor: 3 looks" in capsys.readouterr().out
