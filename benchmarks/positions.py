"""How many places of a convolution its second moment must see.

    python benchmarks/positions.py

One convolution of a kernel 64 × 1 is rounded to 4 bits by a sweep (GPTQ) with the moments of all
places and of some; the error of its outputs is measured on places that none of them saw.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import curvprune as cp

CHANNELS, KERNEL, ITEMS, LENGTH = 8, 64, 64, 1000


def signals(seed: int, items: int) -> Tensor:
    """Smooth noise, channels mixed: neighbouring places are alike, as in recordings."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(items, CHANNELS, LENGTH + 40, generator=g)
    x = x.unfold(2, 8, 1).mean(-1)[..., :LENGTH]
    mix = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(9))
    return torch.einsum("oc,ncl->nol", mix, x + 0.1 * torch.randn(x.shape, generator=g))[..., None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 32, (KERNEL, 1))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    unseen = signals(2, 32)
    data = signals(1, ITEMS)
    inputs = CHANNELS * KERNEL
    everything = ITEMS * (LENGTH - KERNEL + 1)
    # Shorter signals hold fewer places, evenly spread over the items.
    for per_input in (4, 8, everything // inputs):
        length = KERNEL - 1 + max(1, per_input * inputs // ITEMS)
        batch = data[:, :, :length]
        start = time.perf_counter()
        labels = torch.zeros(ITEMS, dtype=torch.long)
        rounded = cp.quantize(model, [(batch, labels)], bits=4, layers=["conv"]).model
        seconds = time.perf_counter() - start
        with torch.no_grad():
            error = (rounded.conv(unseen) - model.conv(unseen)).square().mean()
        print(f"{per_input:4d} places an input: error {float(error):.4e}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
