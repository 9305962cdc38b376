"""One forward pass that stops at every layer, with all calibration tokens at hand.

Whoever reads a layer's weight, its module or a function (`curvprune.model.watching`), is stopped
just before it multiplies. The layer's inputs for all items are then at hand: their second moment
``A = E[x xᵀ]`` is summed (layers that read the same tensor share it) and goes to a visitor that may
overwrite the weight, and the forward goes on. Whatever the architecture, later layers then see what
the earlier ones have become. The pass ends before the last layer multiplies, so a language model's
logits over all tokens never exist.

If the uncompressed model runs beside it, layer by layer, the visitor also gets ``D = E[(x̃ − x)
xᵀ]`` with ``x̃`` what the uncompressed model has there: how far the inputs have drifted, and what
the layer can do about it.

A layer that one forward pass reads several times (blocks that share weights, loops) is visited at
its first read, with the moment of all reads in the uncompressed model, from a pass before.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvprune.compat import times_written
from curvprune.compression.moments import Moments, expert_moments, moments_of
from curvprune.model import (
    SEVERAL,
    Batch,
    Gathered,
    Layer,
    Loss,
    Read,
    evaluating,
    one_item,
    padding_mask,
    watching,
    weight_uses,
)

# What is called for a layer: given a function that computes the moments of its inputs.
Visitor = Callable[[Layer, Callable[[], Moments | None]], None]


class _Finished(Exception):
    """The last layer was visited; the rest of the forward pass is not needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visited:
    """What a pass has found.

    Attributes:
        unreached: layers that it never came to; the visitor was not called for them.
        repeated: layers that were read several times, visited with the moment of all reads.
        again: layers that were read once more after they had been visited for one read, which
            nothing had told before.
    """

    unreached: tuple[str, ...]
    repeated: tuple[str, ...]
    again: tuple[str, ...]


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    objective: Loss,
    batch: Batch,
    layers: Mapping[str, Layer],
    visit: Visitor,
    *,
    reference: tuple[nn.Module, Mapping[str, Layer]] | None = None,
    required: bool = True,
) -> Visited:
    """Call ``visit(layer, moments)`` for every layer just before it runs.

    ``moments()`` computes those of the layer's inputs. It is lazy (a resumed run skips it) and
    returns ``None`` for embeddings that are only looked up; those are visited after the pass.

    Args:
        reference: the uncompressed model and its layers of the same names, for the drift. It costs
            a second forward pass (on the CPU both are then made with bfloat16 products) and one
            more Gram matrix for each input. Where the two models' inputs have different shapes (a
            router sent other tokens) there is no drift; stacked experts have none, nor have layers
            that are read several times.
        required: raise where a layer is not reached.

    Cost: a forward pass of the first item says how often each layer is read; one of all items is
    added where some are read several times.

    Raises:
        ValueError: layers that the forward pass never reached, by name, if ``required``.
    """
    # 1. How the first item's forward pass uses the weights.
    whole = isinstance(batch, Gathered) and not batch.can_be_taken_apart
    first = batch if whole else one_item(batch, 0)
    uses = weight_uses(model, objective, [first], layers)
    read, repeated = {}, {}
    for name, layer in layers.items():
        if layer.readers or uses[name].calls:
            read[name] = layer
        if uses[name].calls > 1:
            repeated[name] = layer
    functions = any(use.functional or not use.reached for use in uses.values())
    mask = padding_mask(batch)
    weight = next(model.parameters())
    half = weight.dtype == torch.float32 and weight.device.type == "cpu"
    how = _How(objective=objective, batch=batch, half=half, functions=functions)
    sums = _Sums(mask, {name: uses[name].calls for name in repeated})
    if repeated:
        with evaluating(model), _stopping(repeated, sums, functions=functions):
            _pass(model, how, sums, half=False)

    # 2. Start the uncompressed model, if there is one: it waits at its first layer.
    compared = {name: layer for name, layer in read.items() if name not in repeated}
    with _beside(reference, how, compared) as beside, evaluating(model):
        stops = _Stops(read, visit, beside, sums)
        # 3. Run the model from stop to stop; the last one ends the pass.
        with _stopping(read, stops, functions=functions):
            _pass(model, how, stops, half=half and beside is not None)

    # 4. Every layer that reads anything must have been there.
    if stops.pending and required:
        raise ValueError(
            f"the forward pass never reached {len(stops.pending)} layer(s), first "
            f"{next(iter(stops.pending))}: leave them out"
        )

    # 5. Embeddings that are looked up multiply nothing.
    for name, layer in layers.items():
        if name not in read:
            visit(layer, lambda: None)
    return Visited(
        unreached=tuple(stops.pending), repeated=tuple(repeated), again=tuple(stops.again)
    )


class _Watcher:
    """Looks at products alone."""

    def read(self, read: Read) -> None:
        raise NotImplementedError

    def use(self, name: str, function: str) -> None:
        """Lookups and unknown functions have no input that counts."""

    def restart(self) -> None:
        """The pass starts again from the beginning."""


@contextmanager
def _stopping(layers: Mapping[str, Layer], watcher: _Watcher, *, functions: bool) -> Iterator[None]:
    """Tell ``watcher`` whenever a layer's input is read. It may end the forward pass with
    `_Finished`."""
    with watching(layers.values(), watcher, functions=functions), suppress(_Finished):
        yield


class _Sums(_Watcher):
    """The moments of layers that are read several times, over all their reads.

    Attributes:
        left: layer → reads that are still to come.
    """

    def __init__(self, mask: Tensor | None, left: Mapping[str, int]) -> None:
        self.left, self.inputs = dict(left), _Inputs(mask)
        self.parts: dict[str, list[Moments]] = {name: [] for name in left}
        # Stacked experts share what they have seen: tokens, and who reads them.
        self.routed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def read(self, read: Read) -> None:
        """Take in one read; the last one ends the pass."""
        name = read.layer.name
        if read.layer.kind == "experts":
            self.routed.setdefault(name, []).append((read.inputs[0], read.inputs[1]))
        else:
            self.parts[name].append(self.inputs.moments(read, None))
        self.left[name] -= 1
        if all(left <= 0 for left in self.left.values()):
            raise _Finished

    def of(self, layer: Layer) -> Moments:
        """The moment of all reads."""
        if layer.kind != "experts":
            return Moments.over(self.parts[layer.name])
        tokens, chosen = zip(*self.routed[layer.name], strict=True)
        mask = self.inputs.mask
        if mask is not None:
            mask = mask.reshape(-1).repeat(len(tokens))
        return expert_moments(layer, torch.cat(tokens), torch.cat(chosen), mask)


def _multiplied(read: Read, mask: Tensor | None) -> Tensor:
    """What a weight multiplies: what its module reads, or of a recurrent one its states too."""
    if read.layer.kind == "recurrent":
        return read.layer.recurrent_rows(read.reader, read.inputs, {}, mask)
    found: Tensor = read.inputs[0]
    return found


class _Inputs:
    """Computes moments; layers that read one tensor share them."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        # The input last read, its version, and its moments.
        self.last: tuple[Tensor, int, Moments] | None = None

    def moments(self, read: Read, original: Tensor | None) -> Moments:
        layer, x = read.layer, _multiplied(read, self.mask)
        if layer.kind == "experts":
            return expert_moments(layer, x, read.inputs[1], self.mask)
        # Two convolutions may unfold the same tensor differently.
        if layer.convolves:
            return moments_of(layer, read.reader, x, original, self.mask)
        if self.last is not None and self.last[0] is x and self.last[1] == times_written(x):
            return self.last[2]
        found = moments_of(layer, read.reader, x, original, self.mask)
        self.last = (x, times_written(x), found)
        return found


class _Stops(_Watcher):
    """What is done at each layer of one pass."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        visit: Visitor,
        beside: _Beside | None,
        sums: _Sums,
    ) -> None:
        self.layers, self.pending = layers, dict(layers)
        self.visit, self.beside, self.sums = visit, beside, sums
        self.inputs = _Inputs(sums.inputs.mask)
        self.again: set[str] = set()
        self.earlier: set[str] = set()  # visited before the pass started again

    def read(self, read: Read) -> None:
        """Visit a layer whose input is about to be read, unless it has been visited."""
        name = read.layer.name
        layer = self.layers[name]
        if name in self.earlier:
            self.earlier.remove(name)
            return
        if name not in self.pending:
            if name not in self.sums.left:
                self.again.add(name)
            return
        original = None
        if self.beside is not None and name in self.beside.layers:
            original = self.beside.input_of(name)

        def moments() -> Moments:
            if name in self.sums.left:
                return self.sums.of(layer)
            return self.inputs.moments(read, original)

        self.visit(layer, moments)
        del self.pending[name]
        if not self.pending:
            raise _Finished

    def restart(self) -> None:
        self.earlier = set(self.layers) - set(self.pending)


@dataclass(frozen=True, kw_only=True, slots=True)
class _How:
    """What two forward passes of one batch have in common."""

    objective: Loss
    batch: Batch
    half: bool
    functions: bool


class _Beside(_Watcher):
    """A forward pass of another model in a thread of its own, one layer ahead at most.

    Holds its inputs one by one.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], how: _How) -> None:
        self.model, self.layers, self.how = model, layers, how
        # A layer's name and input; None at the end.
        self.inputs: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(maxsize=1)
        self.stopped, self.over = threading.Event(), False
        self.skipped: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="uncompressed model", daemon=True)
        self.thread.start()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            how = self.how
            with (
                _stopping(self.layers, self, functions=how.functions),
                evaluating(self.model),
            ):
                _pass(self.model, how, self, half=how.half)
        except Exception as error:  # `input_of` raises it in the thread of the caller
            self.error = error
        finally:
            if not self.stopped.is_set():
                self.inputs.put(None)

    def read(self, read: Read) -> None:
        """Hand over a layer's input when the one before has been fetched."""
        if self.stopped.is_set():
            raise _Finished
        name = read.layer.name
        if name in self.seen:
            return
        self.seen.add(name)
        self.inputs.put((name, _multiplied(read, padding_mask(self.how.batch))))
        # The rest, a language model's logits for one, is not needed.
        if len(self.seen) == len(self.layers):
            raise _Finished

    def input_of(self, name: str) -> Tensor | None:
        """The layer's input there, or ``None`` if the pass has ended without it.

        Raises what ended the pass.
        """
        while name not in self.skipped and not self.over:
            found = self.inputs.get()
            if found is None:
                self.over = True
            elif found[0] == name:
                return found[1]
            else:
                self.skipped[found[0]] = found[1]
        if self.error is not None:
            raise RuntimeError(
                f"the uncompressed model failed before layer {name}: {self.error}"
            ) from self.error
        return self.skipped.pop(name, None)

    def stop(self) -> None:
        """End the pass at its next layer."""
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.inputs.get(timeout=0.05)
            except queue.Empty:
                continue


@contextmanager
def _beside(
    reference: tuple[nn.Module, Mapping[str, Layer]] | None,
    how: _How,
    read: Mapping[str, Layer],
) -> Iterator[_Beside | None]:
    # The two models' routers send different tokens to an expert, whose target is known for the
    # common ones alone.
    compared = [name for name, layer in read.items() if layer.kind != "experts"]
    if reference is None or not compared:
        yield None
        return
    model, layers = reference
    beside = _Beside(model, {name: layers[name] for name in compared}, how)
    try:
        yield beside
    finally:
        beside.stop()


def _pass(model: nn.Module, how: _How, watcher: _Watcher, *, half: bool) -> None:
    """A forward pass, with ``half`` in bfloat16 products: on the CPU twice as fast in half the
    memory.

    An error of 2⁻⁹ in an input is far below what the damping of its moment allows for, and the same
    in two models.
    """
    if not half:
        how.objective.outputs(model, how.batch)
        return
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            how.objective.outputs(model, how.batch)
    except RuntimeError:
        # An operation without bfloat16. No layer is visited twice.
        watcher.restart()
        narrow = {
            weight: weight.data for weight in model.parameters() if weight.dtype == torch.bfloat16
        }
        try:
            for weight, data in narrow.items():
                weight.data = data.float()
            how.objective.outputs(model, how.batch)
        finally:
            for weight, data in narrow.items():
                weight.data = data


def coarse_copy(model: nn.Module, layers: Mapping[str, Layer]) -> nn.Module:
    """A copy of the model, to run beside it while the weights of ``layers`` are overwritten.

    It shares all other tensors, and holds those weights in the precision in which they will be
    multiplied (see `_pass`).
    """
    shared: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for layer in layers.values():
        weight = layer.weight.detach()
        # Of a weight that is looked up as well, every bit counts; kernels take all in one type.
        multiplied = layer.kind not in SEVERAL and len(layer.readers) == 1 + len(layer.aliases)
        narrow = multiplied and weight.device.type == "cpu" and weight.dtype == torch.float32
        copied = weight.to(torch.bfloat16) if narrow else weight.clone()
        shared[id(layer.weight)] = nn.Parameter(copied, requires_grad=layer.weight.requires_grad)
    return copy.deepcopy(model, shared)
