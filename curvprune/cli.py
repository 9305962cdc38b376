"""The command line: arguments in, exit code out. 0 certified (or no budget asked), 1 violated or
inconclusive, 2 bad input, 3 the machine (disk, memory), 130 interrupted."""

from __future__ import annotations

import os

# Before torch loads its thread pool: idle OpenMP threads sleep instead of spinning. On a machine
# that is also doing something else, spinning threads keep the working ones off the cores (measured:
# 20 to 200 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear ours apart

import errno
import math
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

import curvprune
from curvprune import run as runs
from curvprune.artifact import export_dense, export_gptq
from curvprune.failures import MACHINE, tell, told_to_end
from curvprune.targets import export_gguf, export_onnx

RESUMING = ("run", "analyze")  # commands that go on from where they were stopped


class _Commands(typer.core.TyperGroup):
    """The commands, of which every exception leaves with one sentence and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with told_to_end():
            try:
                return super().main(*args, **kwargs)
            except SystemExit as end:
                # What is still to be written, such as --help into a full disk, fails here or when
                # the interpreter ends, which would give the exit code another meaning.
                code = _written(end.code)
                if code == end.code:
                    raise
                raise SystemExit(code) from end

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)  # which also answers --help
        except BaseException as error:
            raise _exit(error, command="") from error

    def invoke(self, ctx: Any) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except BaseException as error:
            raise _exit(error, command=ctx.invoked_subcommand or "") from error


def _exit(error: BaseException, *, command: str) -> BaseException:
    """What to raise for an exception: typer's own as they are, an exit code for all others."""
    # An exit code that a command chose, or an argument that is wrong.
    if hasattr(error, "exit_code"):
        return error
    # rich's word for a reader of the output that has gone.
    if isinstance(error, SystemExit):
        error = BrokenPipeError(errno.EPIPE, "the output was closed")
    return typer.Exit(tell(error, resumes=command in RESUMING))


def _written(code: Any) -> Any:
    """The exit code, once all output is written; that of the machine if it cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more at its end: into nothing.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return tell(error) if code in (0, None) else code
    except ValueError:  # closed already
        return MACHINE if code in (0, None) else code
    return code


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=__doc__,
)

RecipeArgument = Annotated[
    Path, typer.Argument(help="a YAML recipe, for example recipes/quickstart.yaml")
]
FolderArgument = Annotated[Path, typer.Argument(help="a run folder")]
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
    # Lower case: members are what one types.
    gguf = "gguf"
    gptq = "gptq"
    onnx = "onnx"
    dense = "dense"


MOST_LAYERS = 15  # that `analyze` prints; its report has all


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"curvprune {curvprune.__version__}")
        raise typer.Exit()
    return asked  # the option's value, which typer takes from here


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show the version"),
    ] = False,
) -> None:
    """Options that come before any command."""


@app.command()
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    reuse: ReuseOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compress, certify and report; running it again resumes."""
    folder = out or Path("runs") / recipe.stem
    result = runs.run(recipe, folder, progress=not quiet, reuse=reuse)
    if result.record:  # of several processes the first reports
        console = Console()
        console.print(Markdown(result.summary))
        console.print(f"{result.folder}/model/ and {result.folder}/report.html", highlight=False)
    raise typer.Exit(result.exit_code)


@app.command()
def analyze(recipe: RecipeArgument, out: OutOption = None, quiet: QuietOption = False) -> None:
    """Curvature and sensitivities only; `run` with the same --out goes on from there."""
    folder = out or Path("runs") / recipe.stem
    result = runs.analyze(recipe, folder, progress=not quiet)
    if not result.record:  # of several processes the first reports
        return
    console = Console()
    _print_traces(console, result)
    console.print(f"{result.folder}/analysis.json, ledger.json, report.html", highlight=False)


def _print_traces(console: Console, result: runs.RunResult) -> None:
    """The layers whose weights matter most, by the trace of their block."""
    analysis = None if result.record is None else result.record.analysis
    if analysis is None:
        return
    # 1. The largest traces per weight.
    ranked = []
    for name, layer in analysis.layers.items():
        if layer.trace is not None:
            ranked.append((layer.trace.value / layer.parameters, name, layer.trace))
    ranked.sort(key=lambda entry: -entry[0])
    # 2. Their table; a mark tells traces that are less certain than was asked for.
    unsure = any(not trace.converged for _, _, trace in ranked)
    table = Table(
        title=f"{analysis.matrix} trace per layer, {analysis.measure}: the {MOST_LAYERS} largest "
        "per weight",
        caption="* not within the tolerance that was asked for" if unsure else None,
    )
    table.add_column("layer", overflow="fold")
    for column in ("trace", "± se", "per weight"):
        table.add_column(column, justify="right")
    for per_weight, name, trace in ranked[:MOST_LAYERS]:
        spread = f"{trace.stderr:.2g}" if math.isfinite(trace.stderr) else "–"
        mark = "" if trace.converged else " *"
        table.add_row(escape(name), f"{trace.value:.4g}{mark}", spread, f"{per_weight:.3g}")
    console.print(table)


@app.command()
def check(recipe: RecipeArgument) -> None:
    """Validate a recipe, list layers and options, estimate time and memory."""
    found = runs.check(recipe)
    console = Console(highlight=False)
    # What would be compressed, what may go wrong, what it would take.
    _print_layers(console, found)
    _print_cuts(console, found)
    _print_prospects(console, found)
    _print_needs(console, found)


def _print_layers(console: Console, found: runs.Check) -> None:
    console.print(f"{len(found.layers)} layers to compress, {len(found.kept)} kept")
    # Names are wrapped where they are too wide, never cut.
    table = Table()
    table.add_column("layers", overflow="fold")
    table.add_column("count", justify="right")
    for column in ("kind", "out × in", "options"):
        table.add_column(column, overflow="fold")
    for line in runs.layer_lines(found.layers):
        out, width = line.shape
        options = " ".join(line.options)
        table.add_row(escape(line.names), str(line.count), line.kind, f"{out} × {width}", options)
    console.print(table)
    kept = []
    for name, members in runs.joined_names(found.kept).items():
        kept.append(name if len(members) == 1 else f"{name} ({len(members)})")
    if kept:
        console.print(f"kept as they are: {escape('; '.join(kept))}", soft_wrap=True)


def _print_cuts(console: Console, found: runs.Check) -> None:
    # Kind → (units, fewest that may be left) → number of cuts.
    kinds: dict[str, Counter[tuple[int, int]]] = {}
    for cut in found.cuts.values():
        kinds.setdefault(cut.kind, Counter())[cut.units, cut.widths[-1]] += 1
    for kind, ranges in kinds.items():
        shown = ", ".join(f"{n} × {most} to {least} units" for (most, least), n in ranges.items())
        console.print(f"units that can be removed first, {kind}: {shown}")
    if found.cuts:
        console.print("shapes above and sizes below are those before units are removed")


def _print_prospects(console: Console, found: runs.Check) -> None:
    """Whether the certificate can be had, and what else may go wrong."""
    power = found.power
    if power is not None:
        console.print(
            f"certify: {power.items} items of {power.documents} documents; a model without any "
            f"true loss would be certified with probability {power.chance:.0%} (by a trial "
            f"rounding that lost {power.trial_drop:.3g})",
            soft_wrap=True,
        )
    for warning in found.warnings:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def _print_needs(console: Console, found: runs.Check) -> None:
    """Time, memory and size."""
    parts = ", ".join(f"{stage} {minutes:.1f}" for stage, minutes in found.minutes.items())
    console.print(f"estimated minutes: {sum(found.minutes.values()):.1f} ({parts})")
    console.print(f"estimated peak memory: {found.memory_bytes / 1e9:.1f} GB")
    console.print(
        f"size: {found.dense_bytes / 1e6:.1f} MB now, {found.smallest_bytes / 1e6:.1f} MB with the "
        "smallest options"
    )
    for limit in found.limits:
        console.print(
            f"budget: {limit.name} {limit.most:,.10g}, at least {limit.least:,.10g} by itself"
        )


@app.command()
def report(
    folder: FolderArgument,
    against: Annotated[
        Path | None, typer.Option("--against", help="another run folder to compare it with")
    ] = None,
) -> None:
    """(Re)build report.html of a run, with a comparison if asked for."""
    path = runs.rebuild_report(folder, against)
    Console().print(str(path), highlight=False)


@app.command()
def compare(
    dense: Annotated[
        str,
        typer.Argument(help="the reference: a folder, the name of a model, or a recipe for its"),
    ],
    other: Annotated[str, typer.Argument(help="another model, for example runs/quickstart/model")],
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="a folder for comparison.json and comparison.html")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """How far two models are apart on the certify split of a recipe: KL divergence, top-1
    agreement, losses, flips."""
    found = runs.compare_folders(dense, other, recipe, out=out, progress=not quiet)
    console = Console(highlight=False)
    _print_comparison(console, found)
    if out is not None:
        console.print(f"{out}/comparison.json and comparison.html")


def _print_comparison(console: Console, found: runs.ComparedModels) -> None:
    table = Table(title=escape(found.title), caption=escape(found.evidence))
    table.add_column("figure", overflow="fold")
    table.add_column("value ± se", justify="right", overflow="fold")
    table.add_column("measure", overflow="fold")
    for row in found.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for note in found.record.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


@app.command()
def clean(folder: FolderArgument) -> None:
    """Remove a run's intermediate results, state/; its model and report stay."""
    freed = runs.clean(folder)
    Console().print(f"{freed:,} bytes freed", highlight=False)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="a saved model, for example runs/quickstart/model")
    ],
    out: Annotated[Path, typer.Argument(help="a new folder; of gguf and onnx a new file")],
    target: Annotated[
        ExportFormat,
        typer.Option("--target", "--format", help="dense: an ordinary model"),
    ] = ExportFormat.gptq,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            help="of gguf: a GGUF file of the same model, for metadata, tokenizer and chat "
            "template (default: the file that the model came from, if it is still there)",
        ),
    ] = None,
) -> None:
    """Write a saved model once more: as one GGUF file for llama.cpp, as an ONNX file for ONNX
    Runtime, as a GPTQ checkpoint (one grid of 2, 3, 4 or 8 bits for all Linear layers), or dense,
    for every tool that reads the uncompressed one."""
    if like is not None and target is not ExportFormat.gguf:
        raise ValueError(f"--like goes with --target gguf; {target.value} takes nothing from it")
    if target is ExportFormat.gguf:
        export_gguf(folder, out, like=like or runs.source_gguf(folder))
    elif target is ExportFormat.onnx:
        export_onnx(folder, out)
    elif target is ExportFormat.gptq:
        export_gptq(folder, out)
    else:
        export_dense(folder, out)
    Console().print(str(out), highlight=False)


if __name__ == "__main__":
    app()
