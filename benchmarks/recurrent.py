"""Rounding of a character LSTM, beside rounding to nearest.

    python benchmarks/recurrent.py

Two levels of 256 units on the text of ``pydoc_data.topics`` (in every Python), trained here for
``STEPS`` steps (500; minutes on a CPU). Its LSTM and its output
layer are rounded at 4, 3 and 2 bits in groups of 64, calibrated on 64 passages of 128 characters;
measured on 128 passages of topics that were in neither. Prints a Markdown table: loss added, in
nats per character.
"""

from __future__ import annotations

import copy
import os
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvprune as cp

STEPS = int(os.environ.get("STEPS", "500"))
LENGTH, UNITS, GROUP = 128, 256, 64
Items = list[tuple[Tensor, Tensor]]


class Characters(nn.Module):
    """The next character from those before."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(alphabet, 64)
        self.lstm = nn.LSTM(64, UNITS, 2, batch_first=True)
        self.head = nn.Linear(UNITS, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0]).transpose(1, 2)


def passages(text: Tensor, count: int, seed: int) -> Items:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - LENGTH - 1, (count,), generator=generator)
    parts = [text[start : start + LENGTH + 1] for start in starts]
    return [(part[None, :-1], part[None, 1:]) for part in parts]


def trained(text: Tensor, alphabet: int) -> Characters:
    torch.manual_seed(0)
    model = Characters(alphabet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS)
    for step in range(STEPS):
        x, y = together(passages(text, 32, step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def together(items: Items) -> tuple[Tensor, Tensor]:
    x, y = zip(*items, strict=True)
    return torch.cat(x), torch.cat(y)


@torch.no_grad()
def loss(model: nn.Module, items: Items) -> float:
    x, y = together(items)
    return float(F.cross_entropy(model(x), y))


@torch.no_grad()
def to_nearest(model: nn.Module, bits: int) -> nn.Module:
    """The largest weight of a group on the last code, nothing clipped."""
    model = copy.deepcopy(model)
    weights = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    for weight in weights:
        groups = weight.unflatten(1, (-1, GROUP))
        step = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
        codes = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        weight.copy_((codes * step).flatten(1))
    return model


def main() -> None:
    # 1. Topics for training and for measuring.
    names = sorted(topics)
    held = "".join(topics[name] for name in names[::10])
    rest = "".join(topics[name] for i, name in enumerate(names) if i % 10)
    alphabet = sorted(set(held + rest))
    index = {character: i for i, character in enumerate(alphabet)}
    learned, unseen = (torch.tensor([index[c] for c in part]) for part in (rest, held))
    # 2. The model, and what its loss is.
    model = trained(learned, len(alphabet))
    calibrate, test = passages(learned, 64, -1), passages(unseen, 128, -2)
    before = loss(model, test)
    weights = sum(p.numel() for p in model.lstm.parameters())
    share = weights / sum(p.numel() for p in model.parameters())
    print(f"{before:.4f} nats per character; {share:.0%} of the parameters are the LSTM's\n")
    # 3. Both ways, at every width.
    print("| bits | to nearest | curvprune |\n|---|---|---|")
    for bits in (4, 3, 2):
        result = cp.quantize(
            model,
            calibrate,
            bits=bits,
            group_size=GROUP,
            layers=["lstm.*", "head"],
            loss=cp.Segmentation(),
        )
        nearest = loss(to_nearest(model, bits), test) - before
        print(f"| {bits} | {nearest:.4f} | {loss(result.model, test) - before:.4f} |", flush=True)


if __name__ == "__main__":
    main()
