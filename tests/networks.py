"""Networks of a few dozen weights and their data, for whoever checks curvature against dense
matrices."""

from __future__ import annotations

import torch
from torch import nn


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def mlp(activation=nn.Tanh):
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            activation(),
            nn.Dropout(0.5),
            nn.Linear(5, 4),
            activation(),
            nn.Linear(4, 3),
        ).double()
    )


def convnet(activation=nn.ReLU):
    def build():
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, groups=1, bias=False),
            nn.BatchNorm2d(4),
            activation(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).double()
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.weight, 0.5, 2.0)
        return net

    return seeded(build)


def vectors(n=7, classes=3, shape=(4,)):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (n,), generator=generator)
    y[2] = -100  # ignored
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def together(batches):
    """The same items as one batch."""
    first = batches[0]
    if isinstance(first, tuple):
        return [tuple(torch.cat(column) for column in zip(*batches, strict=True))]
    whole = {}
    for key in first:
        whole[key] = torch.cat([batch[key] for batch in batches])
    return [whole]
