"""Dense curvature matrices of small models in float64 by torch.func: the truth that products and
per-layer quantities are held against."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvprune.model import CausalLM, Classification
from tests.networks import convnet, mlp, seeded, vectors


class Unused(nn.Module):
    """An MLP with a parameter that nothing uses and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.idle = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))


def small_llama(tied):
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return seeded(lambda: LlamaForCausalLM(config)).double()


def tokens():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 6, (5, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    mask[4, 2:] = 0
    full = {"input_ids": ids, "attention_mask": mask}
    return [{k: v[:2] for k, v in full.items()}, {k: v[2:] for k, v in full.items()}]


CASES = {
    "mlp": lambda: (mlp(), vectors(), Classification()),
    "conv": lambda: (convnet(), vectors(shape=(1, 6, 6)), Classification()),
    "shared": lambda: (seeded(lambda: Unused().double()), vectors(), Classification()),
    "attention": lambda: (small_llama(False), tokens(), CausalLM()),
    "tied": lambda: (small_llama(True), tokens(), CausalLM()),
}


def dense(model, batches, objective, kind, names):
    """The matrix over the named parameters by torch.func."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    free = torch.cat([parameters[n].reshape(-1) for n in names])
    sizes = [parameters[n].numel() for n in names]

    def parts(v):
        return {n: x.view_as(parameters[n]) for n, x in zip(names, v.split(sizes), strict=True)}

    def logits(v, batch):
        call = torch.func.functional_call
        if isinstance(batch, tuple):
            return call(model, parts(v), (batch[0],))
        return call(model, parts(v), (), {**batch, "use_cache": False}).logits

    model = model.eval()
    count = 0
    matrix = torch.zeros(len(free), len(free), dtype=torch.float64)
    for batch in batches:
        positions = partial(
            lambda v, batch: objective.positions(logits(v, batch), batch), batch=batch
        )
        with torch.no_grad():
            kept = positions(free)
        count += len(kept.item)

        def losses(v, positions=positions):
            found = positions(v)
            return F.cross_entropy(found.logits, found.labels, reduction="none")

        if kind == "hessian":
            matrix += torch.func.hessian(lambda v, losses=losses: losses(v).sum())(free)
        elif kind == "empirical":
            jacobian = torch.func.jacrev(losses)(free)
            by_item = torch.zeros(kept.items, len(free), dtype=torch.float64)
            by_item.index_add_(0, kept.item, jacobian)
            matrix += by_item.T @ by_item
        else:
            jacobian = torch.func.jacrev(lambda v, positions=positions: positions(v).logits)(free)
            p = kept.logits.softmax(-1)
            inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            matrix += torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian)
    return matrix / count


@cache
def reference(case, kind):
    """The dense matrix over all parameters of a case: ``hessian``, ``ggn`` or ``empirical``."""
    model, batches, objective = CASES[case]()
    if case in ("attention", "tied"):
        model.set_attn_implementation("eager")
    return dense(model, batches, objective, kind, [n for n, _ in model.named_parameters()])


def block(matrix, model, name):
    start = 0
    for n, p in model.named_parameters():
        if n == name:
            return matrix[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    raise KeyError(name)
