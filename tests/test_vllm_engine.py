"""vLLM as a judge; it is run where ``CURVPRUNE_VLLM_PYTHON`` names a Python that has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import curvprune as cp
from curvprune.targets import vllm_engine

HERE = bool(os.environ.get(vllm_engine.VARIABLE))


def test_a_missing_engine_says_what_to_set(tmp_path: Path) -> None:
    if vllm_engine.interpreter() is None:
        with pytest.raises(ValueError, match="set CURVPRUNE_VLLM_PYTHON to the Python of"):
            vllm_engine.check_installed()


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="CURVPRUNE_VLLM_PYTHON names no interpreter with vLLM")
def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(3, 256, (1, 24))} for _ in range(4)]
    data = [item | {"labels": item["input_ids"]} for item in data]
    settings = cp.Settings(target="vllm")
    result = cp.quantize(model, data, group_size=32, symmetric=False, settings=settings)
    result.save(tmp_path / "model")
    with vllm_engine.running(tmp_path / "model", length=24, threads=1) as engine:
        assert engine.vocabulary == 256 and engine.version.startswith("vllm 0.")
        for length in (24, 2, 1):
            tokens = data[0]["input_ids"][:, :length]
            found = torch.from_numpy(engine.logits(tokens[0].tolist()))
            with torch.no_grad():
                wanted = result.model(input_ids=tokens).logits[0]
            # bfloat16, whose steps are .4 % of logits of up to 5, after two blocks.
            torch.testing.assert_close(found, wanted, atol=0.15, rtol=0)
        with pytest.raises(ValueError, match=r"25 tokens, .* opened for 24"):
            engine.logits([5] * 25)
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(ValueError, match="vLLM"),
        vllm_engine.running(tmp_path / "empty", length=8, threads=1),
    ):
        pass
