"""The process in which llama.cpp runs; see `curvprune.targets.llama_cpp`. It imports nothing of
curvprune.

Arguments: library, model file, file for logits, tokens of a context, threads. Says one line of JSON
when the model is there, and one for each line that it is asked.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

ROOM = 4096  # bytes for a record that is passed by value; llama.cpp's have about 200
ERROR = 4  # of ggml_log_level
AGREE = 0.25  # nats by which a token's log-probability may depend on how many follow it
CHECKED = 16  # tokens on which that is seen


class Record(ctypes.Structure):
    """A record whose first numbers are known."""

    _fields_ = [("words", ctypes.c_uint32 * (ROOM // 4))]


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Failed(Exception):
    """What llama.cpp could not do."""


class Llama:
    """A model file with a context of so many tokens."""

    def __init__(self, library: str, path: str, length: int, threads: int) -> None:
        self.functions = ctypes.CDLL(library)
        self.length, self.said = length, ""
        # 1. What it logs is kept: the last error is the reason of a failure.
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.log = kind(self._logged)
        self.call("llama_log_set", None, self.log, None)
        self.call("llama_backend_init", None)
        # 2. The model.
        self.model = self.call(
            "llama_model_load_from_file",
            ctypes.c_void_p,
            path.encode(),
            self.call("llama_model_default_params", Record),
        )
        if not self.model:
            raise Failed(self.said or "the file cannot be read")
        model = ctypes.c_void_p(self.model)
        vocabulary = self.call("llama_model_get_vocab", ctypes.c_void_p, model)
        self.vocabulary = self.call(
            "llama_vocab_n_tokens", ctypes.c_int32, ctypes.c_void_p(vocabulary)
        )
        # 3. A context in which a whole sequence is one batch.
        told = self.call("llama_context_default_params", Record)
        told.words[0] = told.words[1] = told.words[2] = length
        found = self.call("llama_init_from_model", ctypes.c_void_p, model, told)
        if not found:
            raise Failed(self.said or "no context")
        self.context = ctypes.c_void_p(found)
        for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch"):
            if self.call(name, ctypes.c_uint32, self.context) < length:
                raise Failed(f"this version of llama.cpp lays its records out otherwise ({name})")
        one = ctypes.c_int32(threads)
        self.call("llama_set_n_threads", None, self.context, one, one)
        self.batch = self.call(
            "llama_batch_init", Batch, ctypes.c_int32(length), ctypes.c_int32(0), ctypes.c_int32(1)
        )
        self.memory = ctypes.c_void_p(self.call("llama_get_memory", ctypes.c_void_p, self.context))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self.functions, name)
        function.restype = result
        return function(*arguments)

    def _logged(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            self.said = " ".join(text.decode(errors="replace").split())

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of every position, in memory of llama.cpp's own."""
        self.call("llama_memory_clear", None, self.memory, ctypes.c_bool(True))
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        status = self.call("llama_decode", ctypes.c_int32, self.context, batch)
        if status != 0:
            raise Failed(self.said or f"llama_decode returned {status}")
        first = self.call("llama_get_logits", ctypes.POINTER(ctypes.c_float), self.context)
        if not first:
            raise Failed("no logits")
        return np.ctypeslib.as_array(first, shape=(len(tokens), self.vocabulary))

    def check(self, tokens: list[int]) -> None:
        """See that rows are those of positions: a sequence's beginning, alone, has the same."""
        some = tokens[:CHECKED]
        whole = np.array(self.logits(some), dtype=np.float64)
        for end in {1, max(1, len(some) // 2)}:
            alone = np.array(self.logits(some[:end]), dtype=np.float64)[-1]
            if np.abs(_normalised(alone) - _normalised(whole[end - 1])).max() > _allowed(alone):
                raise Failed("its rows of logits are not those of the positions asked for")


def _normalised(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _allowed(logits: np.ndarray) -> float:
    """Another number of tokens runs through other kernels, which round activations otherwise."""
    return AGREE + 0.1 * float(logits.std())


def main() -> None:
    library, path, shared, length, threads = sys.argv[1:]
    try:
        llama = Llama(library, path, int(length), int(threads))
    except Failed as error:
        _say({"error": str(error)})
        return
    shape = (int(length), llama.vocabulary)
    rows = np.memmap(shared, dtype=np.float32, mode="w+", shape=shape)
    _say({"vocabulary": llama.vocabulary})
    checked = False
    for line in sys.stdin:
        tokens = json.loads(line)["tokens"]
        try:
            if not checked:
                llama.check(tokens)
                checked = True
            rows[: len(tokens)] = llama.logits(tokens)
            rows.flush()
            _say({"rows": len(tokens)})
        except Failed as error:
            _say({"error": str(error)})


def _say(answer: dict[str, int | str]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
