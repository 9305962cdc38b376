"""Rounding of ResNet-20 on Fashion-MNIST, weights of all convolutions and of the last layer, one
scale per channel.

    python benchmarks/vision.py
    BREVITAS_PYTHON=/path/to/python python benchmarks/vision.py   # ours and brevitas's

Beside curvprune: rounding to nearest with the smallest scale that clips nothing, and with the scale
of least squared error. If ``BREVITAS_PYTHON`` is an interpreter with brevitas and safetensors
installed, also brevitas's scales of least squared error alone, with GPTQ and with Qronos (both in
order of activations), each as it is, with its correction of biases and with its correction of
BatchNorm's statistics on the calibration images; and torchao's two ways to find scales, if it is
installed there. ``DRAWS`` calibration draws (3; ``PEER_DRAWS`` for brevitas) of 400 images that did
not train the model; accuracy on 6,000 others. The model is the one that ``pruning.py`` trains into
``.cache/pruning`` (minutes). Prints a Markdown table of the accuracy lost, in points, with the
range over the draws.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.curvature import ResNet20, fashion_mnist, normalise

WIDTHS = (4, 3, 2)
STEPS = 900  # of the model's training


def to_nearest(net: nn.Module, bits: int, *, searched: bool) -> nn.Module:
    import curvprune as cp
    from curvprune.compression import code_range, solve
    from curvprune.model import find_layers

    net = copy.deepcopy(net)
    for layer in find_layers(net).values():
        weight = layer.as_matrix(layer.weight.detach())
        if searched:
            layer.write_(solve(weight, [cp.Quantize(bits=bits)], layer=layer.name)[0].weight)
            continue
        low, high = code_range(bits)
        top, bottom = (
            weight.amax(1, keepdim=True).clamp_min(0),
            weight.amin(1, keepdim=True).clamp_max(0),
        )
        scale = torch.maximum(top / high, bottom / low)
        layer.write_((weight / scale).round().clamp(low, high) * scale)
    return net


def judges() -> tuple[Tensor, Tensor]:
    """Images that neither trained nor calibrated the model, and their labels."""
    from benchmarks.pruning import TEST, never_drawn

    (x, y), (test_x, test_y), fresh = (
        fashion_mnist("train"),
        fashion_mnist("t10k"),
        never_drawn(ResNet20, steps=STEPS),
    )
    return normalise(torch.cat([test_x[-TEST:], x[fresh]])), torch.cat([test_y[-TEST:], y[fresh]])


@torch.no_grad()
def hits(net: nn.Module, test: tuple[Tensor, Tensor]) -> Tensor:
    """Whether each image is told right, as 0 or 1."""
    parts = zip(*(part.split(500) for part in test), strict=True)
    return torch.cat([net(x).argmax(1) == y for x, y in parts]).double()


def losses(net: nn.Module, test: tuple[Tensor, Tensor], right: Tensor) -> tuple[float, float]:
    """Points of accuracy lost, and their standard error; ``right`` are the `hits` of the model
    before."""
    difference = 100 * (right - hits(net, test))
    return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5


@torch.no_grad()
def torchao(net: nn.Module, bits: int) -> dict[str, nn.Module]:
    """torchao rounds Linear layers only, so a convolution is handed over as the Linear layer of the
    same matrix."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    found = {}
    for scales in ("affine", "hqq_scale_only"):
        found[f"torchao, {scales}"] = rounded = copy.deepcopy(net)
        for module in rounded.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                linear = nn.Sequential(
                    nn.Linear(module.weight[0].numel(), len(module.weight), bias=False)
                )
                linear[0].weight.copy_(module.weight.flatten(1))
                dtype = getattr(torch, f"int{bits}")
                quantize_(
                    linear,
                    IntxWeightOnlyConfig(
                        dtype, granularity=PerAxis(0), intx_choose_qparams_algorithm=scales
                    ),
                )
                module.weight.copy_(linear[0].weight.dequantize().view_as(module.weight))
    return found


@torch.no_grad()
def theirs(folder: Path, bits: int) -> dict[str, list[tuple[float, float]]]:
    """Method → `losses` for each calibration draw, by brevitas, and by torchao, which uses none."""
    import brevitas.nn as qnn
    from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
    from brevitas.graph.calibrate import bias_correction_mode, norm_correction_mode
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.qronos import Qronos
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    given = torch.load(folder / "given.pt", weights_only=True)
    net = ResNet20().eval()
    net.load_state_dict(given["net"])
    scales = Int8WeightPerChannelFloatMSE.let(
        bit_width=bits, narrow_range=False, scaling_impl=ParameterFromStatsFromParameterScaling
    )
    arguments = {
        "weight_quant": scales,
        "input_quant": None,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    kinds = {nn.Conv2d: (qnn.QuantConv2d, arguments), nn.Linear: (qnn.QuantLinear, arguments)}
    modes: dict[str, tuple[Callable[..., Any], dict[str, Any]] | None] = {
        "least squares": None,
        "GPTQ": (gptq_mode, {}),
        "Qronos": (gpfq_mode, {"algorithm_impl": Qronos}),
    }

    def lost(other: nn.Module) -> tuple[float, float]:
        return losses(other, given["test"], given["right"])

    found = (
        {}
        if find_spec("torchao") is None
        else {k: [lost(n)] for k, n in torchao(net, bits).items()}
    )
    for images in given["calibrate"]:
        for name, mode in modes.items():
            quantized = preprocess_for_quantize(
                copy.deepcopy(net), equalize_iters=0, merge_bn=False
            )
            quantized = layerwise_quantize(quantized, compute_layer_map=kinds).eval()
            quantized(images[:1])  # sets the scales
            if mode is not None:
                with mode[0](quantized, act_order=True, **mode[1]) as algorithm:
                    for _ in range(algorithm.num_layers):
                        for part in images.split(100):
                            algorithm.model(part)
                        algorithm.update()
            # What the second shifts the third finds in BatchNorm's means: it is as if the second
            # had not been.
            for label, correct in (
                ("", None),
                (" + biases", bias_correction_mode),
                (" + BatchNorm", norm_correction_mode),
            ):
                if correct is not None:
                    with correct(quantized):
                        for part in images.split(100):
                            quantized(part)
                found.setdefault(f"brevitas, {name}{label}", []).append(lost(quantized))
    return found


def peer(folder: Path, bits: int) -> dict[str, list[tuple[float, float]]]:
    command = [os.environ["BREVITAS_PYTHON"], __file__, "theirs", str(folder), str(bits)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"brevitas at {bits} bits failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(bits: int, found: dict[str, list[tuple[float, float]]]) -> None:
    for name, draws in found.items():
        lost, errors = zip(*draws, strict=True)
        spread = f" ({min(lost):.2f} to {max(lost):.2f})" if len(lost) > 1 else ""
        print(
            f"| {bits} | {name} | {statistics.mean(lost):.2f}{spread} | "
            f"{statistics.mean(errors):.2f} |",
            flush=True,
        )


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["theirs"]:
        print(json.dumps(theirs(Path(sys.argv[2]), int(sys.argv[3]))))
        return
    import curvprune as cp
    from benchmarks.pruning import splits, trained

    draws = int(os.environ.get("DRAWS", "3"))
    net, test = trained("resnet20", ResNet20, steps=STEPS, rate=0.1), judges()
    right = hits(net, test)
    peer_draws = int(os.environ.get("PEER_DRAWS", str(draws)))
    items = [splits(draw).calibrate.items for draw in range(draws)]
    print(
        f"ResNet-20, {float(right.mean()):.2%} of {len(right):,} images told right; {draws} draws "
        "(range)\n"
    )
    print("| bits | method | points lost | ± |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        images = [torch.cat([image for image, _ in part]) for part in items[:peer_draws]]
        given = {"net": net.state_dict(), "calibrate": images, "test": test, "right": right}
        torch.save(given, Path(folder) / "given.pt")
        for bits in WIDTHS:
            found = {
                f"to nearest, {how}": [
                    losses(to_nearest(net, bits, searched=how == "least squares"), test, right)
                ]
                for how in ("nothing clipped", "least squares")
            }
            rounded = (
                cp.quantize(net, list(part), bits=bits, objective="classification")
                for part in items
            )
            found["curvprune"] = [losses(result.model, test, right) for result in rounded]
            show(bits, found)
            if "BREVITAS_PYTHON" in os.environ:
                show(bits, peer(Path(folder), bits))


if __name__ == "__main__":
    main()
