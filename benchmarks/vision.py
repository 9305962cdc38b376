"""Rounding of ResNet-20 on Fashion-MNIST, weights of all convolutions and of the last layer, one scale per channel.

    python benchmarks/vision.py

Beside curvprune: rounding to nearest with the smallest scale that clips nothing, and with the scale of least squared
error. ``DRAWS`` calibration draws (3) of 400 images that did not train the model; accuracy on 6,000 others. The model
is the one that ``pruning.py`` trains into ``.cache/pruning`` (minutes). Prints a Markdown table of the accuracy lost,
in points, with the range over the draws.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import curvprune as cp
from curvprune.layers import find_layers
from curvprune.solve import solve
from curvprune.solve.grids import code_range

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.curvature import ResNet20
from benchmarks.pruning import accuracy, splits, trained

WIDTHS = (4, 3, 2)


def to_nearest(net: nn.Module, bits: int, *, searched: bool) -> nn.Module:
    net = copy.deepcopy(net)
    for layer in find_layers(net).values():
        weight = layer.as_matrix(layer.weight.detach())
        if searched:
            layer.write_(solve(weight, [cp.Quantize(bits=bits)], layer=layer.name)[0].weight)
            continue
        low, high = code_range(bits)
        top, bottom = weight.amax(1, keepdim=True).clamp_min(0), weight.amin(1, keepdim=True).clamp_max(0)
        scale = torch.maximum(top / high, bottom / low)
        layer.write_((weight / scale).round().clamp(low, high) * scale)
    return net


def main() -> None:
    draws = int(os.environ.get("DRAWS", "3"))
    net = trained("resnet20", ResNet20, steps=900, rate=0.1)
    dense = accuracy(net)
    print(f"ResNet-20, dense accuracy {100 * dense:.2f} %; points lost, mean of {draws} draws (range)\n")
    print("| bits | to nearest, nothing clipped | to nearest, least squares | curvprune |")
    print("|---|---|---|---|")
    for bits in WIDTHS:
        plain, searched = (100 * (dense - accuracy(to_nearest(net, bits, searched=s))) for s in (False, True))
        lost = []
        for draw in range(draws):
            batches = [(x, y) for x, y in splits(draw).calibrate.items]
            result = cp.quantize(net, batches, bits=bits, objective="classification")
            lost.append(100 * (dense - accuracy(result.model)))
        ours = f"{statistics.mean(lost):.2f} ({min(lost):.2f} to {max(lost):.2f})"
        print(f"| {bits} | {plain:.2f} | {searched:.2f} | {ours} |", flush=True)


if __name__ == "__main__":
    main()
