"""Damaged, edited, swapped and foreign files: refused by their names, or made anew as they were."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import curvprune as cp
from curvprune import run as runs
from curvprune.cli import app
from curvprune.files import State, read_tensors_of, written_beside
from tests import tiny
from tests.tiny import contents

WEIGHTS = "model.safetensors"
MARK = "curvprune.json"


def refused(*arguments: str | Path) -> str:
    """What the command line says as it exits with 2."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    said = "".join(result.output.split("\n"))
    assert result.exit_code == 2, said
    assert "Traceback" not in said
    return said.replace(" ", "")


# ---------------------------------------------------------------------------------- the damages


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first": lambda path: flip(path, 0.0),
    "middle": lambda path: flip(path, 0.5),
    "last": lambda path: flip(path, 1.0),
    "truncated": truncate,
    "empty": empty,
}


# ------------------------------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder for transformers, with a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 256, (2, 8), generator=generator)}]
    result = cp.quantize(tiny.llama(hidden=64, layers=1), data, bits=4, group_size=16)
    folder = tmp_path_factory.mktemp("saved") / "model"
    return result.save(folder, tokenizer=tiny.byte_tokenizer())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def readers(folder: Path, out: Path) -> list[Callable[[], object]]:
    """All that read an artifact."""
    return [
        lambda: cp.load(folder),
        lambda: cp.load(folder, packed=True),
        lambda: cp.load(folder, model=tiny.llama(hidden=64, layers=1)),
        lambda: cp.export_dense(folder, out / "dense"),
        lambda: cp.export_gptq(folder, out / "gptq"),
    ]


def all_refuse(folder: Path, out: Path, name: str) -> None:
    for read in readers(folder, out):
        with pytest.raises(ValueError, match=re.escape(str(folder / name))):
            read()
    assert not (out / "dense").exists() and not (out / "gptq").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_every_damaged_file_by_its_name(damage, saved, folder, tmp_path):
    # The card is for people, who edit it before they publish a model.
    names = sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    assert {WEIGHTS, MARK, "config.json", "tokenizer.json"} <= set(names)
    for name in names:
        DAMAGES[damage](folder / name)
        all_refuse(folder, tmp_path, name)
        shutil.copyfile(saved / name, folder / name)
    cp.load(folder)


def test_swapped_tensors_files_and_numbers_are_refused(saved, folder, tmp_path):
    # 1. Two tensors of one shape in each other's place.
    tensors = load_file(folder / WEIGHTS)
    up, gate = (f"model.layers.0.mlp.{which}_proj.weight_packed" for which in ("up", "gate"))
    tensors[up], tensors[gate] = tensors[gate], tensors[up]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    all_refuse(folder, tmp_path, WEIGHTS)
    shutil.copyfile(saved / WEIGHTS, folder / WEIGHTS)
    # 2. A number of the config, and one of the manifest, in JSON that is as good as before.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    all_refuse(folder, tmp_path, "config.json")
    shutil.copyfile(saved / "config.json", folder / "config.json")
    manifest = json.loads((folder / MARK).read_text())
    manifest["files"].pop("config.json")
    (folder / MARK).write_text(json.dumps(manifest))
    all_refuse(folder, tmp_path, MARK)
    shutil.copyfile(saved / MARK, folder / MARK)
    # 3. A file that is gone, or is none; one that was added is nobody's business.
    (folder / "notes.txt").write_text("mine")
    cp.load(folder)
    (folder / WEIGHTS).unlink()
    all_refuse(folder, tmp_path, WEIGHTS)
    os.mkfifo(folder / WEIGHTS)
    all_refuse(folder, tmp_path, WEIGHTS)


def test_without_hashes_what_cannot_be_is_still_refused(saved, folder):
    flip(folder / WEIGHTS, 0.9)  # a weight, somewhat other than it was
    assert isinstance(cp.load(folder, verify=False), nn.Module)
    for damage in (truncate, empty, lambda path: path.write_bytes(b"\xff" * 64)):
        damage(folder / WEIGHTS)
        for packed in (False, True):
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
                cp.load(folder, packed=packed, verify=False)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2, "damaged"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            "twice",
        ),
        (b"[" * 100_000, "damaged"),
        (b'{"a":{"dtype":"F64","shape":[99999999999],"data_offsets":[0,799999999992]}}', "damaged"),
        (b'{"a":{"dtype":"XX","shape":[1],"data_offsets":[0,1]}}', "damaged"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "not what its header says"),
    ],
)
def test_headers_that_lie_are_refused(header, message, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match=message) as raised:
        read_tensors_of(path)
    assert str(path) in str(raised.value)


# ---------------------------------------------------------------------- saving over what is there


class Killed(BaseException):
    pass


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def quantized(seed: int) -> cp.Result:
    torch.manual_seed(9)
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))]
    return cp.quantize(small(seed), data, bits=4)


def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch):
    """Killed at every move of a file or folder, in turn."""
    outputs = []
    probe = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for seed in (0, 1):
        outputs.append(quantized(seed).model(probe))
    moves = {"rename": Path.rename, "replace": Path.replace, "unlink": Path.unlink}
    second, ended, countdown = quantized(1), 0, 0
    while not ended:
        out = tmp_path / str(countdown) / "model"
        quantized(0).save(out)
        left = [countdown]

        def killed(path, *rest, move, left=left, **told):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return move(path, *rest, **told)

        with monkeypatch.context() as disk:
            for name, move in moves.items():
                disk.setattr(Path, name, lambda p, *r, m=move, k=killed, **t: k(p, *r, move=m, **t))
            # A killed process tidies nothing up.
            disk.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                second.save(out)
                ended = 1
            except Killed:
                pass
        found = cp.load(out, model=small(0))(probe)
        assert any(torch.equal(found, one) for one in outputs)
        for leftover in out.parent.glob(".model.new-*"):  # of a process that is no more
            leftover.rename(leftover.with_name(".model.new-999999999"))
        second.save(out)
        assert torch.equal(cp.load(out, model=small(0))(probe), outputs[1])
        assert [path.name for path in out.parent.iterdir()] == ["model"]
        countdown += 1
    assert countdown > 5


def test_nothing_that_others_wrote_is_lost_by_a_save(tmp_path):
    result, out = quantized(0), tmp_path / "model"
    result.save(out)
    result.save(out)
    for name in ("notes.txt", "model.safetensors"):
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"{name}.*curvprune did not write"):
            result.save(out)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        result.save(link)
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / ".new.old").mkdir()
    (tmp_path / ".new.old" / "precious").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        result.save(tmp_path / "new")
    assert (tmp_path / ".new.old" / "precious").read_text() == "mine"


def test_an_export_that_fails_can_be_repeated_and_follows_no_link(saved, folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    out = tmp_path / "out"
    with pytest.raises(Killed), written_beside(out, MARK) as fresh:
        (fresh / "half").write_text("x")
        raise Killed
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / ".out.new-999999999").mkdir()  # of one that was killed
    (folder / "tokenizer.json").chmod(0o600)
    cp.export_dense(folder, out)
    assert not (out / "notes.txt").exists() and not list(tmp_path.glob(".out*"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {0o666 & ~umask()}


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    return runs.run(recipe, tmp_path_factory.mktemp("run") / "out", progress=False).folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def published(folder: Path) -> list[str]:
    names = json.loads((folder / "files.json").read_text())["files"]
    assert {"verdict.json", "plan.json", "report.json", "report.html"} <= set(names)
    assert {"model/model.safetensors", "model/config.json", "recipe.lock.yaml"} <= set(names)
    return sorted(names)


@pytest.mark.parametrize("damage", ["middle", "empty"])
def test_a_finished_run_answers_only_with_the_files_that_it_wrote(damage, recipe, finished, out):
    for name in [*published(out), "files.json"]:
        DAMAGES[damage](out / name)
        said = refused("run", recipe, "--out", out, "--quiet")
        assert str(out / name) in said
        if name not in ("report.html", "report.json"):
            assert str(out / name) in refused("report", out)
        # What is deleted comes back as it was.
        shutil.copyfile(finished / name, out / name)
    assert runs.run(recipe, out, progress=False).exit_code == 0


def test_what_is_missing_from_a_finished_run_comes_back(recipe, finished, out):
    for name in ("model/model.safetensors", "verdict.json", "report.html", "plan.json"):
        (out / name).unlink()
    runs.run(recipe, out, progress=False)
    assert contents(out) == contents(finished)


def test_a_verdict_is_about_one_model(recipe, finished, out, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("max_drop: 0.2", "max_drop: 0.0001"))
    there = runs.run(other, tmp_path / "there", progress=False).folder
    names = ("verdict.json", "plan.json")
    assert (there / names[0]).read_text() != (out / names[0]).read_text()
    for name in names:
        shutil.copyfile(there / name, out / name)
        assert str(out / name) in refused("run", recipe, "--out", out, "--quiet")
        assert str(out / name) in refused("report", out)
        shutil.copyfile(finished / name, out / name)
    assert json.loads((out / "verdict.json").read_text())["status"] == "CERTIFIED"


def relist(folder: Path, name: str) -> None:
    """Put a file on the list as it is now, as one would who knows how the list is made."""
    path = folder / "files.json"
    listed = json.loads(path.read_text())
    listed["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    listed["sha256"] = ""
    listed["sha256"] = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(listed))


def test_a_verdict_names_the_model_that_it_is_about(recipe, out):
    verdict = json.loads((out / "verdict.json").read_text())
    verdict["of"]["model"] = "0" * 64
    (out / "verdict.json").write_text(json.dumps(verdict))
    relist(out, "verdict.json")
    for verb in (("run", recipe, "--out", out, "--quiet"), ("report", out)):
        assert "isnotaboutthemodel" in refused(*verb)


def test_what_was_edited_is_not_written_over_by_a_run_that_goes_on(recipe, out):
    (out / "state" / "done.json").unlink()
    (out / "ledger.json").write_text("mine")
    assert str(out / "ledger.json") in refused("run", recipe, "--out", out, "--quiet")
    assert (out / "ledger.json").read_text() == "mine"


def test_inputs_that_have_changed_are_no_finished_run(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    out = runs.run(recipe, tmp_path / "out", progress=False).folder
    config = tmp_path / "tiny" / "config.json"
    text = tmp_path / "texts" / "document3.txt"
    for path, old, new, changed in (
        (config, '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "model_sha256"),
        (text, "Sentence 1", "Sentence one", "data_sha256"),
    ):
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
        assert f"another{changed}" in refused("run", recipe, "--out", out, "--quiet")
        path.write_text(before)
    # A file that changes nothing is no reason.
    (tmp_path / "tiny" / "README.json").write_text("{}")
    assert runs.run(recipe, out, progress=False).exit_code == 0


@pytest.mark.parametrize("prices", ["shares", "quadratic"])
def test_damaged_state_is_made_anew_to_the_last_bit(prices, recipe, finished, out, tmp_path):
    """All kinds of files of the state, each damaged in another way."""
    if prices == "quadratic":
        text = recipe.read_text()
        recipe = tmp_path / "quadratic.yaml"
        recipe.write_text(text + "price: {prices: quadratic}\n")
        out = runs.run(recipe, tmp_path / "quadratic", progress=False).folder
        finished = Path(shutil.copytree(out, tmp_path / "finished"))
    state = out / "state"
    kinds: dict[str, Path] = {}
    for path in sorted(state.rglob("*")):
        kept = path.name in ("inputs.json", "complete") or path.parent.name == "certify"
        if path.is_file() and not kept:
            kind = re.sub(r"[0-9a-f]{6,}|\d+", "#", path.relative_to(state).as_posix())
            kinds.setdefault(kind, path)
    own = {"shares": {"rounds/#.json", "applied/#/#.safetensors"}}
    own["quadratic"] = {"solved/#.safetensors", "fisher.safetensors"}
    assert own[prices] < set(kinds) and len(kinds) > 10
    for i, path in enumerate(kinds.values()):
        list(DAMAGES.values())[i % len(DAMAGES)](path)
    # Files in each other's place, each as it was written.
    certify = sorted((state / "certify").glob("*.json"))
    assert len(certify) > 1 and certify[-1].name == "baseline.json"
    for path in certify:
        shutil.copyfile(finished / "state" / "certify" / "baseline.json", path)
    for name in ("report.json", "verdict.json", "plan.json"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    again = runs.run(recipe, out, progress=False)
    assert contents(out) == contents(finished) and again.exit_code == 0


def test_inputs_that_are_damaged_and_results_of_others_are_refused(recipe, finished, out, tmp_path):
    flip(out / "state" / "inputs.json", 0.5)
    assert "inputs.json" in refused("run", recipe, "--out", out, "--quiet")
    flip(out / "state" / "inputs.json", 0.5)
    # Of another seed, under the very names: not taken for its own.
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    there = runs.run(other, tmp_path / "elsewhere" / "there", progress=False).folder
    theirs = sorted((there / "state" / "rounds").glob("*.json"))[-1]
    own = sorted((out / "state" / "rounds").glob("*.json"))
    for path in own:
        shutil.copyfile(theirs, path)
    measured = sorted((out / "state" / "select").glob("*.json"))
    for path in measured:
        shutil.copyfile(there / "state" / "select" / "baseline.json", path)
    assert own and len(measured) > 2
    shutil.rmtree(out / "model")
    runs.run(recipe, out, progress=False)
    assert contents(out) == contents(finished)
    flip(theirs, 0.9)
    again = ["--out", tmp_path / "new", "--quiet", "--reuse", there]
    assert theirs.name in refused("run", other, *again)


@pytest.mark.parametrize("verb", ["run", "analyze"])
@pytest.mark.parametrize(
    "name", ["model/weights.bin", "report.html", "plan.json", "state/mine.json", "ledger.json"]
)
def test_foreign_files_are_refused_before_anything_is_read(verb, name, tmp_path):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        tiny.RECIPE.format(model=tmp_path / "none", files="x.txt", budget="budget: {max_drop: 0.2}")
    )
    said = refused(verb, recipe, "--out", tmp_path / "out", "--quiet")
    assert str(tmp_path / "out" / name.partition("/")[0]) in said and "none" not in said
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path.read_text() for path in left] == ["mine"]


def test_what_was_added_to_or_edited_in_a_runs_folder_stays(recipe, out):
    (out / "notes.txt").write_text("mine")
    assert runs.run(recipe, out, progress=False).exit_code == 0
    (out / "model" / "notes.txt").write_text("mine")
    (out / "report.html").write_text("mine")
    for verb in (("run", recipe, "--out", out, "--quiet"), ("report", out)):
        refused(*verb)
    (out / "state" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused("clean", out)
    for name in ("notes.txt", "model/notes.txt", "state/notes.txt", "report.html"):
        assert (out / name).read_text() == "mine"


def test_a_sealed_file_is_of_its_name_and_of_its_run(tmp_path):
    state = State(tmp_path, seal="a")
    state.write_json("a.json", [1.5, {"x": None}])
    state.write_tensors("a.safetensors", {"w": torch.arange(3), "e": torch.zeros(0).bfloat16()})
    assert state.read_json("a.json") == [1.5, {"x": None}]
    assert state.read_tensors("a.safetensors")["w"].tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "a.json").read_text())["content"] == [1.5, {"x": None}]
    for ending in ("json", "safetensors"):
        shutil.copyfile(tmp_path / f"a.{ending}", tmp_path / f"b.{ending}")
    for reader, name in ((state, "b"), (State(tmp_path, seal="b"), "a")):
        for ending, read in (("json", State.read_json), ("safetensors", State.read_tensors)):
            with pytest.raises(ValueError, match=rf"{name}\.{ending} is damaged"):
                read(reader, f"{name}.{ending}")
