"""curvlinops' own test cases through our operators: products against functorch's dense matrices,
and K-FAC and EKFAC against the exact blocks of linear networks, in float64.

    git clone https://github.com/f-dangel/curvlinops /tmp/curvlinops
    python benchmarks/curvlinops_cases.py /tmp/curvlinops

The argument is a checkout, or a git directory without a work tree, which is unpacked to a temporary
folder. Nothing of it is copied: its ``test/cases.py``, ``test/kfac_cases.py`` and dense references
are imported from there, and what these import must be installed (einops, einconv, backpack,
linear_operator, tqdm, pytest; ``pip install --no-deps``, so that torch stays).

Means are over positions here. For ``reduction="sum"`` our matrices are multiplied by the number of
positions; those of ``reduction="mean"`` are compared as they are. The empirical Fisher is that of
places (``per="place"``). An order of the parameters that is not the model's (curvlinops'
"shuffled") has no counterpart. Prints a Markdown table, and what failed or was refused with the
reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import curvprune as cp

TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}  # as curvlinops has them
SAMPLED = {"rtol": 1e-1, "atol": 1.5e-2}  # of the largest entry, for 3,000 draws
DRAWS = 3000
EXCLUDED = (None, "weight", "bias")


@dataclass
class Row:
    """A row of the table."""

    what: str
    passed: int = 0
    count: int = 0
    reasons: list[str] = field(default_factory=list)


class Table:
    """Runs checks, and counts."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def check(self, what: str, case: str, run: Callable[[], None]) -> None:
        row = self.rows.setdefault(what, Row(what))
        row.count += 1
        try:
            run()
            row.passed += 1
        except Exception as error:  # whatever goes wrong is a case that does not pass
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            row.reasons.append(f"{case}: {type(error).__name__}: {first}")

    def show(self) -> None:
        print("| what | pass |\n|---|---|")
        for row in self.rows.values():
            print(f"| {row.what} | {row.passed} of {row.count} |")
        for row in self.rows.values():
            for reason in row.reasons:
                print(f"- {row.what}, {reason}")


@dataclass
class Case:
    """One of theirs, in float64, with a model that holds the case's parameters."""

    model: nn.Module
    theirs: Any
    loss: nn.Module
    params: dict[str, Tensor]
    data: list[Any]

    @property
    def scale(self) -> float:
        """From the mean over positions to the loss's own reduction."""
        return self.positions if self.loss.reduction == "sum" else 1.0

    @property
    def positions(self) -> float:
        return float(sum(y.numel() for _, y in self.data))


class WithParameters(nn.Module):
    """A function of (parameters, inputs) as a module."""

    def __init__(self, function: Callable[..., Tensor], params: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        # In their order; a ParameterDict would sort them.
        for name, p in params.items():
            self.register_parameter(name, nn.Parameter(p))

    def forward(self, inputs: Any) -> Tensor:
        return self.function(dict(self.named_parameters()), inputs)


def prepared(case: tuple[Any, ...]) -> Case:
    """A case as `initialize_case` and `change_dtype` leave it."""
    theirs, loss, params, data, _ = case
    data = [(x, y) for x, y in data]
    params = {name: p.detach() for name, p in params.items()}
    if isinstance(theirs, nn.Module):
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.copy_(params[name])
        return Case(model=theirs, theirs=theirs, loss=loss, params=params, data=data)
    model = WithParameters(theirs, params)
    return Case(model=model, theirs=theirs, loss=loss, params=params, data=data)


def close(found: Tensor, expected: Tensor, tolerance: dict[str, float] = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, **tolerance)


def close_sampled(found: Tensor, expected: Tensor) -> None:
    largest = expected.abs().max()
    close(found / largest, expected / largest, SAMPLED)


# ----------------------------------------------------------------------------------------- products


def operators(table: Table, cases: Any, conftest: Any, utils: Any, functorch: Any) -> None:
    kinds = {
        "Hessian": (cp.hessian, functorch.functorch_hessian, {}),
        "GGN": (cp.gauss_newton, functorch.functorch_ggn, {}),
        "empirical Fisher": (
            cp.empirical_fisher,
            functorch.functorch_empirical_fisher,
            {"per": "place"},
        ),
    }
    for number, given in enumerate(cases.CASES):
        for name, (ours, dense, arguments) in kinds.items():

            def run(ours=ours, dense=dense, arguments=arguments, given=given) -> None:
                case = prepared(utils.change_dtype(conftest.initialize_case(given), torch.float64))
                operator = ours(case.model, case.data, loss=case.loss, **arguments)
                expected = dense(case.theirs, case.loss, case.params, case.data, input_key="x")
                expected = expected.detach()
                v = torch.rand(len(expected), 2, dtype=torch.float64)
                close(case.scale * (operator @ v), expected @ v)
                close(case.scale * (operator @ v), expected @ v)
                close(case.scale * (operator @ v[:, 0]), expected @ v[:, 0])
                scipy = torch.from_numpy(operator.to_scipy() @ v.numpy())
                close(case.scale * scipy, expected @ v)

            table.check(f"{name} products", f"case {number}", run)

        def sampled(given=given) -> None:
            case = prepared(utils.change_dtype(conftest.initialize_case(given), torch.float64))
            operator = cp.fisher(case.model, case.data, loss=case.loss, labels=DRAWS)
            expected = functorch.functorch_ggn(
                case.theirs, case.loss, case.params, case.data, input_key="x"
            ).detach()
            v = torch.rand(len(expected), 2, dtype=torch.float64)
            close_sampled(case.scale * (operator @ v), expected @ v)

        table.check(f"Fisher products, {DRAWS:,} draws", f"case {number}", sampled)


# -------------------------------------------------------------------------------------------- K-FAC


def blocks(
    matrix: Tensor, model: nn.Module, names: Sequence[str], joint: bool
) -> dict[tuple[str, ...], Tensor]:
    """The blocks of the exact matrix over some parameters: of each, or of each weight with its
    bias."""
    places: dict[str, slice] = {}
    start = 0
    for name, p in model.named_parameters():
        places[name] = slice(start, start + p.numel())
        start += p.numel()
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        groups.setdefault(module if joint else name, []).append(name)
    found = {}
    for group in groups.values():
        index = torch.cat([torch.arange(places[n].start, places[n].stop) for n in group])
        found[tuple(group)] = matrix[index][:, index]
    return found


def compare(
    case: Case, exact: Tensor, *, joint: bool, exclude: str | None, sampled: bool = False, **asked
) -> None:
    """K-FAC's blocks and the exact ones, and that nothing lies between the blocks."""
    bias: Any = joint or "separate"
    if exclude == "bias":
        bias = False
    operator = cp.kfac(case.model, case.data, loss=case.loss, bias=bias, **asked)
    names = [n for n, _ in case.model.named_parameters() if exclude is None or exclude not in n]
    for group, expected in blocks(exact, case.model, names, joint and exclude is None).items():
        found = case.scale * operator.restrict(group).to_dense()
        close_sampled(found, expected) if sampled else close(found, expected)
    whole = operator.to_dense()
    places = operator.space.slices
    for one, other in product(places, places):
        same = one.rpartition(".")[0] == other.rpartition(".")[0]
        if not (one == other or (same and joint)):
            assert not bool(whole[places[one], places[other]].any())


class Kfac:
    """Their K-FAC tests against exact matrices, for K-FAC and EKFAC."""

    def __init__(self, table: Table, modules: dict[str, Any]) -> None:
        self.table = table
        self.cases, self.conftest = modules["kfac_cases"], modules["conftest"]
        self.utils, self.functorch = modules["utils"], modules["functorch"]

    def case(self, given: Any, setting: str | None = None, *, flat: bool = False) -> Case:
        model, loss, params, data, size = self.conftest.initialize_case(given)
        if setting is not None:
            # As their EKFAC has it, whose outputs must have two dimensions.
            model.setting = "expand-flatten" if flat and setting == "expand" else setting
            data = data[setting]
            if flat:
                data = [(x, y.flatten(start_dim=1)) for x, y in data]
            if not params:
                params = dict(model.named_parameters())
        found = self.utils.change_dtype((model, loss, params, data, size), torch.float64)
        return prepared(found)

    def exact(self, case: Case, kind: str = "ggn") -> Tensor:
        dense = getattr(self.functorch, f"functorch_{kind}")
        return dense(case.theirs, case.loss, case.params, case.data, input_key="x").detach()

    def run(self) -> None:
        for eigenvalues in (False, True):
            name = "EKFAC" if eigenvalues else "K-FAC"
            self.type2(name, eigenvalues)
            self.one_datum(name, eigenvalues)
            self.tied(name, eigenvalues)
        self.forward_only()
        self.many_outputs()

    def shared(self) -> Iterator[tuple[str, Any, str | None]]:
        """Their cases of deep linear networks, without and with shared weights."""
        for number, given in enumerate(self.cases.KFAC_EXACT_CASES):
            yield f"case {number}", given, None
        for number, given in enumerate(self.cases.KFAC_WEIGHT_SHARING_EXACT_CASES):
            for setting in ("expand", "reduce"):
                yield f"shared {number} {setting}", given, setting

    def type2(self, name: str, eigenvalues: bool) -> None:
        for label, given, setting in self.shared():
            asked = {"eigenvalues": eigenvalues, "kfac_approx": setting or "expand"}
            for exclude, joint in product(EXCLUDED, (False, True)):

                def run(
                    given=given, setting=setting, exclude=exclude, joint=joint, asked=asked
                ) -> None:
                    case = self.case(given, setting, flat=eigenvalues)
                    asked = {**asked, "fisher": "type-2"}
                    compare(case, self.exact(case), joint=joint, exclude=exclude, **asked)

                case = f"{label}, without {exclude}, {'joint' if joint else 'separate'}"
                self.table.check(f"{name} type-2, linear networks", case, run)

            def sampled(given=given, setting=setting, asked=asked) -> None:
                case = self.case(given, setting, flat=eigenvalues)
                compare(
                    case,
                    self.exact(case),
                    joint=False,
                    exclude=None,
                    sampled=True,
                    fisher="mc",
                    labels=DRAWS,
                    **asked,
                )

            self.table.check(f"{name} mc, linear networks", label, sampled)

    def one_datum(self, name: str, eigenvalues: bool) -> None:
        for number, given in enumerate(self.cases.KFAC_EXACT_ONE_DATUM_CASES):
            for fisher, kind in (
                ("type-2", "ggn"),
                ("mc", "ggn"),
                ("empirical", "empirical_fisher"),
            ):

                def run(given=given, fisher=fisher, kind=kind) -> None:
                    case = self.case(given)
                    compare(
                        case,
                        self.exact(case, kind),
                        joint=False,
                        exclude=None,
                        sampled=fisher == "mc",
                        fisher=fisher,
                        labels=DRAWS if fisher == "mc" else 1,
                        eigenvalues=eigenvalues,
                    )

                self.table.check(f"{name} {fisher}, one datum", f"case {number}", run)

    def tied(self, name: str, eigenvalues: bool) -> None:
        """One weight in two calls, and in two modules of which one has a bias; an activation in
        place."""
        once, twice = self.utils.SplitConcatModel, self.utils.WeightTiedSplitConcatModel
        models = {
            "one module": lambda: once(4, bias=False),
            "one module with bias": lambda: once(4, bias=True),
            "two modules, one bias": lambda: twice(4, bias1=True, bias2=False),
        }
        for (label, build), reduction, joint in product(
            models.items(), ("mean", "sum"), (False, True)
        ):

            def run(build=build, reduction=reduction, joint=joint) -> None:
                torch.manual_seed(0)
                loss, model = nn.MSELoss(reduction=reduction), build().double()
                data = [(torch.rand(1, 8).double(), torch.rand(1, 8).double())]
                case = prepared((model, loss, dict(model.named_parameters()), data, None))
                asked = {"fisher": "type-2", "eigenvalues": eigenvalues}
                exact = self.exact(case)
                if not joint or not hasattr(model, "linear2"):
                    compare(case, exact, joint=joint, exclude=None, **asked)
                    return
                operator = cp.kfac(model, data, loss=loss, **asked)
                names = ["linear1.weight", "linear1.bias"]
                found = case.scale * operator.restrict(names).to_dense()
                close(found, exact[: len(found), : len(found)])

            self.table.check(f"{name} type-2, tied weights", f"{label} {reduction}", run)

        def in_place() -> None:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
            data = [(torch.rand(1, 6).double(), torch.rand(1, 2).double())]
            case = prepared((model, nn.MSELoss(), dict(model.named_parameters()), data, None))
            asked = {"fisher": "type-2", "eigenvalues": eigenvalues}
            compare(case, self.exact(case), joint=False, exclude=None, **asked)

        self.table.check(f"{name} type-2, activations in place", "one", in_place)

    def forward_only(self) -> None:
        """Of a single layer with squared error, ``GGN = 2 / outputs · I ⊗ A``."""
        single = [(f"case {i}", g, None) for i, g in enumerate(self.cases.SINGLE_LAYER_CASES)]
        for number, given in enumerate(self.cases.SINGLE_LAYER_WEIGHT_SHARING_CASES):
            single += [(f"shared {number} {s}", given, s) for s in ("expand", "reduce")]
        for label, given, setting in single:

            def run(given=given, setting=setting) -> None:
                case = self.case(given, setting)
                outputs = case.data[0][1].shape[-1]
                exact = self.exact(case) * outputs / 2
                asked = {"fisher": "forward-only", "kfac_approx": setting or "expand"}
                compare(case, exact, joint=False, exclude=None, **asked)

            self.table.check("K-FAC forward-only, one layer", label, run)

    def many_outputs(self) -> None:
        """Outputs of four dimensions, and the same positions as items of their own."""
        losses = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
        kinds = ("type-2", "mc", "empirical", "forward-only")
        for loss, fisher, reduction in product(losses, kinds, ("mean", "sum")):

            def run(loss=loss, fisher=fisher, reduction=reduction) -> None:
                classes = loss is nn.CrossEntropyLoss
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
                last = nn.Sequential(model, ClassesSecond()) if classes else model
                data, flat = [], []
                for items in (2, 4):
                    x = torch.rand(items, 7, 5, 5).double()
                    y = torch.rand(items, 7, 5, 3).double()
                    y = torch.randint(0, 3, (items, 7, 5)) if classes else y
                    data.append((x, y))
                    flat.append((x.flatten(0, -2), y.flatten(0, 2)))
                asked = {"fisher": fisher, "bias": "separate"}
                chosen = loss(reduction=reduction)
                found = cp.kfac(last, data, loss=chosen, **asked).to_dense()
                expected = cp.kfac(model, flat, loss=chosen, **asked).to_dense()
                close(found, expected)

            case = f"{loss.__name__} {fisher} {reduction}"
            self.table.check("K-FAC, outputs of four dimensions", case, run)


class ClassesSecond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def inverses(table: Table, cases: Any, conftest: Any, utils: Any) -> None:
    """``(K + λ I)⁻¹`` and the two factored ways, against the inverse of the dense matrix."""
    for number, given in enumerate(cases.CASES):
        for split in ("exact", "factored", "each"):

            def run(given=given, split=split) -> None:
                case = prepared(utils.change_dtype(conftest.initialize_case(given), torch.float64))
                operator = cp.kfac(case.model, case.data, loss=case.loss, bias="separate")
                inverse = operator.inverse(1e-2, split=split)
                for name, block in operator.blocks.items():
                    close(inverse.blocks[name].to_dense(), naive(block, 1e-2, split))

            table.check(f"K-FAC inverse ({split})", f"case {number}", run)


def naive(block: Any, damping: float, split: str) -> Tensor:
    """The dense inverse of one block, damped."""
    if split == "exact":
        dense = block.to_dense()
        return torch.linalg.inv(dense + damping * torch.eye(len(dense), dtype=dense.dtype))
    g, a = block.left, block.right
    first, second = damping, damping
    if split == "factored" and float(g.trace()) > 0:
        ratio = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
        first, second = damping**0.5 / ratio, damping**0.5 * ratio
    g = g + first * torch.eye(len(g), dtype=g.dtype)
    a = a + second * torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.inv(torch.kron(g, a))


def checkout(path: Path, folder: Path) -> Path:
    """The work tree, unpacked if there is none."""
    if (path / "test" / "cases.py").exists():
        return path
    archive = subprocess.run(
        ["git", "-C", str(path), "archive", "HEAD"], check=True, capture_output=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="curvlinops' test cases through our operators")
    parser.add_argument("path", type=Path, help="a checkout or git directory of curvlinops")
    parser.add_argument("--only", choices=("operators", "kfac"), help="one of the two tables")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        # In front of the standard library, whose package of tests has the same name.
        sys.path.insert(0, str(checkout(asked.path, Path(folder))))
        for name in [n for n in sys.modules if n == "test" or n.startswith("test.")]:
            del sys.modules[name]
        names = ("cases", "kfac_cases", "conftest", "utils")
        modules = {name: import_module(f"test.{name}") for name in names}
        modules["functorch"] = import_module("curvlinops.examples.functorch")
        table = Table()
        shared = (modules["cases"], modules["conftest"], modules["utils"])
        if asked.only != "kfac":
            operators(table, *shared, modules["functorch"])
        if asked.only != "operators":
            Kfac(table, modules).run()
            inverses(table, *shared)
    table.show()


if __name__ == "__main__":
    main()
