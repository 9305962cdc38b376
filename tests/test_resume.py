"""Runs that are killed, interrupted, started again or shared by processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curvprune import run as runs
from curvprune.cli import app
from curvprune.run import RecipeError
from tests import tiny
from tests.tiny import contents


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> runs.RunResult:
    return runs.run(recipe, tmp_path_factory.mktemp("run") / "out", progress=False)


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory) -> Path:
    """The same with prices of the uncompressed model."""
    path = tiny.write_recipe(tmp_path_factory.mktemp("quadratic"))
    path.write_text(path.read_text() + "price: {prices: quadratic}\n")
    return path


@pytest.fixture(scope="module")
def analysed(recipe, tmp_path_factory) -> Path:
    return runs.analyze(recipe, tmp_path_factory.mktemp("analysed") / "out", progress=False).folder


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written, in nanoseconds."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_a_second_run_returns_at_once_and_another_recipe_is_refused(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    finished = runs.run(recipe, tmp_path / "out", progress=False)
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(RecipeError, match=r"holds a run with another .*recipe_sha256"):
        runs.run(other, finished.folder, progress=False)
    shutil.rmtree(tmp_path / "tiny")  # the model is not needed again
    again = runs.run(recipe, finished.folder, progress=False)
    assert again.record.to_json() == finished.record.to_json() and again.exit_code == 0


def test_ten_kills_at_random_moments_change_nothing(recipe, finished, tmp_path):
    start = time.monotonic()
    runs.run(recipe, tmp_path / "timed", progress=False)
    seconds = time.monotonic() - start
    out, moments, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            # Only the run itself may happen in the child; no test teardown.
            try:
                runs.run(recipe, out, progress=False)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.05, 0.35) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    assert killed >= 6, "the kills must hit running processes"
    final = runs.run(recipe, out, progress=False)
    assert contents(out) == contents(finished.folder) == contents(tmp_path / "timed")
    assert final.record.verdict == finished.record.verdict
    assert final.record.trials == finished.record.trials


def written_again(recipe: Path, out: Path, *removed: str) -> set[str]:
    """What of the state is written when a finished run goes on without its model and these
    files."""
    shutil.rmtree(out / "model")
    for name in removed:
        (out / "state" / name).unlink()
    before = times(out / "state")
    runs.run(recipe, out, progress=False)
    after = times(out / "state")
    return {name for name in after if after[name] != before.get(name)}


def test_finished_stages_and_layers_are_not_repeated(recipe, finished, tmp_path):
    """Take the end of a finished run away and run again: nothing before it is written a second
    time."""
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out)
    # 1. A layer of what ships.
    (mark,) = (out / "state" / "applied").glob("*/model/complete")
    layer = f"applied/{mark.parent.parent.name}/0003"
    solved = {f"{layer}.json", f"{layer}.safetensors"}
    new = written_again(recipe, out, f"{layer}.json")
    assert solved <= new <= {*solved, "done.json"}
    assert contents(out) == contents(finished.folder)
    # 2. What a round has found: its pass is made again, whose errors are not kept, and no other.
    one = next((out / "state" / "rounds").glob("*.json"))
    new = written_again(recipe, out, f"rounds/{one.name}")
    assert f"rounds/{one.name}" in new
    others = new - {f"rounds/{one.name}", "done.json"}
    assert all(name.startswith(f"applied/{one.stem}/") for name in others)
    assert not list((out / "state").rglob("*.share.*"))
    assert contents(out) == contents(finished.folder)


def test_a_pricing_pass_is_not_repeated(quadratic, tmp_path):
    """The same of quadratic prices: one layer is solved again."""
    out = runs.run(quadratic, tmp_path / "out", progress=False).folder
    whole = {**contents(out), "analysis": (out / "analysis.json").read_bytes()}
    new = written_again(quadratic, out, "solved/0003.json")
    solved = {"solved/0003.json", "solved/0003.safetensors"}
    # The pricing pass writes its (equal) mark again, and the run that it has ended.
    assert solved <= new <= solved | {"fisher.json", "done.json"}
    assert {**contents(out), "analysis": (out / "analysis.json").read_bytes()} == whole


def test_an_interrupted_copy_of_another_run_leaves_nothing(recipe, finished, tmp_path, monkeypatch):
    out, linked = tmp_path / "out", []

    def interrupted(source, target):
        if len(linked) == 3:
            raise KeyboardInterrupt
        linked.append(shutil.copy2(source, target))

    with monkeypatch.context() as disk:
        disk.setattr(os, "link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.run(recipe, out, progress=False, reuse=finished.folder)
    assert not (out / "state").exists() and not (out / "recipe.lock.yaml").exists()

    def refused(source, target):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refused)
    runs.run(recipe, out, progress=False, reuse=finished.folder)
    assert contents(out) == contents(finished.folder) and not (out / ".state.new").exists()


def test_a_run_killed_while_it_takes_another_over_goes_on(recipe, finished, tmp_path, monkeypatch):
    """Killed before the inputs, the lock, or the state appear under their names."""
    replace, rename = Path.replace, Path.rename
    for point in ("inputs.json", "recipe.lock.yaml", "state"):
        out = tmp_path / point

        def killed_at(move, source, target, at=point):
            if Path(target).name == at:
                raise KeyboardInterrupt
            return move(source, target)

        with monkeypatch.context() as disk:
            disk.setattr(Path, "replace", lambda p, to, k=killed_at: k(replace, p, to))
            disk.setattr(Path, "rename", lambda p, to, k=killed_at: k(rename, p, to))
            with pytest.raises(KeyboardInterrupt):
                runs.run(recipe, out, progress=False, reuse=finished.folder)
        assert not (out / "state").exists()
        runs.run(recipe, out, progress=False, reuse=finished.folder)
        assert contents(out) == contents(finished.folder)


@pytest.mark.slow
def test_analyze_then_run_share_their_work(recipe, finished, tmp_path):
    runner = CliRunner()
    out = str(tmp_path / "out")
    result = runner.invoke(app, ["analyze", str(recipe), "--out", out, "--quiet"])
    matrix = json.loads((Path(out) / "analysis.json").read_text())["matrix"]
    assert f"{matrix} trace per layer" in " ".join(result.output.split()) and "Hessian" in matrix
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(found["layers"]) == 15 and found["matrix"] == "Hessian"
    assert all(e["trace"]["value"] > 0 for e in found["fisher"]["layers"].values())
    assert all(e["eigenvalues"] is not None for e in found["layers"].values())
    report = (tmp_path / "out" / "report.html").read_text()
    assert "2/λ" in report and found["diagnosis"]["lambda_max"] > found["diagnosis"]["lambda_min"]
    assert not (tmp_path / "out" / "model").exists() and (tmp_path / "out" / "report.html").exists()
    assert runner.invoke(app, ["run", str(recipe), "--out", out, "--quiet"]).exit_code == 0
    assert contents(tmp_path / "out") == contents(finished.folder)


def test_an_interrupted_analysis_repeats_what_it_had_not_finished(recipe, analysed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(analysed, out)
    for name in ("analysis.json", "report.html", "report.json"):
        (out / name).unlink()
    parts = sorted((out / "state" / "curvature").iterdir())
    assert len(parts) > 15, "every layer's eigenvalues are a part of their own"
    parts[4].unlink()
    before = times(out / "state" / "curvature")
    runs.analyze(recipe, out, progress=False)
    after = times(out / "state" / "curvature")
    assert {name for name in after if after[name] != before.get(name)} == {parts[4].name}
    assert (out / "analysis.json").read_text() == (analysed / "analysis.json").read_text()


@pytest.mark.slow
def test_processes_share_an_analysis(recipe, analysed, tmp_path):
    """Two processes under torchrun: the same ledger and the same curvature as one, and `run` goes
    on from there."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = [
        "-m",
        "curvprune",
        "analyze",
        str(recipe),
        "--quiet",
        "--out",
        str(tmp_path / "two"),
    ]
    ended = subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (
        ended.stdout.replace("\n", "").count("analysis.json") == 1
    )  # one of them reports; long paths are wrapped
    one, two = (
        json.loads((folder / "analysis.json").read_text())
        for folder in (analysed, tmp_path / "two")
    )
    assert numbers(two["fisher"]) == pytest.approx(numbers(one["fisher"]), rel=1e-6)
    traces = [
        {n: c["trace"]["value"] for n, c in record["layers"].items()} for record in (one, two)
    ]
    assert traces[1] == pytest.approx(traces[0], rel=1e-5, abs=1e-7)
    assert two["diagnosis"]["lambda_max"] == pytest.approx(one["diagnosis"]["lambda_max"], rel=1e-6)
    one, two = (
        json.loads((folder / "ledger.json").read_text()) for folder in (analysed, tmp_path / "two")
    )
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-6)
    assert one["prices"] == "shares"
    (applied,) = (analysed / "state" / "applied").iterdir()
    solved = [
        {f.name: f.read_bytes() for f in (d / "state/applied" / applied.name).iterdir()}
        for d in (analysed, tmp_path / "two")
    ]
    assert solved[0] == solved[1]


def numbers(record, path="") -> dict[str, float]:
    """The numbers of a JSON record by their paths."""
    if isinstance(record, dict):
        return {
            k: v
            for key, value in record.items()
            for k, v in numbers(value, f"{path}/{key}").items()
        }
    if isinstance(record, list):
        return {
            k: v for i, value in enumerate(record) for k, v in numbers(value, f"{path}/{i}").items()
        }
    return {path: record} if isinstance(record, (int, float)) else {}
