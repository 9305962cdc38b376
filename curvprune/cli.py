"""The command line: arguments in, exit code out. 0 certified (or no budget asked), 1 violated or
inconclusive, 2 bad input."""

from __future__ import annotations

import os

# Before torch loads its thread pool: idle OpenMP threads sleep instead of spinning. On a machine
# that is also doing something else, spinning threads keep the working ones off the cores (measured:
# 20 to 200 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear ours apart

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from curvprune import run as runs
from curvprune.artifact import export_dense, export_gptq

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)

RecipeArgument = Annotated[
    Path, typer.Argument(help="a YAML recipe, for example recipes/quickstart.yaml")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="the run folder (default: runs/<name of the recipe>)")
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(
        "--reuse",
        help="a run of the same model, data and options: they are not solved and priced again",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


class ExportFormat(StrEnum):
    gptq = "gptq"
    dense = "dense"


BAD_INPUT = (
    ValueError,
    OSError,
    ArithmeticError,
)  # what a user can mend: recipe, paths, disk, weights that overflow


def _bad_input(error: Exception) -> typer.Exit:
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False
    )
    return typer.Exit(2)


@app.command()
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    reuse: ReuseOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compress, certify and report; running it again resumes."""
    try:
        result = runs.run(
            recipe, out or Path("runs") / recipe.stem, progress=not quiet, reuse=reuse
        )
    except BAD_INPUT as error:
        raise _bad_input(error) from error
    if result.record:  # of several processes the first reports
        _print_result(result)
    raise typer.Exit(result.exit_code)


@app.command()
def analyze(recipe: RecipeArgument, out: OutOption = None, quiet: QuietOption = False) -> None:
    """Curvature and sensitivities only; `run` with the same --out goes on from there."""
    try:
        result = runs.analyze(recipe, out or Path("runs") / recipe.stem, progress=not quiet)
    except BAD_INPUT as error:
        raise _bad_input(error) from error
    if not result.record:  # of several processes the first reports
        return
    curvature = result.record.get("analysis") or {"layers": {}, "matrix": "Fisher"}
    layers = curvature["layers"]
    title = (
        f"{curvature['matrix']} trace per layer, {result.record['unit']}: the 15 largest per weight"
    )
    unsure = any(not entry["trace"].get("converged", True) for entry in layers.values())
    table = Table(
        title=title, caption="* not within the tolerance that was asked for" if unsure else None
    )
    for column in ("layer", "trace", "± se", "per weight"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    ranked = sorted(layers.items(), key=lambda x: -x[1]["trace"]["value"] / x[1]["parameters"])
    for name, entry in ranked[:15]:
        trace, stderr = entry["trace"]["value"], entry["trace"]["stderr"]
        spread = "–" if stderr is None else f"{stderr:.2g}"
        mark = "" if entry["trace"].get("converged", True) else " *"
        table.add_row(
            escape(name), f"{trace:.4g}{mark}", spread, f"{trace / entry['parameters']:.3g}"
        )
    Console().print(table)
    Console().print(f"{result.folder}/analysis.json, ledger.json, report.html", highlight=False)


@app.command()
def check(recipe: RecipeArgument) -> None:
    """Validate a recipe, list layers and options, estimate time and memory."""
    try:
        found = runs.check(recipe)
    except BAD_INPUT as error:
        raise _bad_input(error) from error
    console = Console()
    table = Table(title=f"{len(found.layers)} layers to compress, {len(found.kept)} kept")
    for column in ("layer", "kind", "out × in", "options"):
        table.add_column(column)
    for row in found.layers:
        shape = f"{row['shape'][0]} × {row['shape'][1]}"
        table.add_row(escape(row["name"]), row["kind"], shape, " ".join(row["options"]))
    console.print(table)
    if found.kept:
        console.print(f"kept as they are: {escape(', '.join(found.kept))}", highlight=False)
    for kind in dict.fromkeys(cut["kind"] for cut in found.cuts.values()):
        ranges = [(c["widths"][-1], c["units"]) for c in found.cuts.values() if c["kind"] == kind]
        shown = ", ".join(
            f"{ranges.count(r)} × {r[1]} to {r[0]} units" for r in dict.fromkeys(ranges)
        )
        console.print(f"units that can be removed first, {kind}: {shown}", highlight=False)
    if found.cuts:
        console.print(
            "shapes above and sizes below are those before units are removed", highlight=False
        )
    if found.power is not None:
        p = found.power
        console.print(
            f"certify: {p.items} items of {p.documents} documents; a model without any true loss "
            f"would be certified with probability {p.chance:.0%} (by a trial rounding that lost "
            f"{p.trial_drop:.3g})",
            highlight=False,
            soft_wrap=True,
        )
    for warning in found.warnings:
        console.print(
            f"[bold yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True
        )
    parts = ", ".join(f"{stage} {minutes:.1f}" for stage, minutes in found.minutes.items())
    console.print(
        f"estimated minutes: {sum(found.minutes.values()):.1f} ({parts})", highlight=False
    )
    console.print(f"estimated peak memory: {found.memory_bytes / 1e9:.1f} GB", highlight=False)
    console.print(
        f"size: {found.dense_bytes / 1e6:.1f} MB now, {found.smallest_bytes / 1e6:.1f} MB with "
        "the smallest options",
        highlight=False,
    )
    for limit in found.limits:
        console.print(
            f"budget: {limit['name']} {limit['most']:,.10g}, at least {limit['least']:,.10g} by "
            "itself",
            highlight=False,
        )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
    against: Annotated[
        Path | None, typer.Option("--against", help="another run folder to compare it with")
    ] = None,
) -> None:
    """(Re)build report.html of a run, with a comparison if asked for."""
    try:
        path = runs.rebuild_report(folder, against)
    except BAD_INPUT as error:
        raise _bad_input(error) from error
    Console().print(str(path), highlight=False)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="a saved model, for example runs/quickstart/model")
    ],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    format: Annotated[
        ExportFormat, typer.Option("--format", help="dense: an ordinary model")
    ] = ExportFormat.gptq,
) -> None:
    """Write a saved model once more: as a GPTQ checkpoint (one grid of 2, 3, 4 or 8 bits for all
    Linear layers), or dense, for every tool that reads the uncompressed one."""
    try:
        (export_gptq if format is ExportFormat.gptq else export_dense)(folder, out)
    except BAD_INPUT as error:
        raise _bad_input(error) from error
    Console().print(str(out), highlight=False)


def _print_result(result: runs.RunResult) -> None:
    console = Console()
    console.print(Markdown(result.summary))
    console.print(f"{result.folder}/model/ and {result.folder}/report.html", highlight=False)


if __name__ == "__main__":
    app()
