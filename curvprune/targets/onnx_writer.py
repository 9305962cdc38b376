"""Write an artifact as one ONNX file, which ONNX Runtime runs without torch.

Rounded Linear layers and embeddings keep their codes (`curvprune.targets.onnx_blocks`); everything
else is dense. The file is run before it gets its name, and must give what the model gives.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvprune.artifact import (
    MANIFEST,
    Stored,
    coded_layers,
    is_transformers,
    load_artifact,
    load_into,
    read_manifest,
)
from curvprune.compat import quiet_libraries, quiet_onnx
from curvprune.files import where_it_lies
from curvprune.model import Layer, find_layers
from curvprune.options import option_from_key, quantizer_of, stored_dtype
from curvprune.targets.onnx_blocks import block_tensors
from curvprune.targets.onnx_graph import (
    forget_sources_,
    name_axes_,
    narrow_,
    put_blocks_,
    set_accuracy_,
)
from curvprune.targets.onnx_inputs import Axes, Example, Traced, example_for, example_of
from curvprune.targets.onnx_package import import_onnx_ir, import_onnxruntime
from curvprune.targets.onnx_recover import recovered
from curvprune.targets.onnx_table import HELD

LARGEST = 1 << 31  # bytes; protobuf reads no larger file
TOLERANCE, MOST = 1e-4, 1e-3  # of the norm of an output
LEVELS = (0, 1, 4)


def export_onnx(
    folder: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor | None = None,
    axes: Mapping[str, Axes] | None = None,
    cache: bool = True,
    accuracy_level: int = 0,
) -> Path:
    """Write a saved artifact once more, as an ONNX file for ONNX Runtime.

    Every weight of the file is the artifact's, exactly: ``(code − zero) · scale`` where it is
    packed, computed in float32. The written file is run on examples in ONNX Runtime and compared
    with the model in torch, in float32; it gets its name if each output differs by at most 1e-4 of
    its norm, or by what torch's float32 itself is off, up to 1e-3. Cost:
    tracing in torch, 10 s for 22 million weights, two minutes for 135 million.

    Args:
        folder: what ``Result.save`` or a run (``model/``) wrote, portable or not. A portable folder
            holds rounded embeddings as floats; they become codes again where that is exact.
        out: the new file, ``*.onnx``. Beyond 2 GB its tensors lie beside it, in ``*.onnx.data``.
        model: your own module of the uncompressed architecture; not for models of transformers.
        inputs: what to trace the model with, by name or in order. Models of transformers that take
            texts or images need none.
        axes: axes of each input that may be of any length, for example ``{"x": {0: "batch"}}``.
            By default those are the first, and the second of tokens.
        cache: of causal language models: inputs ``past_key_values.0.key``, … and outputs
            ``present.0.key``, …, for generation token by token.
        accuracy_level: 0: products in float32. 4: ONNX Runtime rounds the inputs of packed layers
            to eight bits in blocks. That is faster, mostly for 2 and 8 bits, and no longer exact.

    Returns:
        ``out``.

    Raises:
        ValueError: not an artifact, or a damaged one; a model that torch cannot trace; inputs that
            are not known; ``out`` is there already; ONNX Runtime gives something else than torch.
    """
    folder, out = where_it_lies(Path(folder)), Path(out)
    _check_arguments(out, accuracy_level)
    ir = import_onnx_ir()
    import_onnxruntime()
    # 1. The model in float32, with the very values of its codes.
    opened = _opened(folder, model)
    example = _example(opened.model, inputs, axes, cache=cache)
    traced = Traced(opened.model, example).eval()
    # 2. Its graph, with packed layers in the places of dense ones.
    graph = _graph_of(traced, example)
    _pack_(graph, opened)
    # 3. The file, under another name until it has given what the model gives.
    fresh = out.with_name(f".{out.name}.new-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh.mkdir()
    try:
        path = fresh / out.name
        _write(ir, graph, path)
        check_outputs(path, traced, example)
        if accuracy_level:
            set_accuracy_(graph, accuracy_level)
            _write(ir, graph, path)
        _take_place(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def _check_arguments(out: Path, accuracy_level: int) -> None:
    if out.suffix.lower() != ".onnx":
        raise ValueError(f"{out}: expected the name of a new file that ends in .onnx")
    for path in (out, _data_of(out)):
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} is there already; export into a new file")
    if accuracy_level not in LEVELS:
        raise ValueError(
            f"accuracy_level={accuracy_level!r}: expected 0 (exact) or 4 (inputs rounded to eight "
            "bits)"
        )


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _example(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor | None,
    axes: Mapping[str, Axes] | None,
    *,
    cache: bool,
) -> Example:
    """The inputs that were given, or those that are known for a model of transformers."""
    if inputs is not None:
        return example_of(inputs, axes)
    if is_transformers(model):
        return example_for(model, cache=cache)
    raise ValueError(
        f"inputs: expected inputs of {type(model).__name__} to trace it with, by name or in a "
        "list; a model of your own needs them"
    )


# ------------------------------------------------------------------------------------- the artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """An artifact's model in float32, its layers, and the types its tensors are stored in."""

    folder: Path
    model: nn.Module
    layers: Mapping[str, Layer]
    types: Mapping[str, torch.dtype]


def _opened(folder: Path, model: nn.Module | None) -> _Opened:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not an artifact: it lacks {MANIFEST}")
    foreign = (folder / "config.json").is_file()
    if not foreign and model is None:
        raise ValueError(
            f"{folder} is of a module of your own; pass model=, an instance of its class"
        )
    # 1. As it was saved; nothing of the user's is changed.
    if model is not None:
        loaded = load_into(folder, copy.deepcopy(model))
    else:
        with quiet_libraries():
            loaded = load_artifact(folder)
    types = {key: value.dtype for key, value in loaded.state_dict().items()}
    for name, one in read_manifest(folder).layers.items():
        layer, option = find_layers(loaded, name)[name], option_from_key(one.option)
        if quantizer_of(option) is None:
            dtype = getattr(torch, stored_dtype(option, layer.dtype))
            types |= dict.fromkeys(layer.keys, dtype)
    # 2. In float32, where codes give values that 16 bits would round.
    loaded = loaded.float().eval()
    return _Opened(folder=folder, model=loaded, layers=find_layers(loaded), types=types)


# ---------------------------------------------------------------------------------------- the graph


def _graph_of(traced: Traced, example: Example) -> Any:
    """The model's graph as torch exports it, in which initializers have the model's names."""
    tensors, dynamic = list(example.batches[0]), torch.export.Dim.DYNAMIC
    shapes = [dict.fromkeys(axes, dynamic) for axes in example.axes]
    with torch.no_grad():
        names = list(traced.outputs(tensors))
    try:
        with quiet_onnx(), torch.no_grad():
            program = torch.onnx.export(
                traced,
                (tensors,),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(example.names),
                output_names=names,
                dynamic_shapes=(shapes,),
            )
    except Exception as error:
        # The exporter's own errors are of many kinds, and name the step that failed in one line.
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"model: torch.onnx.export cannot write {type(traced.model).__name__} "
            f"({type(error).__name__}: {why}); pass other inputs=, or axes= with fewer axes"
        ) from error
    assert program is not None
    graph = program.model
    for name in list(graph.graph.initializers):
        # Of the module around it.
        if name.startswith("model."):
            graph.graph.initializers[name].name = name.removeprefix("model.")
    name_axes_(graph, example.axes)
    forget_sources_(graph)
    return graph


def _coded(opened: _Opened) -> dict[str, Stored]:
    """The layers that the artifact holds as codes, and as floats whose codes are found again."""
    found = coded_layers(opened.folder, opened.model)
    for name, entry in read_manifest(opened.folder).layers.items():
        quantize, layer = quantizer_of(option_from_key(entry.option)), opened.layers[name]
        if quantize is None or name in found or layer.kind not in HELD:
            continue
        again = recovered(layer.as_matrix(layer.weight.detach()), quantize)
        if again is not None:
            found[name] = again
    return found


def _pack_(graph: Any, opened: _Opened) -> None:
    """Codes in the places of dense weights, and all else in the types that it is stored in."""
    dense = []
    for name, stored in _coded(opened).items():
        layer = opened.layers[name]
        tensors = block_tensors(stored) if layer.kind in HELD else None
        # The model is what the file is compared with: it has the codes' own values.
        layer.write_(stored.weight())
        if tensors is None or not put_blocks_(
            graph, layer.keys, tensors, transposed=layer.transposed
        ):
            dense.append(name)
    packable = [name for name in dense if opened.layers[name].kind in HELD]
    if packable:
        more = f" and {len(packable) - 1} more" if len(packable) > 1 else ""
        warnings.warn(
            f"layer {packable[0]}{more}: written dense, as ONNX Runtime has no exact form for its "
            "codes there; groups of 16, 32, 64, 128 or 256 have one",
            UserWarning,
            stacklevel=3,
        )
    held: dict[str, Tensor] = {}
    for key, tensor in opened.model.state_dict().items():
        dtype = opened.types[key]
        if dtype in (torch.float16, torch.bfloat16):
            short = tensor.to(dtype)
            if torch.equal(short.float(), tensor):
                held[key] = short
    narrow_(graph, held)


# ----------------------------------------------------------------------------------------- the file


def _write(ir: Any, graph: Any, path: Path) -> None:
    """All in one file, or the tensors beside it where that would be too large."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    beside = _data_of(path).name if size > LARGEST - (1 << 27) else None
    path.unlink(missing_ok=True)
    ir.save(graph, path, external_data=beside)


def _take_place(fresh: Path, out: Path) -> None:
    """The tensors first: a file that is there is whole."""
    for path in (_data_of(out), out):
        written = fresh / path.name
        if written.exists():
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.rename(path)


def session_of(path: Path, *, threads: int = 0) -> Any:
    """An ONNX Runtime session of a file on the CPU; ``threads`` 0 leaves their number to it."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_outputs(path: Path, traced: Traced, example: Example) -> None:
    """Raise ``ValueError`` naming the output that ONNX Runtime gives otherwise than torch, on any
    of the examples.

    An output may be farther from torch's than 1e-4 of its norm, up to 1e-3, only where torch's own
    is nearly as far from what it is in float64: some models enlarge every rounding.
    """
    session = session_of(path, threads=torch.get_num_threads())
    read = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    for tensors in example.batches:
        with torch.no_grad():
            expected = traced(list(tensors))
        feeds = {}
        for name, tensor in zip(example.names, tensors, strict=True):
            if name in read:
                feeds[name] = tensor.numpy()
        given = session.run(names, feeds)
        errors = [_difference(a, b.numpy()) for a, b in zip(given, expected, strict=True)]
        allowed = [TOLERANCE] * len(errors)
        if not max(errors) <= TOLERANCE:
            errors, allowed = _beside_float64(traced, tensors, given, expected)
        for name, error, most in zip(names, errors, allowed, strict=True):
            if not error <= most:
                shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in list(feeds.items())[:3])
                raise ValueError(
                    f"{type(traced.model).__name__}: output {name} differs by {error:.1e} of its "
                    f"norm between ONNX Runtime and torch ({shapes}); no file is left. Export it "
                    "dense (curvprune export --target dense) for another converter"
                )


@torch.no_grad()
def _beside_float64(
    traced: Traced, tensors: Sequence[Tensor], given: Sequence[Any], expected: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """How far outputs are from those in float64, and how far they may be: twice as far as torch's
    in float32, if that is more than `TOLERANCE`; never more than `MOST`."""
    wide = copy.deepcopy(traced).double()
    doubled = [one.double() if one.is_floating_point() else one for one in tensors]
    errors, allowed = [], []
    for got, narrow, exact in zip(given, expected, wide(doubled), strict=True):
        # In the type that is compared, so that only values count.
        want = exact.to(narrow.dtype).numpy()
        errors.append(_difference(got, want))
        own = min(2 * _difference(narrow.numpy(), want), MOST)
        allowed.append(max(TOLERANCE, own))
    return errors, allowed


def _difference(got: Any, expected: Any) -> float:
    """‖got − expected‖ / ‖expected‖; infinite where shapes or what is not finite differ."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not np.issubdtype(got.dtype, np.floating):
        return 0.0 if np.array_equal(got, expected) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    a, b = got[finite].astype(np.float64), expected[finite].astype(np.float64)
    size = float(np.linalg.norm(b))
    off = float(np.linalg.norm(a - b))
    return off / size if size else off
