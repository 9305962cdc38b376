"""Losses of folders in vLLM: a script for the interpreter that has vLLM, which needs no curvprune.

    python benchmarks/vllm_losses.py < request.json

The request says ``folders``, ``items`` (lists of token numbers) and ``dtype``. For every folder one
line comes out: the log-probability of every token but the first given those before it, item by
item, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# The engine in this process, so that one after the other can be let go.
DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_INT4_W4A8": "0",  # inputs stay floats: on CPUs with AMX they would be 8 bits
    "HF_HUB_OFFLINE": "1",
}


def losses(folder: str, items: list[list[int]], dtype: str) -> list[list[float]]:
    """The log-probabilities of every item's tokens but the first."""
    import vllm

    llm = vllm.LLM(
        model=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, items)) + 1,
        disable_log_stats=True,
    )
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": item} for item in items]
    found = []
    for item, answer in zip(items, llm.generate(prompts, asked, use_tqdm=False), strict=True):
        rows = answer.prompt_logprobs[1:]
        found.append([row[token].logprob for row, token in zip(rows, item[1:], strict=True)])
    return found


def main() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    request = json.load(sys.stdin)
    # What the engine prints goes to the other stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.distributed import cleanup_dist_env_and_memory

    for folder in request["folders"]:
        try:
            found = losses(folder, request["items"], request["dtype"])
            answer = {"folder": folder, "logprobs": found}
        except Exception as error:
            answer = {"folder": folder, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
