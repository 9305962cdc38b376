"""Run a function in a process that knows nothing of this one.

The processes are forked from a server that has imported what takes long to import, but not
curvprune: that is paid for once.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "jaxtyping",
        "pydantic",
        "rich.progress",
        "scipy.optimize",
        "scipy.stats",
        "compressed_tensors",
        "transformers.generation",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.models.convnext.modeling_convnext",
    ]
)
forkserver.ensure_running()  # it imports while the tests begin


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of some module returns there. Its exception is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=_CONTEXT) as pool:
        return pool.submit(function, *arguments).result()


def logits_of_saved(cases: list[tuple[str, bool]]) -> list[np.ndarray]:
    """Load artifacts, packed or not, and run each on the batch beside it, ``{folder}.batch``."""
    import curvprune as cp

    torch.set_num_threads(1)  # as here: sums split over threads differ in the last bit
    logits = []
    for folder, packed in cases:
        model = cp.load(folder, packed=packed)
        with torch.no_grad():
            logits.append(model(**load_file(f"{folder}.batch")).logits.numpy())
    return logits


def logits_by_transformers(folder: str, ids: list[list[int]]) -> np.ndarray:
    """Load an artifact with transformers alone, tokenizer included, and run it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "curvprune" not in sys.modules
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert AutoTokenizer.from_pretrained(folder) is not None
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()
