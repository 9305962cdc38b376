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

Where it was refused because of a layer that the forward pass never reaches or the loss does not
depend on, it is tried again on the other layers, as a user would do ("rest"). One JSON line a model
is appended to ``--out``; a run that was stopped goes on with the models that are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import math
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# Before torch is there: every process has one thread, and nothing comes from the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).parent.parent))
import curvprune as cp
from benchmarks.tiny_models import Inputs, build, logits_in, outputs
from curvprune.model import Layer, find_layers, left_over

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
    "T1 too slow for the limit": "over the limit",
}
OFF_THE_WAY = "never reached|on the way|leave"  # refusals that other layers do without
ITEMS = 8
TOLERANCE = 1e-4  # of the largest output, for a model that was read back
BUILD_LIMIT, LIMIT = 120, float(os.environ.get("ZOO_LIMIT", "75"))  # seconds


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an operation."""

    status: str  # ok, refused or crash
    message: str = ""
    where: str = ""  # the last line of curvprune that was reached
    seconds: float = 0.0
    found: dict[str, object] = field(default_factory=dict)
    rest: str = ""  # status on the layers that are reached, where it was tried again

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
    parameters: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.category}/{self.arch}"

    @property
    def has_failed(self) -> bool:
        return any(outcome.status != "ok" for outcome in self.outcomes.values())


@dataclass
class Patient:
    """A model to operate on, and a folder that its operations share."""

    category: str
    model: nn.Module
    make: Callable[[int], Inputs]
    folder: Path
    layers: str | list[str] = "*"

    def data(self, items: int = ITEMS) -> list[Inputs]:
        return [self.make(items)]

    def objective(self) -> str | cp.LabelFree:
        """Encoders have no loss of their own: similarities to random anchors stand in for it."""
        if self.category != "encoder":
            return "auto"
        width = outputs(self.model, self.make(1)).shape[-1]
        anchors = torch.randn(16, width, generator=torch.Generator().manual_seed(3))
        anchors = anchors / anchors.norm(dim=-1, keepdim=True)

        def similarities(output: object, _: Inputs) -> Tensor:
            found = logits_in(output).mean(1)
            return found / found.norm(dim=-1, keepdim=True) @ anchors.T / 0.05

        return cp.LabelFree(self.model, of=similarities)

    def chosen(self) -> dict[str, object]:
        return {"layers": self.layers, "objective": self.objective()}


# -------------------------------------------------------------------------------------- operations


def quantize(patient: Patient) -> dict[str, object]:
    model, data = patient.model, patient.data()
    # 1. Groups of 16, or whole rows where a layer has no such groups.
    try:
        result = cp.quantize(model, data, bits=4, group_size=16, **patient.chosen())
    except ValueError as error:
        if "group" not in str(error):
            raise
        result = cp.quantize(model, data, bits=4, **patient.chosen())
    # 2. For the operation that reads it back, which also tells that it could not be saved.
    few = patient.make(2)
    expected = outputs(result.model, few)
    torch.save(expected.detach(), patient.folder / "expected.pt")
    try:
        result.save(patient.folder / "artifact")
    except Exception as error:
        (patient.folder / "unsaved").write_text(said(error))
    # 3. What was rounded.
    before, after = find_layers(model), find_layers(result.model)
    same = [n for n in before if torch.equal(before[n].weight, after[n].weight)]
    covered = {id(layer.weight): layer.numel for layer in before.values()}
    return {
        "share of parameters": sum(covered.values()) / sum(p.numel() for p in model.parameters()),
        "left over": left_over(model),
        "outputs moved by": distance(expected, outputs(model, few)),
        "unchanged layers": same,
        "notes": list(result.plan.notes),
    }


def read_back(patient: Patient) -> dict[str, object]:
    """The saved model, by every reader that shall take it."""
    model, artifact = patient.model, patient.folder / "artifact"
    if (patient.folder / "unsaved").is_file():
        raise RuntimeError((patient.folder / "unsaved").read_text())
    expected = torch.load(patient.folder / "expected.pt", weights_only=True)
    blank = copy.deepcopy(model)
    for p in blank.parameters():
        p.data.zero_()
    readers: dict[str, Callable[[], nn.Module]] = {
        "from_pretrained": lambda: type(model).from_pretrained(str(artifact)).eval(),
        "load": lambda: cp.load(artifact),
        "load(model=)": lambda: cp.load(artifact, model=blank),
    }
    portable = (artifact / "config.json").is_file()
    names = ("from_pretrained", "load") if portable else ("load(model=)",)
    wrong, gaps = [], {}
    for name in names:
        try:
            gaps[name] = distance(outputs(readers[name](), patient.make(2)), expected)
        except Exception as error:
            wrong.append(f"{name}: {said(error)}")
            continue
        if not gaps[name] <= TOLERANCE * max(1.0, float(expected.abs().max())):
            wrong.append(f"{name}: outputs differ by {gaps[name]:.1e}")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return gaps


def prune(patient: Patient) -> dict[str, object]:
    result = cp.prune(patient.model, patient.data(), sparsity=0.5, **patient.chosen())
    large = {n: la for n, la in find_layers(result.model).items() if la.numel > 64}
    zeros = {n: float((la.weight == 0).float().mean()) for n, la in large.items()}
    return {"not half zeros": {n: share for n, share in zeros.items() if abs(share - 0.5) > 0.06}}


def remove_units(patient: Patient) -> dict[str, object]:
    # Convolutions have many inputs for a compensation to fit.
    data = patient.data(64 if patient.category == "image-cls" else ITEMS)
    result = cp.prune(patient.model, data, structured=0.2, objective=patient.objective())
    outputs(result.model, patient.make(2))
    work = result.macs[0] / max(1, result.macs[1])
    return {"work left": work, "cuts": len(result.cuts), "notes": list(result.notes)}


def hessian(patient: Patient) -> dict[str, object]:
    asked = {"quantities": ["trace", "eigenvalues"], "max_products": 8, "rtol": 0.3}
    return analyzed(patient, matrix="hessian", **asked)


def fisher(patient: Patient) -> dict[str, object]:
    return analyzed(patient, matrix="fisher", quantities=["trace"])


def analyzed(patient: Patient, **asked: object) -> dict[str, object]:
    layers = cp.analyze(patient.model, patient.data(4), **asked, **patient.chosen()).layers
    traces = {n: found.trace for n, found in layers.items()}
    bad = [n for n, t in traces.items() if t is None or not math.isfinite(t.value)]
    return {"layers": len(layers), "without a trace": bad}


def budgeted(patient: Patient) -> dict[str, object]:
    asked = {"bits": (3, 4, 8), "budget": cp.Budget("loss", max_drop=0.5)}
    result = cp.quantize(patient.model, patient.data(60), **asked, **patient.chosen())
    options = Counter(result.plan.choices.values())
    return {"verdict": result.verdict.status, "options": dict(options)}


OPERATIONS: dict[str, Callable[[Patient], dict[str, object]]] = {
    "quantize": quantize,
    "read back": read_back,
    "prune": prune,
    "structured": remove_units,
    "hessian": hessian,
    "fisher": fisher,
    "budget": budgeted,
}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else math.inf


def reached_layers(patient: Patient) -> list[str]:
    """The layers that the forward pass calls and that change its outputs: what a user must find to
    leave the others out."""
    called: set[int] = set()
    for module in patient.model.modules():
        module.register_forward_hook(lambda m, *_: called.add(id(m)))
    with torch.enable_grad():
        found = outputs(patient.model, patient.make(ITEMS)).float().flatten(0, -2)
        found.log_softmax(-1).square().sum().backward()

    def is_reached(layer: Layer) -> bool:
        grad = layer.weight.grad
        moves = grad is not None and bool(grad.any())
        return moves and any(id(m) in called for m in (layer.module, *layer.readers))

    names = [name for name, layer in find_layers(patient.model).items() if is_reached(layer)]
    patient.model.zero_grad(set_to_none=True)
    return names


# --------------------------------------------------------------------------------------- processes


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


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
        patient = Patient(entry.category, tiny.model, tiny.make, Path(folder))
        for name in operations:
            # Without a rounded model there is nothing to read back.
            if name == "read back" and not (patient.folder / "expected.pt").is_file():
                continue
            outcomes[name] = operate(patient, OPERATIONS[name])
    count = sum(p.numel() for p in tiny.model.parameters())
    return replace(entry, inputs=tiny.inputs, parameters=count, outcomes=outcomes)


def too_slow(*_: object) -> None:
    raise TimeoutError("building took too long")


def operate(patient: Patient, operation: Callable[[Patient], dict[str, object]]) -> Outcome:
    outcome = attempt(lambda: operation(patient))
    if outcome.status != "refused":
        return outcome
    if "different numbers of items" in outcome.message and patient.category == "image-text":
        # Rows of pixels are patches, not items: go on with the text behind the image alone.
        make = patient.make
        patient.make = lambda n: {"input_ids": make(n)["input_ids"][:, -9:]}
        outcome = replace(attempt(lambda: operation(patient)), rest="text alone")
    if re.search(OFF_THE_WAY, outcome.message) and operation is not remove_units:

        def on_the_rest() -> dict[str, object]:
            return operation(replace(patient, layers=reached_layers(patient)))

        outcome = replace(outcome, rest=attempt(on_the_rest).status)
    return outcome


def warm_up(operations: list[str]) -> None:
    """Import once what the operations import on the way, or every process would do it again. A
    forked process finds out: one that has run a backward pass must not fork."""

    def imported() -> dict[str, object]:
        before = set(sys.modules)
        examine(Entry(category="causal-lm", arch="llama", cls="LlamaForCausalLM"), [])
        tiny = build("causal-lm", "llama", transformers.LlamaForCausalLM)
        with tempfile.TemporaryDirectory() as folder:
            patient = Patient("causal-lm", tiny.model, tiny.make, Path(folder))
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
    there = {entry.category for entry in entries}
    for name in (*(c for c in CATEGORIES if c in there), "all"):
        mine = [entry for entry in entries if name in (entry.category, "all")]
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
    code = "ok" if outcome.status == "ok" else f"{outcome.status} {outcome.cause.split()[0]}"
    return f"{code} (rest {outcome.rest})" if outcome.rest else code


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
