"""What ``rivals.py`` asks of other libraries, in an interpreter that has them.

    python rival_plans.py modelopt|autoscheme|autoround ASKED.json FOUND.json

``ASKED.json``: the model's folder, names of layers, widths, sizes, grid, and token windows.
``FOUND.json``: CPU seconds, and of ``modelopt`` scores of units of layers, of ``autoscheme`` scores
of layers and its own plans, of ``autoround`` a file of rounded weights. nvidia-modelopt 0.47 and
auto-round 0.16 on a CPU, one thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["AR_ENABLE_AUTO_SCHEME_PARALLEL"] = "0"  # it would start processes of its own

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Asked = dict[str, Any]


def load(asked: Asked) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()


def modelopt(asked: Asked, out: Path) -> dict:
    """Scores of auto_quantize's ``gradient`` method, Σ (gradient · change of the output)², of units
    that it would give one width."""
    import modelopt.torch.quantization as mtq

    def form(bits: int) -> dict:
        size = asked["group_size"]
        weights: dict = {"num_bits": bits, "axis": 0}
        if size is not None:
            weights = {"num_bits": bits, "block_sizes": {-1: size, "type": "static"}}
        off = {"quantizer_name": "*", "enable": False}
        on = {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True}
        return {"quant_cfg": [off, on], "algorithm": "max", "effective_bits": float(bits)}

    model, ids = load(asked), torch.tensor(asked["price"])
    weights = {name: model.get_submodule(name).weight.numel() for name in asked["layers"]}
    start = time.process_time()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 8.0},
        quantization_formats=[form(bits) for bits in asked["widths"]],
        data_loader=[{"input_ids": window} for window in ids.split(1)],
        forward_step=lambda m, batch: m(**batch, labels=batch["input_ids"], use_cache=False),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=1,
        num_score_steps=len(ids),
        method="gradient",
    )
    seconds, units = time.process_time() - start, []
    for said in state["candidate_stats"].values():
        layers = list(said["module_names"])
        if not set(layers) <= set(weights):
            continue
        # Its costs are in units of 16 bits a weight; the format that changes nothing has 16.
        total, scores = sum(weights[name] for name in layers), {}
        for cost, score in zip(said["costs"], said["scores"], strict=True):
            bits = round(16 * float(cost) / total)
            if bits in asked["widths"]:
                scores[bits] = float(score)
        units.append({"layers": layers, "scores": scores})
    return {"units": units, "seconds": seconds}


class Windows(list):
    """Batches that AutoScheme takes for a loader of its own."""


def autoscheme(asked: Asked, out: Path) -> dict:
    """Scores Σ |gradient ⊙ change of the weight|, with all layers at that width, and the plans that
    AutoScheme makes of them by dynamic programming."""
    import auto_round.auto_scheme.delta_loss as delta_loss
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme

    # 1. Our windows in place of its data, and its scores kept: a width is scored once.
    ids, first = torch.tensor(asked["price"]), asked["layers"][0]
    length = ids.shape[1]
    batches = [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in ids.split(1)]
    delta_loss.get_dataloader = lambda *told, **named: Windows(batches)
    own, known = delta_loss.get_score_for_scheme, {}

    def kept(model: nn.Module, *told: object, **named: object) -> object:
        bits = model.get_submodule(first).bits
        if bits not in known:
            known[bits] = own(model, *told, **named)
        return known[bits]

    delta_loss.get_score_for_scheme = kept
    # 2. Its own plans, each for the bits that codes, scales and zero points take.
    model, names, size = load(asked), asked["layers"], asked["group_size"]
    symmetric, schemes = asked["symmetric"], []
    for bits in asked["widths"]:
        grid = {"bits": bits, "group_size": size or -1, "sym": symmetric}
        schemes.append(QuantizationScheme.from_dict({**grid, "data_type": "int", "act_bits": 16}))
    start, plans = time.process_time(), {}
    for asked_bits in asked["sizes"]:
        scales = 16 / (size or 576) + (0 if symmetric else asked_bits / (size or 576))
        scheme = AutoScheme(
            avg_bits=asked_bits + scales + 1e-4,
            options=schemes,
            nsamples=len(ids),
            seqlen=length,
            batch_size=1,
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
            device_map="cpu",
        )
        maker = GenScheme(
            scheme,
            model,
            names,
            {},
            dataset="x",
            device_map="cpu",
            tokenizer=AutoTokenizer.from_pretrained(asked["model"]),
            enable_torch_compile=False,
        )
        found = maker.get_layer_config()
        plans[f"{asked_bits:g}"] = {name: int(found[name]["bits"]) for name in names}
    seconds = time.process_time() - start
    # 3. A score is [bits, loss].
    scores = {}
    for bits, of_layers in known.items():
        scores[bits] = {name: float(of_layers[name][1]) for name in names}
    return {"scores": scores, "plans": plans, "seconds": seconds}


def autoround(asked: Asked, out: Path) -> dict:
    """Its default rounding: 200 iterations a block, here two windows at a time."""
    from auto_round import AutoRound
    from safetensors.torch import save_file

    model, ids = load(asked), torch.tensor(asked["calibrate"])
    batches = [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in ids]
    start = time.process_time()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(asked["model"]),
        bits=asked["bits"],
        group_size=asked["group_size"] or -1,
        sym=asked["symmetric"],
        iters=asked.get("iterations", 200),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=2,
        dataset=torch.utils.data.DataLoader(batches, batch_size=2),
        device_map="cpu",
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    rounded, _ = rounding.quantize()
    seconds, path = time.process_time() - start, out.with_suffix(".safetensors")
    found = {}
    for name in asked["layers"]:
        found[name] = rounded.get_submodule(name).weight.detach().float().contiguous()
    save_file(found, path)
    return {"weights": str(path), "seconds": seconds}


def main() -> None:
    side, question, answer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    sides = {"modelopt": modelopt, "autoscheme": autoscheme, "autoround": autoround}
    found = sides[side](json.loads(question.read_text()), answer)
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
