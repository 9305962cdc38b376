"""Every way to fail has one sentence and the exit code of its kind: 2 bad input, 3 the machine, 70
a mistake of ours, 130 and 143 interrupted; never 1, which is a verdict."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import curvprune
from curvprune import run as runs
from curvprune.cli import app
from curvprune.failures import Terminated, failure_of, one_line, tensors_error
from curvprune.model import ShapeChange, reshape_
from curvprune.places import check_regular, only_here
from curvprune.run import RecipeError, documents_of, package_folder
from tests import tiny


def caught(raises: Callable[[], object]) -> BaseException:
    try:
        raises()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def no_space(path: str = "/a/file") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def wrapped() -> None:
    try:
        raise no_space()
    except OSError as error:
        raise RecipeError("model: it cannot be written") from error


def nested_without_end() -> None:
    nested_without_end()


# ------------------------------------------------------------ kinds of failures


@pytest.mark.parametrize(
    ("raises", "code", "words"),
    [
        (lambda: int("x"), 2, "invalid literal"),
        (lambda: Path("/no/such/file").read_text(), 2, "/no/such/file: No such file"),
        (lambda: 1 / 0, 2, "division by zero"),
        (nested_without_end, 2, "nested too deeply"),
        (lambda: (_ for _ in ()).throw(no_space()), 3, "/a/file: No space left on device; make"),
        (wrapped, 3, "cannot be written; make room"),
        (lambda: bytearray(1 << 62), 3, "memory"),
        (lambda: torch.empty(1 << 60), 3, "allocate"),
        (lambda: {}["x"], 70, "internal error: KeyError at tests"),
        (lambda: None.x, 70, "report it"),  # type: ignore[attr-defined]
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), 130, "interrupted; run it again"),
        (lambda: (_ for _ in ()).throw(Terminated()), 143, "SIGTERM"),
    ],
)
def test_the_code_and_the_words_of_a_kind(raises, code, words):
    failure = failure_of(caught(raises))
    assert failure.code == code, failure
    assert words.replace("tests", "an unknown place") in failure.text
    assert "\n" not in failure.text


def test_what_resumes_says_so():
    said = failure_of(KeyboardInterrupt(), resumes=True).text
    assert said == "interrupted; run the same command again to go on from here"
    assert "go on from here" in failure_of(no_space(), resumes=True).text


def test_a_text_of_megabytes_is_one_short_line():
    text = one_line("start\n\n" + "x\n" * 3_000_000 + "end")
    assert len(text) < 800 and text.startswith("start x") and text.endswith("x end")
    assert one_line(" a \n b ") == "a b"


def test_errors_of_tensor_files_say_which_file_and_whose_fault(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    damaged = tensors_error(caught(lambda: load_file(path)), path)
    assert isinstance(damaged, ValueError) and f"{path} is damaged" in str(damaged)
    # In the words of safetensors, which has no other way to say it.
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    told = tensors_error(full, path)
    assert isinstance(told, OSError) and told.errno == errno.ENOSPC
    assert told.filename == str(path) and failure_of(told).code == failure_of(full).code == 3


# ------------------------------------------------------------ the command line


def test_arguments_that_are_wrong_exit_with_2(tmp_path):
    for arguments in (["run"], ["no-such-command"], ["check", "a.yaml", "--no-such-option"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
    for command in ("run", "analyze", "check"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "none.yaml")])
        assert result.exit_code == 2 and "no such file" in result.output
    for arguments in (["report", str(tmp_path)], ["clean", str(tmp_path)]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
    for form in ("gptq", "dense"):
        arguments = ["export", str(tmp_path), str(tmp_path / "new"), "--format", form]
        assert CliRunner().invoke(app, arguments).exit_code == 2


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "curvprune", *map(str, arguments)]


def test_output_that_cannot_be_written_is_the_machines_fault():
    with open("/dev/full", "w") as full:
        version = subprocess.Popen(
            command("--version"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    helped = subprocess.Popen(
        command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert helped.stdout is not None
    helped.stdout.close()
    for started, words in ((version, "No space left"), (helped, "output was closed")):
        assert started.stderr is not None
        said = started.stderr.read()
        assert started.wait() == 3 and words in said and "Traceback" not in said


def in_a_child(work: Callable[[], object], out: Path) -> int:
    """The process that does it, its standard error in a file."""
    child = os.fork()
    if child == 0:
        code = 99
        # Tests that a shell runs in the background ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with out.open("w") as said, contextlib.redirect_stderr(said):
                work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_that_it_resumes(number, code, tmp_path):
    recipe, out = tiny.write_recipe(tmp_path), tmp_path / "out"
    arguments = ["run", str(recipe), "--out", str(out), "--quiet"]
    child = in_a_child(lambda: app(arguments), tmp_path / "said")
    while not list(out.glob("state/applied/*/*")):
        time.sleep(0.01)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    said = (tmp_path / "said").read_text()
    assert os.waitstatus_to_exitcode(status) == code, said
    assert "run the same command again to go on from here" in said and "Traceback" not in said
    # It has given the folder back, and goes on.
    assert runs.run(recipe, out, progress=False).exit_code == 0


# ------------------------------------------------------------ one process in a folder


def test_two_processes_do_not_share_a_run_folder(tmp_path):
    recipe, out = tiny.write_recipe(tmp_path), tmp_path / "out"
    with only_here(out):
        child = in_a_child(
            lambda: app(["run", str(recipe), "--out", str(out), "--quiet"]), tmp_path / "said"
        )
        _, status = os.waitpid(child, 0)
        said = (tmp_path / "said").read_text()
        assert os.waitstatus_to_exitcode(status) == 2
        assert f"process {os.getpid()} on" in said and "give --out another folder" in said
    assert not out.exists(), "it was new, and nothing was done there"


def test_a_process_that_dies_gives_the_folder_back(tmp_path):
    def wait() -> None:
        with only_here(tmp_path / "out"):
            (tmp_path / "in").touch()
            time.sleep(60)

    child = in_a_child(wait, tmp_path / "said")
    while not (tmp_path / "in").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process"), only_here(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with only_here(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


# ------------------------------------------------------------ found before any long computation


@pytest.mark.parametrize("name", ["model", "state", "report.html", "plan.json"])
def test_a_link_or_another_kind_of_thing_in_a_files_place_is_refused_first(name, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: none, task: causal-lm}\ndata: {source: python-docs}\n"
        'compress: [{layers: "*", options: [keep]}]\n'
    )
    (out / name).symlink_to(elsewhere)
    with pytest.raises(RecipeError, match=rf"{name} is a link.*give --out a new folder"):
        runs.run(recipe, out, progress=False)
    (out / name).unlink()
    if "." in name:
        (out / name).mkdir()
    else:
        (out / name).touch()
    with pytest.raises(RecipeError, match=rf"{name} is not a f.*give --out a new folder"):
        runs.analyze(recipe, out, progress=False)
    assert sorted(out.iterdir()) == [out / name]


def test_weights_that_are_no_numbers_are_found_first_and_named_with_their_file(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    file = tmp_path / "tiny" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for value, kind in ((float("nan"), "NaN"), (float("inf"), "infinite values")):
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, file, metadata=metadata)
        for verb in (
            lambda: runs.check(recipe),
            lambda: runs.run(recipe, tmp_path / "out", progress=False),
        ):
            error = caught(verb)
            assert isinstance(error, RecipeError) and error.line == 2
            assert f"{file}: tensor 'model.layers.1.mlp.up_proj.weight' holds {kind}" in str(error)
    assert not (tmp_path / "out").exists()


def test_pipes_and_damaged_files_of_a_model_are_one_sentence(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    model = tmp_path / "tiny"
    text = (model / "config.json").read_text()
    for damage in ("{", "[]", "null", "[" * 100_000, text.replace("32", "null"), '{"a": 1}'):
        (model / "config.json").write_text(damage)
        result = CliRunner().invoke(app, ["check", str(recipe)])
        assert result.exit_code == 2, (damage[:20], result.output)
    (model / "config.json").write_text(text)
    (model / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 2 and "tokenizer of" in result.output
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(RecipeError, match=r"tokenizer\.json is a pipe"):
        runs.check(recipe)


def test_a_pipe_among_the_data_files_is_refused(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    path = tmp_path / "texts" / "document0.txt"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecipeError, match=r"document0\.txt is a pipe; expected an ordinary file"):
        runs.check(recipe)
    with pytest.raises(ValueError, match="is a device"):
        check_regular(Path("/dev/zero"))


def test_a_column_that_a_data_set_does_not_have_is_named_with_those_that_it_has():
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert documents_of(rows, column="text", limit=1) == {"row 0": "a"}
    with pytest.raises(ValueError, match=r"no column 'body'; expected one of text, label"):
        documents_of(rows, column="body", limit=2)
    with pytest.raises(ValueError, match=r"column 'label' of row 0 holds int, expected text"):
        documents_of(rows, column="label", limit=2)


@pytest.mark.parametrize("package", ["nowhere", "nowhere.inside", "json.nowhere", "json.decoder.x"])
def test_a_package_that_is_not_there_is_named_without_importing_its_parents(package):
    with pytest.raises(ValueError, match=rf"'{package}' is not installed"):
        package_folder(package)
    assert package_folder("xml.etree").name == "etree"


def test_another_number_of_threads_is_said_and_does_not_refuse(tmp_path):
    recipe, out = tiny.write_recipe(tmp_path), tmp_path / "out"
    runs.check(recipe)
    threads = torch.get_num_threads()
    (tmp_path / "texts2").mkdir()
    analysed = recipe.read_text() + "analyze: {matrix: ggn, items: 2, spectra: false}\n"
    recipe.write_text(analysed)
    runs.analyze(recipe, out, progress=False)
    torch.set_num_threads(threads + 1)
    try:
        record = runs.run(recipe, out, progress=False).record
    finally:
        torch.set_num_threads(threads)
    assert record is not None
    said = f"the run began with {threads} threads and went on with {threads + 1}"
    assert any(note.startswith(said) for note in record.notes)


def test_a_weight_beyond_float16_is_found_before_any_layer_is_solved(tmp_path):
    recipe, file = tiny.write_recipe(tmp_path), tmp_path / "tiny" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][7, 1] = 7e4
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(RecipeError, match=r"model\.embed_tokens: option float16: weights overflow"):
        runs.check(recipe)


def test_the_verbs_name_weights_that_are_no_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    data = [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(4)]
    with torch.no_grad():
        model[1].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"tensor '1\.weight' of the model holds NaN"):
        curvprune.quantize(model, data, bits=4, loss="classification")


def test_shapes_that_grow_are_refused_before_memory_is_taken():
    change = ShapeChange(shapes={"0.weight": [1 << 21, 1 << 21]}, attributes={})
    with pytest.raises(ValueError, match=r"0\.weight of Sequential is \(8, 8\) and would become"):
        reshape_(torch.nn.Sequential(torch.nn.Linear(8, 8)), change)
