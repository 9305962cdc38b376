"""The process in which vLLM runs; see `curvprune.targets.vllm_engine`. It imports nothing of
curvprune.

Arguments: folder, file for logits, tokens of a context. Says one line of JSON when the model is
there, and one for each line that it is asked.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Beside this file lies one that is called vllm.py as well.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != HERE]

SETTINGS = {
    # The engine in this process, where its logits can be had.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """A folder in vLLM, one sequence at a time."""

    def __init__(self, folder: str, length: int) -> None:
        import vllm

        self.version: str = vllm.__version__
        self.llm = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=length + 1,
            max_num_batched_tokens=max(length + 1, 64),
            max_num_seqs=1,
            disable_log_stats=True,
        )
        self.vocabulary: int = self.llm.model_config.get_vocab_size()
        self.asked = vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False
        )
        self.seen: list[Any] = []
        self.llm.apply_model(self._listen)

    def _listen(self, model: Any) -> None:
        """Keep what the output head computes."""
        compute = model.compute_logits

        def kept(*arguments: Any, **named: Any) -> Any:
            logits = compute(*arguments, **named)
            self.seen.append(logits)
            return logits

        model.compute_logits = kept

    def logits(self, tokens: list[int]) -> Any:
        """Of every position: those of the prompt, and those that the next token is drawn from."""
        import torch

        self.seen.clear()
        self.llm.generate([{"prompt_token_ids": tokens}], self.asked, use_tqdm=False)
        # One row for the next token; the others in order.
        rows = [part.float() for part in self.seen]
        last = [part for part in rows if len(part) == 1][:1]
        before = [part for part in rows if part is not last[0]] if last else rows
        found = torch.cat([*before, *last])[:, : self.vocabulary]
        if len(found) != len(tokens):
            raise RuntimeError(f"{len(found)} rows of logits for {len(tokens)} tokens")
        return found.numpy()


def main() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    folder, shared, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # What the engine prints goes to the other stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, int | str]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        engine = Engine(folder, length)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    import numpy as np

    place = np.memmap(shared, np.float32, "w+", shape=(length, engine.vocabulary))
    say({"vocabulary": engine.vocabulary, "version": engine.version})
    for line in sys.stdin:
        try:
            found = engine.logits(json.loads(line)["tokens"])
            place[: len(found)] = found
            place.flush()
            say({"rows": len(found)})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
