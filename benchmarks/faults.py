"""Damage everything that curvprune reads, and see what its readers say.

    python benchmarks/faults.py                 # all, about an hour on one core
    python benchmarks/faults.py --quick         # a sample, a few minutes
    python benchmarks/faults.py --only recipes 'artifacts:packed'

Four parts. *artifacts*: saved models of five forms, each file flipped, cut, swapped, edited or
taken away, then read by every reader. *runs*: the same to the folders of a finished run and of one
that was stopped midway. *recipes*: every key of the schema with values of every kind. *machine*:
kills, interruptions, full disks, too little memory, too few open files.

A read ends in one of these ways:

same        what an undamaged read gives, to the last bit
refused     one sentence, exit code 2 or 3
SILENT      other outputs, and nothing said
TRACEBACK   an exception that nobody expected (exit code 70)
EXIT 1      the code of a verdict, without one
CRASH       the process died of a signal, or hung

Everything but the first two is listed.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import curvprune as cp
from curvprune.cli import app
from curvprune.failures import failure_of
from curvprune.run import Recipe, load_recipe

GOOD = ("same", "refused")
LIMIT_SECONDS = 120  # of one read
LONGEST = 1200  # characters of a sentence

# --------------------------------------------------------------------------------- what is damaged


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def llama(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)).eval()


def tokens(items: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(256, (items, 1, 24), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def vectors(items: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(items, 16, generator=generator)
    return [(x[i : i + 4], torch.arange(i, i + 4) % 4) for i in range(0, items, 4)]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A saved model, a second one of the same form to swap files with, and its architecture."""

    folder: Path
    other: Path
    architecture: Callable[[], nn.Module]


def make_artifacts(home: Path) -> dict[str, Artifact]:
    """One of each form that lies on disk."""

    ours = cp.Settings(portable=False)

    def quantized(seed: int, **arguments: Any) -> Any:
        return cp.quantize(llama(seed), tokens(), **arguments)

    def sparse(seed: int) -> Any:
        return cp.prune(llama(seed), tokens(), sparsity=0.5, settings=ours)

    def fewer_units(seed: int) -> Any:
        asked = cp.Structured(share=0.3, kinds=("mlp",))
        return cp.prune(llama(seed), tokens(), structured=asked)

    def small(seed: int) -> Any:
        return cp.quantize(plain(seed), vectors(), bits=4, loss="classification")

    forms: dict[str, tuple[Callable[[int], Any], Callable[[], nn.Module]]] = {
        "portable": (partial(quantized, bits=4, group_size=16, symmetric=True), llama),
        "packed": (
            partial(quantized, bits=3, group_size=16, symmetric=False, settings=ours),
            llama,
        ),
        "sparse": (sparse, llama),
        "units": (fewer_units, llama),
        "plain": (small, plain),
    }
    made = {}
    for name, (compress, architecture) in forms.items():
        for which, seed in (("a", 0), ("b", 1)):
            compress(seed).save(home / name / which)
        made[name] = Artifact(
            folder=home / name / "a", other=home / name / "b", architecture=architecture
        )
    return made


RECIPE = """\
title: Tiny
model: {{path: {model}, task: causal-lm}}
data:
  source: text
  files: [{files}]
  sequence_length: 48
  calibrate: 4
  price: 4
  select: 4
  certify: 8
compress:
  - layers: "model.layers.*"
    options:
      - quantize: {{bits: 2, group_size: 16}}
      - quantize: {{bits: 4, group_size: 16}}
      - quantize: {{bits: 8}}
budget: {{metric: loss, max_drop: 0.5}}
search: {{trials: 2, attempts: 2}}
device: cpu
seed: 0
"""


def make_recipe(home: Path) -> Path:
    llama().save_pretrained(home / "tiny")
    tokenizer().save_pretrained(home / "tiny")
    texts = []
    (home / "texts").mkdir()
    for i in range(24):
        path = home / "texts" / f"document{i}.txt"
        path.write_text(
            " ".join(f"Sentence {j} of text {i} says {i * j % 97}." for j in range(4 + i % 5))
        )
        texts.append(str(path))
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=home / "tiny", files=", ".join(texts)))
    return recipe


# ------------------------------------------------------------------------------------ the damages


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that is done to a folder."""

    name: str
    apply: Callable[[Path], None]


def damages(folder: Path, other: Path, draw: random.Random) -> Iterator[Damage]:
    """All damages to the files below a folder; ``other`` has files of the same names."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        yield from _of_bytes(name, path.stat().st_size, draw)
        yield from _of_places(name)
        if (other / name).is_file() and (other / name).read_bytes() != path.read_bytes():
            yield Damage(name=f"{name}: that of another", apply=partial(_take, name, other))
        if path.suffix == ".json":
            yield from _of_json(name, path)
        if path.suffix == ".safetensors":
            yield from _of_tensors(name, path)
    yield from _of_siblings(folder)
    yield Damage(name="an extra file", apply=lambda f: _write(f / "extra.bin", b"x"))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _of_bytes(name: str, size: int, draw: random.Random) -> Iterator[Damage]:
    # 1. Single bits, most of them anywhere and some in the first bytes, where headers lie.
    places = []
    if size:
        places = [draw.randrange(size) for _ in range(5)] + [draw.randrange(min(size, 100))]
    for place in places:
        bit = 1 << draw.randrange(8)
        yield Damage(name=f"{name}: bit flipped at {place}", apply=partial(_flip, name, place, bit))
    # 2. Cut short, and too long.
    for left in sorted({0, min(8, size), size // 2, max(0, size - 1)}):
        yield Damage(name=f"{name}: cut to {left}", apply=partial(_cut, name, left))
    yield Damage(
        name=f"{name}: a byte more",
        apply=lambda f: _write(f / name, (f / name).read_bytes() + b"x"),
    )
    yield Damage(name=f"{name}: noise", apply=lambda f: _write(f / name, os.urandom(size or 1)))


def _flip(name: str, place: int, bit: int, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[place] ^= bit
    (folder / name).write_bytes(bytes(content))


def _cut(name: str, left: int, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:left])


def _take(name: str, other: Path, folder: Path) -> None:
    shutil.copy2(other / name, folder / name)


def _of_places(name: str) -> Iterator[Damage]:
    def gone(folder: Path) -> None:
        (folder / name).unlink()

    def replaced(make: Callable[[Path], object], folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    yield Damage(name=f"{name}: missing", apply=gone)
    kinds: dict[str, Callable[[Path], object]] = {
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    }
    for kind, make in kinds.items():
        yield Damage(name=f"{name}: {kind}", apply=partial(replaced, make))


VALUES: dict[str, object] = {
    "null": None,
    "text": "maybe",
    "a number": 7,
    "a negative number": -3,
    "a huge number": 10**30,
    "a list": [],
    "a mapping": {},
    "nested": [[[[{"a": [None]}]]]],
}


def _of_json(name: str, path: Path) -> Iterator[Damage]:
    def whole(text: str, folder: Path) -> None:
        (folder / name).write_text(text)

    for text in ("null", "[]", "{}", "[" * 100_000, '{"a": 1, "a": 2}', "NaN"):
        yield Damage(name=f"{name}: holds {text[:20]}", apply=partial(whole, text))
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return
    for key in itertools.islice(_keys(content), 25):
        yield Damage(name=f"{name}: without {_dotted(key)}", apply=partial(_edit, name, key, ...))
        for kind, value in VALUES.items():
            yield Damage(
                name=f"{name}: {_dotted(key)} is {kind}", apply=partial(_edit, name, key, value)
            )


def _keys(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON value, the first entries of lists only."""
    parts: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        parts = list(content.items())
    elif isinstance(content, list):
        parts = list(enumerate(content))[:2]
    for key, value in parts:
        yield (*above, key)
        if len(above) < 3:
            yield from _keys(value, (*above, key))


def _dotted(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key))


def _edit(name: str, key: tuple[Any, ...], value: object, folder: Path) -> None:
    content = json.loads((folder / name).read_text())
    inner = content
    for part in key[:-1]:
        inner = inner[part]
    if value is ...:
        del inner[key[-1]]
    else:
        inner[key[-1]] = value
    (folder / name).write_text(json.dumps(content, indent=1))


def _of_tensors(name: str, path: Path) -> Iterator[Damage]:
    """A valid file that holds something else."""
    try:
        tensors = load_file(path)
    except Exception:
        return
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        alike[tuple(tensor.shape), tensor.dtype].append(key)
    pairs = [keys[:2] for keys in alike.values() if len(keys) > 1][:6]
    for a, b in pairs:
        yield Damage(name=f"{name}: {a} and {b} swapped", apply=partial(_swap, name, a, b))
    first, last = next(iter(tensors)), list(tensors)[-1]
    for key in {first, last}:
        yield Damage(name=f"{name}: without {key}", apply=partial(_change, name, key, "without"))
        for what in ("renamed", "doubled", "NaN", "float64", "turned", "zeros", "flat"):
            yield Damage(name=f"{name}: {key} {what}", apply=partial(_change, name, key, what))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=metadata)


def _swap(name: str, a: str, b: str, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    _rewrite(folder / name, change)


def _change(name: str, key: str, what: str, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors[key]
        if what in ("without", "renamed"):
            del tensors[key]
        if what == "renamed":
            tensors[f"{key}x"] = old
        elif what == "doubled":
            tensors[f"{key}.copy"] = old
        elif what == "NaN" and old.is_floating_point():
            tensors[key] = torch.full_like(old, float("nan"))
        elif what == "float64":
            tensors[key] = old.double()
        elif what == "turned":
            tensors[key] = old.flip(0)
        elif what == "zeros":
            tensors[key] = torch.zeros_like(old)
        elif what == "flat":
            tensors[key] = old.flatten()

    _rewrite(folder / name, change)


def _of_siblings(folder: Path) -> Iterator[Damage]:
    """Files of one kind in one folder exchanged, such as the results of two plans."""

    def exchange(a: str, b: str, inside: Path) -> None:
        held = (inside / a).read_bytes()
        shutil.copy2(inside / b, inside / a)
        (inside / b).write_bytes(held)

    groups: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            groups[path.parent, path.suffix].append(path)
    for members in groups.values():
        for one, two in itertools.islice(itertools.pairwise(members), 4):
            if one.read_bytes() != two.read_bytes():
                a, b = (p.relative_to(folder).as_posix() for p in (one, two))
                yield Damage(name=f"{a} and {b} exchanged", apply=partial(exchange, a, b))


# ------------------------------------------------------------------------------------- the readers


def in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` says, from a process of its own: damage may end it, or hold it up."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def body() -> None:
        # What libraries print is nobody's business here.
        with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
            os.dup2(void.fileno(), 2)
            sender.send(work())
        os._exit(0)

    child = context.Process(target=body)
    child.start()
    sender.close()
    try:
        said = receiver.recv() if receiver.poll(LIMIT_SECONDS) else "CRASH (hung)"
    except EOFError:
        said = "CRASH"
    if child.is_alive() and said.startswith("CRASH"):
        child.kill()
    child.join()
    return f"CRASH ({child.exitcode})" if said == "CRASH" else str(said)


def judged(error: BaseException) -> str:
    """How an exception counts."""
    failure = failure_of(error)
    one_line = "\n" not in failure.text and len(failure.text) < LONGEST
    if failure.code in (2, 3) and one_line:
        return "refused"
    return f"TRACEBACK {type(error).__name__}: {failure.text[:150]}"


def outputs(model: nn.Module) -> str:
    """Hash of what a model computes."""
    with torch.no_grad():
        if isinstance(model, nn.Sequential):
            found = [model(x) for x, _ in vectors()]
        else:
            found = [model(**batch).logits for batch in tokens()]
    return hashlib.sha256(torch.cat([y.reshape(-1) for y in found]).numpy().tobytes()).hexdigest()


def read_as(reader: str, artifact: Artifact, folder: Path) -> str:
    """Hash of the outputs of a folder, read in one of the ways."""
    needs = reader == "onto a model" or artifact.architecture is plain
    model = artifact.architecture() if needs else None
    if reader.startswith("export"):
        out = folder.parent / f"exported-{os.getpid()}"
        form = reader.split()[1]
        try:
            code = _run_app(["export", str(folder), str(out), "--format", form])
            if code:
                return f"exit {code}"
            if form == "gptq":
                return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
            return outputs(LlamaForCausalLM.from_pretrained(out).eval())
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return outputs(cp.load(folder, model=model, packed=reader == "packed").eval())


def _run_app(arguments: list[str]) -> int:
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def outcome_of_read(reader: str, artifact: Artifact, folder: Path, expected: str) -> str:
    try:
        found = read_as(reader, artifact, folder)
    except BaseException as error:
        return judged(error)
    if found == expected:
        return "same"
    codes = {"exit 2": "refused", "exit 3": "refused", "exit 1": "EXIT 1", "exit 70": "TRACEBACK"}
    return codes.get(found, "SILENT")


@dataclass
class Table:
    """How reads ended, by part."""

    rows: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bad: list[str] = field(default_factory=list)

    def add(self, part: str, what: str, outcome: str) -> None:
        kind = outcome.split(" (")[0]
        kind = "TRACEBACK" if kind.startswith("TRACEBACK") else kind
        self.rows[part][kind] += 1
        if kind not in GOOD:
            self.bad.append(f"{part}: {what}: {outcome}")
            print(self.bad[-1], flush=True)

    def show(self) -> None:
        kinds = ("same", "refused", "SILENT", "TRACEBACK", "EXIT 1", "CRASH")
        print(f"\n| part | reads | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 2)}")
        for part, counts in self.rows.items():
            cells = " | ".join(str(counts[kind]) for kind in kinds)
            print(f"| {part} | {sum(counts.values())} | {cells} |")


def damaged_artifacts(home: Path, table: Table, asked: argparse.Namespace) -> None:
    for name, artifact in make_artifacts(home / "artifacts").items():
        if not wanted(f"artifacts:{name}", asked):
            continue
        # 1. What each reader says of the undamaged folder; those that refuse it are left out.
        readers = ["load", "packed", "onto a model", "export dense", "export gptq"]
        expected = {}
        for reader in readers:
            try:
                with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
                    expected[reader] = read_as(reader, artifact, artifact.folder)
            except Exception:
                continue
        usable = {k: v for k, v in expected.items() if not v.startswith("exit")}
        # 2. Every damage, every reader.
        draw = random.Random(asked.seed)
        every = list(damages(artifact.folder, artifact.other, draw))
        for damage in sample(every, 14 if asked.quick else asked.most, draw):
            folder = home / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(artifact.folder, folder)
            damage.apply(folder)
            for reader, hashed in usable.items():
                work = partial(outcome_of_read, reader, artifact, folder, hashed)
                table.add(f"artifacts:{name}", f"{damage.name}, {reader}", in_a_child(work))


# ------------------------------------------------------------ run folders


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what a run delivers."""
    names = ("plan.json", "verdict.json", "ledger.json", "analysis.json")
    files = [*(folder / name for name in names), *sorted((folder / "model").rglob("*"))]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def ended(arguments: list[str], same: Callable[[], bool]) -> str:
    """How a command ended."""
    code = in_a_child(lambda: str(_run_app(arguments)))
    if code in ("2", "3"):
        return "refused"
    if code == "0":
        try:
            return "same" if same() else "SILENT"
        except OSError:
            return "SILENT"
    return {"1": "EXIT 1", "70": "TRACEBACK"}.get(code, code if "CRASH" in code else "CRASH")


def stopped_midway(folder: Path, copy_to: Path) -> None:
    """A run as a kill before its last stage leaves it."""
    shutil.copytree(folder, copy_to)
    shutil.rmtree(copy_to / "model")
    for name in ("state/done.json", "report.json", "report.html", "plan.json", "verdict.json"):
        (copy_to / name).unlink(missing_ok=True)


def damaged_runs(home: Path, table: Table, asked: argparse.Namespace) -> None:
    recipe = home / "recipe.yaml"
    finished = home / "finished"
    quietly(["run", str(recipe), "--out", str(finished), "--quiet"])
    expected = contents(finished)
    other_recipe = home / "other.yaml"
    other_recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    other = home / "other"
    quietly(["run", str(other_recipe), "--out", str(other), "--quiet"])
    midway = home / "midway"
    stopped_midway(finished, midway)
    for name, folder in (("finished", finished), ("midway", midway)):
        part = f"runs:{name}"
        if not wanted(part, asked):
            continue
        draw = random.Random(asked.seed)
        every = list(damages(folder, other, draw))
        for damage in sample(every, 14 if asked.quick else asked.most, draw):
            out = home / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder, out)
            damage.apply(out)
            if name == "finished":
                said = ended(["report", str(out)], lambda: True)
                table.add(part, f"{damage.name}, report", said)
            arguments = ["run", str(recipe), "--out", str(out), "--quiet"]
            said = ended(arguments, partial(lambda folder: contents(folder) == expected, out))
            table.add(part, f"{damage.name}, run", said)


def quietly(arguments: list[str]) -> None:
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        code = _run_app(arguments)
    if code not in (0, 1):
        raise SystemExit(f"{' '.join(arguments)} ended with {code}")


# ------------------------------------------------------------------------------------------ recipes

WORDS = (
    *("null", "true", "yes", "maybe", "''", "0", "-1", "7", "020", "1:30", "2:4", "1_000", "1e-3"),
    *("1.5", ".nan", ".inf", "-.inf", "1e999", "nan", "inf", "'-3'", "9" * 5000, "x" * 200_000),
    *("[]", "{}", "[1]", "[[1]]", "[null]", "{a: b}", "{a: {b: c}}", "2024-01-01", "2024-13-45"),
    *("!!int ''", "!!bool x", "!!timestamp x", "!!float x", "!!binary x", "!!set {a}", "*a"),
    *("&a [*a]", "[a, [b, [c]]]", "0x1F", "=", "<<", '"\\0"', "{1: 2}", "!!python/object:os.x y"),
)


def schema_keys(section: type[BaseModel], above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a recipe, and of the sections below."""
    for name, info in section.model_fields.items():
        yield (*above, name)
        for kind in _sections_in(info.annotation):
            listed = "tuple" in str(info.annotation)
            yield from schema_keys(kind, (*above, name, 0) if listed else (*above, name))


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)


OPTION_KEYS: tuple[tuple[Any, ...], ...] = (
    *(("quantize", key) for key in ("bits", "group_size", "symmetric")),
    *(("prune", key) for key in ("sparsity", "pattern")),
    ("cast",),
    (),
)


def recipe_with(base: dict[str, Any], key: tuple[Any, ...], word: str) -> str:
    """The base recipe with a word at a key."""
    content = copy.deepcopy(base)
    inner: Any = content
    for part, following in itertools.pairwise(key):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(inner, list):
            while len(inner) <= part:
                inner.append(copy.deepcopy(empty))
            inner = inner[part]
            continue
        if not isinstance(inner.get(part), (dict, list)):
            inner[part] = empty
        inner = inner[part]
    if isinstance(inner, list):
        while len(inner) <= key[-1]:
            inner.append({})
    inner[key[-1]] = "@@"
    return str(yaml.dump(content, width=10**9)).replace("'@@'", word)


def recipes(home: Path, table: Table, asked: argparse.Namespace) -> None:
    path = home / "fuzzed.yaml"
    base = yaml.safe_load((home / "recipe.yaml").read_text())
    keys = [*schema_keys(Recipe), ("unknown",), ("model", "unknown")]
    keys += [("compress", 0, "options", 0, *rest) for rest in OPTION_KEYS]
    cases = list(itertools.product(keys, WORDS))
    for key, word in sample(cases, 1500 if asked.quick else 10**9, random.Random(asked.seed)):
        path.write_text(recipe_with(base, key, word))
        try:
            load_recipe(path)
            said = "same"  # a recipe that is right
        except BaseException as error:
            said = judged(error)
        table.add("recipes", f"{_dotted(key)}: {word[:40]}", said)


# ------------------------------------------------------------ the machine


def stopped_and_resumed(
    home: Path, prepare: Callable[[], None], after: float | None, number: int
) -> str:
    """Start a run in a child that ``prepare`` has spoilt, perhaps send it a signal, and go on
    without: how both ended."""
    recipe, out = home / "recipe.yaml", home / "out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["run", str(recipe), "--out", str(out), "--quiet"]
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
                prepare()
                code = _run_app(arguments)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # 1. How it ended: at its end, refused, or by the signal that was sent.
    told = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
    if code not in (0, told.get(number, 3)):
        kinds = {1: "EXIT 1", 70: "TRACEBACK", 2: "EXIT 1 (2, which is bad input)"}
        return kinds.get(code, f"CRASH ({code})")
    # 2. Again, with nothing in its way.
    expected = contents(home / "finished")
    return ended(arguments, lambda: contents(out) == expected)


def limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))


def memory_left(megabytes: int) -> None:
    """No more address space than is used, and some."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_AS, used + (megabytes << 20))


def machine(home: Path, table: Table, asked: argparse.Namespace) -> None:
    if not (home / "finished").exists():
        quietly(["run", str(home / "recipe.yaml"), "--out", str(home / "finished"), "--quiet"])
    start = time.monotonic()
    quietly(["run", str(home / "recipe.yaml"), "--out", str(home / "timed"), "--quiet"])
    seconds = time.monotonic() - start
    draw, many = random.Random(asked.seed), 2 if asked.quick else 25

    def nothing() -> None:
        pass

    # 1. Ended from outside, at random moments.
    for number, name in (
        (signal.SIGKILL, "kill"),
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGTERM, "SIGTERM"),
    ):
        for _ in range(many):
            after = draw.uniform(0.05, 0.95) * seconds
            said = stopped_and_resumed(home, nothing, after, number)
            table.add(f"machine:{name}", f"after {after:.2f} s", said)
    # 2. Too little of something.
    sizes = [10_000, 40_000] if asked.quick else [100, 1_000, 3_000, 10_000, 20_000, 40_000, 80_000]
    for size in sizes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        said = stopped_and_resumed(home, partial(limit, resource.RLIMIT_FSIZE, size), None, 0)
        table.add("machine:files of at most", f"{size} bytes", said)
    for megabytes in (4, 32) if asked.quick else (0, 1, 2, 4, 8, 16, 32, 64, 128, 256):
        said = stopped_and_resumed(home, partial(memory_left, megabytes), None, 0)
        table.add("machine:memory", f"{megabytes} MB", said)
    opened = len(os.listdir("/proc/self/fd"))
    for more in (3,) if asked.quick else (1, 2, 3, 4, 6, 8):
        prepare = partial(limit, resource.RLIMIT_NOFILE, opened + more)
        table.add("machine:open files", f"{more} more", stopped_and_resumed(home, prepare, None, 0))


# --------------------------------------------------------------------------------------------- all

PARTS = {
    "artifacts": damaged_artifacts,
    "runs": damaged_runs,
    "recipes": recipes,
    "machine": machine,
}


def sample(every: list[Any], most: int, draw: random.Random) -> list[Any]:
    return every if len(every) <= most else draw.sample(every, most)


def wanted(part: str, asked: argparse.Namespace) -> bool:
    if not asked.only:
        return True
    names = (part, part.split(":")[0])
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in asked.only)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="GLOB")
    parser.add_argument("--most", type=int, default=250, help="damages of one folder")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with open(os.devnull, "w") as void, redirect_stderr(void):
            make_recipe(home)
        for name, part in PARTS.items():
            chosen = not asked.only or any(glob.split(":")[0] == name for glob in asked.only)
            if chosen:
                part(home, table, asked)
    table.show()
    sys.exit(2 if table.bad else 0)


if __name__ == "__main__":
    main()
