"""What curvprune can do with architectures that nobody of this project chose.

    python benchmarks/zoo.py --one llama                        # one, here and now
    python benchmarks/zoo.py --only 'gpt2|llama|bert|vit|t5'    # those whose whole name fits
    python benchmarks/zoo.py                                    # all of transformers: an hour
    python benchmarks/zoo.py --table                            # of what was run before

transformers' auto mappings say what there is; ``tiny_models.py`` makes small models with random
weights of it, and those that run once are counted. Every operation then has a process of its own,
under a time limit, and is

* *ok*;
* *refused*: a ValueError that curvprune itself raises, a sentence for the user;
* *crash*: any other exception, or a process that died or took too long.

What was not done as asked stands in notes, which are kept; an operation without a note is held to
what it was asked for (``zoo_operations.py``), and what fails that is a *SilentError*, a crash. One
JSON line a model is appended to ``--out``; a run that was stopped goes on with the models that are
not there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# Before torch is there: every process has one thread, and nothing comes from the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).parent.parent))
import curvprune as cp
from benchmarks.tiny_models import build
from benchmarks.zoo_operations import OPERATIONS, Patient, said

CATEGORIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-cls": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio-cls": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "seq-cls": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
# What a failure means: the first whose expression is found in its message.
CAUSES = {
    "A1 the forward pass never reaches a layer": "never reached",
    "A2 a layer is not on the way to the loss": "on the way to the loss|does not require grad",
    "A3 a layer's inputs are all zero": "received no inputs",
    "B1 a layer that is called in its own way": "index_add_|no attribute '(detach|requires_grad)'",
    "B2 rows of another number than items": "batch2 tensor",
    "C1 a weight that is not a parameter": "not a parameter",
    "D1 the entries of a batch differ in items": "different numbers of items",
    "D2 the loss cannot be told": "cannot tell what its loss is|do not match logits|needs logits",
    "E1 torch-pruning cannot trace the model": "torch-pruning cannot trace",
    "D3 an output without logits": r"expected a tensor or an output with \.logits",
    "D4 no input embeddings": "get_input_embeddings",
    "E2 too little can be removed": "at most .* can be removed",
    "E3 there are no units to remove": "no prunable",
    "E4 the model cannot be copied": "deepcopy protocol",
    "F1 weights overflow": "overflow",
    "F2 a second moment is singular": "second moment",
    "S1 read back with other outputs": "outputs differ",
    "S2 a silent error": "SilentError",
    "T1 too slow for the limit": "over the limit",
}
BUILD_LIMIT, LIMIT = 120, float(os.environ.get("ZOO_LIMIT", "75"))  # seconds


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an operation."""

    status: str  # ok, refused or crash
    message: str = ""
    where: str = ""  # the last line of curvprune that was reached
    seconds: float = 0.0
    found: dict[str, object] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        for cause, expression in CAUSES.items():
            if re.search(expression, self.message):
                return cause
        plain = re.sub(r"'[^']*'|\w+(\.\w+)+|\d+", "…", self.message)
        return f"?? {plain[:110]} ({self.where or 'outside'})"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One class of model, and what became of it."""

    category: str
    arch: str
    cls: str
    error: str = ""  # why it could not be built
    inputs: str = ""
    sees: bool = False  # the data are images, and the outputs change with the pixels
    parameters: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.category}/{self.arch}"

    @property
    def has_failed(self) -> bool:
        return any(outcome.status != "ok" for outcome in self.outcomes.values())


# --------------------------------------------------------------------------------------- processes


def failure(error: BaseException) -> Outcome:
    """Refused if curvprune itself raised it for the user, else a crash, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    home = str(Path(cp.__file__).parent)
    ours = [frame for frame in frames if frame.filename.startswith(home)]
    raised_here = bool(ours) and ours[-1] is frames[-1]
    refused = raised_here and isinstance(error, (ValueError, NotImplementedError))
    where = "/".join([*Path(ours[-1].filename).parts[-2:], str(ours[-1].lineno)]) if ours else ""
    return Outcome(status="refused" if refused else "crash", message=said(error), where=where)


def attempt(work: Callable[[], dict[str, object]], limit: float = LIMIT) -> Outcome:
    """``work()`` in a forked process, so that nothing it breaks reaches the next operation."""
    # 1. The process, which ends here whatever happens.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        start = time.perf_counter()
        try:
            try:
                outcome = Outcome(status="ok", found=quietly(work))
            except BaseException as error:
                outcome = failure(error)
            outcome = replace(outcome, seconds=round(time.perf_counter() - start, 1))
            os.write(write, json.dumps(asdict(outcome), default=str).encode())
        finally:
            os._exit(0)
    # 2. What it says before the limit.
    os.close(write)
    text, end = b"", time.monotonic() + limit
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            text += part
        else:
            os.kill(pid, signal.SIGKILL)
            text = json.dumps({"status": "crash", "message": "over the limit"}).encode()
    _, code = os.waitpid(pid, 0)
    return Outcome(**json.loads(text)) if text else Outcome(status="crash", message=f"died: {code}")


def quietly(work: Callable[[], object]) -> object:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return work()


def examine(entry: Entry, operations: list[str]) -> Entry:
    """Build one model, then run every operation on it."""
    # 1. The model, in this process: the operations are forked from it.
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(BUILD_LIMIT)
    try:
        cls = getattr(transformers, entry.cls)
        tiny = quietly(lambda: build(entry.category, entry.arch, cls))
    except Exception as error:
        return replace(entry, error=str(error) or said(error))
    finally:
        signal.alarm(0)
    gc.freeze()  # or collections in forked processes would copy its memory
    # 2. The operations, which hand files on to each other.
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        patient = Patient(entry.category, tiny.model, tiny.make, tiny.items, Path(folder))
        for name in operations:
            # Without a rounded model there is nothing to read back.
            if name == "read back" and not (patient.folder / "expected.pt").is_file():
                continue
            outcomes[name] = attempt(lambda name=name: OPERATIONS[name](patient))
    count = sum(p.numel() for p in tiny.model.parameters())
    told = {"inputs": tiny.inputs, "sees": tiny.sees, "parameters": count}
    return replace(entry, **told, outcomes=outcomes)


def too_slow(*_: object) -> None:
    raise TimeoutError("building took too long")


def warm_up(operations: list[str]) -> None:
    """Import once what the operations import on the way, or every process would do it again. A
    forked process finds out: one that has run a backward pass must not fork."""

    def imported() -> dict[str, object]:
        before = set(sys.modules)
        examine(Entry(category="causal-lm", arch="llama", cls="LlamaForCausalLM"), [])
        tiny = build("causal-lm", "llama", transformers.LlamaForCausalLM)
        with tempfile.TemporaryDirectory() as folder:
            patient = Patient("causal-lm", tiny.model, tiny.make, tiny.items, Path(folder))
            for name in operations:
                OPERATIONS[name](patient)
        return {"modules": [name for name in sys.modules if name not in before]}

    for name in attempt(imported, 300).found.get("modules", []):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_all(entries: list[Entry], operations: list[str], out: Path, workers: int) -> None:
    """Every entry in a process of its own, ``workers`` at a time."""
    warm_up(operations)
    out.parent.mkdir(parents=True, exist_ok=True)
    running = 0
    for entry in entries:
        if running == workers:
            os.wait()
            running -= 1
        if os.fork() == 0:
            write(examine(entry, operations), out)
            os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()


def write(entry: Entry, out: Path) -> None:
    with out.open("a") as file:
        file.write(json.dumps(asdict(entry), default=str) + "\n")
    cells = {name: outcome.status for name, outcome in entry.outcomes.items()}
    print(f"{entry.name}: {entry.error[:200] or cells}", file=sys.stderr, flush=True)


def read(out: Path) -> list[Entry]:
    lines = out.read_text().splitlines() if out.is_file() else []
    found = []
    for line in lines:
        values = json.loads(line)
        outcomes = {name: Outcome(**told) for name, told in values["outcomes"].items()}
        found.append(Entry(**{**values, "outcomes": outcomes}))
    return found


# ------------------------------------------------------------------------------------------ tables


def tables(entries: list[Entry]) -> str:
    """Operations by category and by architecture, causes of what failed, and what was left out."""
    built = [entry for entry in entries if not entry.error]
    absent = [f"* {entry.name}: {entry.error[:160]}" for entry in entries if entry.error]
    parts = [by_category(built), by_architecture(built), causes(built), left_as_it_was(built)]
    if absent:
        parts.append("Could not be built:\n\n" + "\n".join(absent))
    return "\n\n".join(part for part in parts if part)


def row(cells: list[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def by_category(entries: list[Entry]) -> str:
    lines = [row(["category", "models", *OPERATIONS]), "|---" * (2 + len(OPERATIONS)) + "|"]
    groups: dict[str, list[Entry]] = {}
    for name in CATEGORIES:
        groups[name] = [entry for entry in entries if entry.category == name]
    groups["image-text, with images"] = [entry for entry in entries if entry.sees]
    groups["all"] = entries
    for name, mine in groups.items():
        if not mine:
            continue
        cells: list[object] = [name, len(mine)]
        for operation in OPERATIONS:
            tried = [e.outcomes[operation] for e in mine if operation in e.outcomes]
            well = sum(outcome.status == "ok" for outcome in tried)
            cells.append(f"{well}/{len(tried)}" if tried else "–")
        lines.append(row(cells))
    return "\n".join(lines)


def by_architecture(entries: list[Entry], most: int = 40) -> str:
    """Every model; of more than ``most`` those alone that failed in something."""
    if len(entries) > most:
        entries = [entry for entry in entries if entry.has_failed]
    lines = [row(["model", "inputs", *OPERATIONS]), "|---" * (2 + len(OPERATIONS)) + "|"]
    for entry in sorted(entries, key=lambda entry: entry.name):
        cells = [cell(entry.outcomes.get(name)) for name in OPERATIONS]
        lines.append(row([entry.name, entry.inputs, *cells]))
    return "\n".join(lines)


def cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "–"
    return "ok" if outcome.status == "ok" else f"{outcome.status} {outcome.cause.split()[0]}"


def causes(entries: list[Entry]) -> str:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for name, outcome in entry.outcomes.items():
            if outcome.status != "ok":
                found[outcome.cause][name].append(entry.name)
    lines = []
    for cause, models in sorted(found.items(), key=lambda pair: -max(map(len, pair[1].values()))):
        counts = ", ".join(f"{name} {len(names)}" for name, names in models.items())
        names = sorted(set().union(*models.values()))
        others = f" and {len(names) - 8} more" if len(names) > 8 else ""
        lines.append(f"* **{cause}** ({counts}): {', '.join(names[:8])}{others}")
    return "\n".join(lines)


def left_as_it_was(entries: list[Entry]) -> str:
    """Models that were rounded while much of them stayed."""
    lines = []
    for entry in entries:
        found = entry.outcomes.get("quantize", Outcome(status="")).found
        share = found.get("share of parameters", 1.0)
        if share < 0.7 or found.get("unchanged layers"):
            told = f"{len(found['unchanged layers'])} layers unchanged; {found['left over']}"
            lines.append(f"* {entry.name}: {share:.0%} of the parameters in layers; {told}")
    return "Rounded in part:\n\n" + "\n".join(lines) if lines else ""


# ---------------------------------------------------------------------------------------- the list


def listed() -> list[Entry]:
    """All classes of the auto mappings, categories in turn, so that a run that is stopped has seen
    some of each; further classes of an architecture come last."""
    places: list[tuple[bool, float, Entry]] = []
    seen: set[str] = set()
    for category, mapping in CATEGORIES.items():
        pairs = []
        for arch, names in getattr(modeling_auto, mapping).items():
            several = names if isinstance(names, (tuple, list)) else (names,)
            pairs += [(arch, name) for name in several]
        for k, (arch, cls) in enumerate(pairs):
            entry = Entry(category=category, arch=arch, cls=cls)
            places.append((arch in seen, k / len(pairs), entry))
            seen.add(arch)
    return [entry for *_, entry in sorted(places, key=lambda place: place[:2])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", metavar="ARCH", help="one architecture, its first class")
    parser.add_argument("--only", default=".*", help="expression for names of architectures")
    parser.add_argument("--category", choices=CATEGORIES, help="one category")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS))
    parser.add_argument("--out", type=Path, default=Path(".cache/zoo.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    asked = parser.parse_args()
    if unknown := [name for name in asked.operations if name not in OPERATIONS]:
        parser.error(f"unknown operation {unknown[0]!r}; operations: {', '.join(OPERATIONS)}")
    torch.set_num_threads(1)

    entries = [e for e in listed() if asked.category in (None, e.category)]
    if asked.one:
        named = [entry for entry in entries if entry.arch == asked.one]
        if not named:
            parser.error(f"--one {asked.one}: transformers has no such architecture here")
        print(tables([examine(named[0], asked.operations)]))
        return
    entries = [entry for entry in entries if re.fullmatch(asked.only, entry.arch)]
    wanted = {(entry.name, entry.cls) for entry in entries}
    if not asked.table:
        there = {(entry.name, entry.cls) for entry in read(asked.out)}
        todo = [entry for entry in entries if (entry.name, entry.cls) not in there]
        run_all(todo, asked.operations, asked.out, asked.workers)
    print(tables([e for e in read(asked.out) if (e.name, e.cls) in wanted]))


if __name__ == "__main__":
    main()
