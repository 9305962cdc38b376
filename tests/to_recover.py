"""Models and data that are small enough to compress, train and run again in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import curvprune as cp

PORTABLE_NOT = cp.Settings(portable=False)
NARROW = cp.PruneCast(prune=cp.Prune(sparsity=0.5), cast=cp.Cast(dtype="bfloat16"))


def tokens(items: int = 48, *, seed: int = 0, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences that the tiny Llama itself finds likely enough to differ from noise: short cycles
    of few tokens."""
    g = torch.Generator().manual_seed(seed)
    cycles = torch.randint(0, 256, (items, 4), generator=g)
    return [{"input_ids": cycles.repeat(1, length // 4)[i : i + 8]} for i in range(0, items, 8)]


class Net(nn.Module):
    """A convolution, BatchNorm, dropout and a classifier: everything that training mode would
    change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.running_mean.uniform_(-0.5, 0.5)
    return net.eval()


def images(n: int = 64, *, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 1, 4, 4, generator=g), torch.randint(0, 5, (n,), generator=g))]


def weights(folder: Path) -> dict[str, bytes]:
    """The weights of a run's model."""
    return {file.name: file.read_bytes() for file in (folder / "model").glob("*.safetensors")}


def files(folder: Path) -> dict[str, bytes]:
    """What a run has decided and made."""
    names = [folder / "plan.json", folder / "verdict.json", *sorted((folder / "model").rglob("*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in names}


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written, in nanoseconds."""
    written = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in written}
