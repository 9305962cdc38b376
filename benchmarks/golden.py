"""A golden record: what a version of curvprune gives for a fixed set of runs, to hold a refactoring
against.

    python benchmarks/golden.py record before.json [--quickstart]  # minutes; with it 15 more
    python benchmarks/golden.py compare before.json after.json     # exits 1 if anything differs

Recorded are plans, prices, verdicts, and the hashes of model files, of

* the quickstart and the digits recipe, the latter also with ``structured`` and with ``recover``;
* ``curvprune analyze`` on the digits recipe;
* the Python verbs on a small Llama with random weights.

Files must be equal byte for byte, numbers to 1e-9 of their size. Only the command line and the
names in ``curvprune.__all__`` are used, so that the script runs on any version. Two records are
comparable if they come from one machine with one number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parent.parent
RELATIVE = 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("file", type=Path)
    record.add_argument("--quickstart", action="store_true", help="the quickstart too")
    record.add_argument("--only", default="", help="cases whose name contains this")
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    asked = parser.parse_args()

    if asked.command == "compare":
        before, after = (json.loads(path.read_text()) for path in (asked.before, asked.after))
        sys.exit(report_differences(before, after))

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if asked.file.is_file():
        found = json.loads(asked.file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            **recipe_cases(Path(folder), quickstart=asked.quickstart),
            **verb_cases(Path(folder)),
        }
        for name, case in cases.items():
            if asked.only not in name:
                continue
            found[name] = case()
            asked.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(f"{name}: recorded", flush=True)


# ------------------------------------------------------------------------------------------ recipes


def recipe_cases(folder: Path, *, quickstart: bool) -> dict[str, Any]:
    digits = yaml.safe_load((ROOT / "recipes/digits-vit.yaml").read_text())
    trained = folder / "digits-vit-dense"
    digits["model"]["path"] = str(trained)
    variants = {
        "digits": {},
        "digits, structured": {"structured": {"share": {"mlp": 0.25}, "uniform": True}},
        "digits, recover": {"recover": {"steps": 20}},
    }

    def train() -> None:
        if not trained.is_dir():
            call([sys.executable, str(ROOT / "examples/digits_vit.py"), "--out", str(trained)])

    def run_digits(name: str, changes: dict[str, Any]) -> dict[str, Any]:
        train()
        recipe = folder / f"{name.replace(', ', '-')}.yaml"
        recipe.write_text(yaml.safe_dump({**digits, **changes}, sort_keys=False))
        return run_recipe(recipe, folder / f"run-{recipe.stem}")

    def analyze_digits() -> dict[str, Any]:
        train()
        recipe, out = folder / "analysed.yaml", folder / "run-analysed"
        recipe.write_text(yaml.safe_dump(digits, sort_keys=False))
        call(
            [
                sys.executable,
                "-m",
                "curvprune",
                "analyze",
                str(recipe),
                "--out",
                str(out),
                "--quiet",
            ]
        )
        return {"analysis": read(out / "analysis.json"), "prices": prices_in(out)}

    cases = {name: lambda n=name, c=changes: run_digits(n, c) for name, changes in variants.items()}
    cases["digits, analyze"] = analyze_digits
    if quickstart:
        cases["quickstart"] = lambda: run_recipe(
            ROOT / "recipes/quickstart.yaml", folder / "run-quickstart"
        )
    return cases


def run_recipe(recipe: Path, out: Path) -> dict[str, Any]:
    """What a run leaves: the plan, the prices, the verdict, and the model's files."""
    command = [sys.executable, "-m", "curvprune", "run", str(recipe), "--out", str(out), "--quiet"]
    code = call(command, may_be=(0, 1))
    plan = read(out / "plan.json")
    return {
        "exit code": code,
        "plan": {
            key: plan[key]
            for key in ("choices", "bytes", "predicted", "predicted_stderr", "corrections")
        },
        "notes": plan["notes"],
        "trials": [
            {key: trial[key] for key in ("name", "kind", "bytes", "predicted", "accepted")}
            for trial in plan["trials"]
        ],
        "prices": prices_in(out),
        "verdict": read(out / "verdict.json"),
        "model files": hashes(out / "model"),
    }


def prices_in(out: Path) -> list[list[Any]]:
    rows = read(out / "ledger.json")["rows"]
    return [[row[key] for key in ("layer", "option", "bytes", "price", "stderr")] for row in rows]


def call(command: list[str], *, may_be: tuple[int, ...] = (0,)) -> int:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode not in may_be:
        raise RuntimeError(
            f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-4000:]}"
        )
    return ended.returncode


# ------------------------------------------------------------------------------------- Python verbs


def verb_cases(folder: Path) -> dict[str, Any]:
    import curvprune as cp

    model, data = small_llama(), token_batches(24)
    many = token_batches(64)
    block = "model.layers.*"
    menu = [cp.Quantize(bits=b, group_size=16) for b in (2, 3, 4, 8)]
    mixed = [
        *menu,
        cp.Prune(sparsity=0.5),
        cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=4)),
    ]

    def saved(result: Any, name: str) -> dict[str, str]:
        return hashes(result.save(folder / name))

    def result_of(result: Any, name: str) -> dict[str, Any]:
        plan, verdict = result.plan, result.verdict
        return {
            "choices": plan.choices,
            "bytes": plan.bytes,
            "predicted": plan.predicted,
            "notes": list(plan.notes),
            "verdict": None if verdict is None else verdict.to_dict(),
            "prices": None if result.ledger is None else ledger_rows(result.ledger),
            "weights": weights_of(result.model),
            "model files": saved(result, name),
        }

    def ledger_rows(ledger: Any) -> list[list[Any]]:
        return [[row.layer, row.option, row.bytes, row.price, row.stderr] for row in ledger.rows]

    def priced(**arguments: Any) -> dict[str, Any]:
        ledger = cp.price(model, data, options=mixed, layers=block, **arguments)
        plans = [
            [plan.choices, plan.bytes, plan.predicted] for plan in cp.frontier(ledger, points=5)
        ]
        return {"prices": ledger_rows(ledger), "frontier": plans}

    def structured() -> dict[str, Any]:
        result = cp.prune(model, data, structured=0.2)
        return {
            "cuts": {name: list(pair) for name, pair in result.cuts.items()},
            "macs": list(result.macs),
            "predicted": [result.predicted.value, result.predicted.stderr],
            "weights": weights_of(result.model),
            "model files": saved(result, "structured"),
        }

    def recovered() -> dict[str, Any]:
        first = cp.quantize(model, data, bits=3, group_size=16, layers=block)
        return result_of(cp.recover(first, model, data, steps=6), "recovered")

    def certified() -> dict[str, Any]:
        rounded = cp.quantize(model, data, bits=3, layers=block)
        return cp.certify(model, rounded.model, many, cp.Budget(max_drop=0.05)).to_dict()

    def operators() -> dict[str, Any]:
        found = {}
        for name in ("hessian", "gauss_newton", "fisher", "empirical_fisher"):
            operator = getattr(cp, name)(model, data[:4])
            estimate = cp.trace(operator, generator=torch.Generator().manual_seed(0))
            found[name] = [estimate.value, estimate.stderr]
        return found

    budget = cp.Budget("loss", max_drop=0.05)
    return {
        "verbs, quantize": lambda: result_of(
            cp.quantize(model, data, bits=4, group_size=16, symmetric=False), "quantize"
        ),
        "verbs, prune": lambda: result_of(
            cp.prune(model, data, sparsity=0.5, layers=block), "prune"
        ),
        "verbs, prune allocated": lambda: result_of(
            cp.prune(model, data, sparsity=0.5, allocate=True, layers=block), "allocated"
        ),
        "verbs, compress": lambda: result_of(
            cp.compress(model, many, options=mixed, budget=budget, layers=block), "compress"
        ),
        "verbs, max_bytes": lambda: result_of(
            cp.quantize(
                model,
                many,
                group_size=16,
                budget=cp.Budget(max_bits=4.5),
                same_option="fused",
                layers=block,
            ),
            "size",
        ),
        "verbs, price": lambda: priced(),
        "verbs, price by kfac": lambda: priced(curvature="kfac", measure_above=None),
        "verbs, price by hessian": lambda: priced(curvature="hessian"),
        "verbs, analyze": lambda: cp.analyze(model, data[:4], layers=block).to_dict(),
        "verbs, analyze ggn": lambda: cp.analyze(
            model, data[:4], matrix="ggn", layers=block
        ).to_dict(),
        "verbs, structured": structured,
        "verbs, recover": recovered,
        "verbs, certify": certified,
        "verbs, operators": operators,
    }


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def token_batches(items: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(items)
    found = []
    for _ in range(items):
        tokens = torch.randint(0, 96, (1, 24), generator=generator)
        found.append({"input_ids": tokens, "labels": tokens})
    return found


# ---------------------------------------------------------------------------- hashes and comparison


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def weights_of(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def report_differences(before: dict[str, Any], after: dict[str, Any]) -> int:
    different = 0
    for name in before:
        found = differences(before[name], after.get(name), "")
        different += bool(found)
        print(f"{name}: {'equal' if not found else f'{len(found)} difference(s)'}")
        for line in found[:12]:
            print(f"    {line}")
    return int(different > 0)


def differences(before: Any, after: Any, path: str) -> list[str]:
    """Every place where two records differ, as ``path: before, after``."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{path}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [
            line for i, (one, other) in pairs for line in differences(one, other, f"{path}[{i}]")
        ]
    if is_number(before) and is_number(after):
        if same_number(before, after):
            return []
    elif before == after:
        return []
    return [f"{path}: {str(before)[:80]} -> {str(after)[:80]}"]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same_number(one: float, other: float) -> bool:
    both_unknown = math.isnan(one) and math.isnan(other)
    return both_unknown or math.isclose(one, other, rel_tol=RELATIVE, abs_tol=1e-15)


if __name__ == "__main__":
    main()
