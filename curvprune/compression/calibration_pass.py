"""One forward pass that stops at every layer, with all calibration tokens at hand.

A pre-hook on each layer sees the layer's inputs for all items at once, sums their second moment ``A
= E[x xᵀ]`` (layers that read the same tensor share it), hands it to a visitor that may overwrite
the weight, and lets the forward go on. Whatever the architecture, later layers then see what the
earlier ones have become. The pass ends before the last layer multiplies, so a language model's
logits over all tokens never exist.

If the uncompressed model runs beside it, layer by layer, the visitor also gets ``D = E[(x̃ − x)
xᵀ]`` with ``x̃`` what the uncompressed model has there: how far the inputs have drifted, and what
the layer can do about it.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from curvprune.compat import times_written
from curvprune.compression.moments import Moments, expert_moments, moments_of
from curvprune.model import Batch, Layer, Loss, evaluating, padding_mask

# What is called for a layer: given a function that computes the moments of its inputs.
Visitor = Callable[[Layer, Callable[[], Moments | None]], None]


class _Finished(Exception):
    """The last layer was visited; the rest of the forward pass is not needed."""


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    objective: Loss,
    batch: Batch,
    layers: Mapping[str, Layer],
    visit: Visitor,
    *,
    reference: tuple[nn.Module, Mapping[str, Layer]] | None = None,
) -> None:
    """Call ``visit(layer, moments)`` for every layer just before it runs.

    ``moments()`` computes those of the layer's inputs. It is lazy (a resumed run skips it) and
    returns ``None`` for embeddings that are only looked up; those are visited after the pass.
    Layers called several times are visited at their first call.

    Args:
        reference: the uncompressed model and its layers of the same names, for the drift. It costs
            a second forward pass (on the CPU both are then made with bfloat16 products) and one
            more Gram matrix for each input. Where the two models' inputs have different shapes (a
            router sent other tokens) there is no drift; stacked experts have none.

    Raises:
        ValueError: layers that the forward pass never reached, by name.
    """
    read = {name: layer for name, layer in layers.items() if layer.readers}
    mask = padding_mask(batch)
    weight = next(model.parameters())
    half = weight.dtype == torch.float32 and weight.device.type == "cpu"

    # 1. Start the uncompressed model, if there is one: it waits at its first layer.
    with _beside(reference, objective, batch, read, half=half) as beside, evaluating(model):
        stops = _Stops(read, visit, mask, beside)
        # 2. Run the model from stop to stop; the last one ends the pass.
        with _stopping(read.values(), stops.stop):
            _pass(model, objective, batch, half=half and beside is not None)

    # 3. Every layer that reads anything must have been there.
    if stops.pending:
        raise ValueError(
            f"the forward pass never reached {len(stops.pending)} layer(s), first "
            f"{next(iter(stops.pending))}: leave them out"
        )

    # 4. Embeddings that are looked up multiply nothing.
    for layer in layers.values():
        if not layer.readers:
            visit(layer, lambda: None)


@contextmanager
def _stopping(
    layers: Iterable[Layer],
    before: Callable[[Layer, nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None],
) -> Iterator[None]:
    """Call ``before(layer, module, arguments, named)`` whenever a layer's input is read.

    It may end the forward pass with `_Finished`.
    """
    handles: list[RemovableHandle] = []
    for layer in layers:
        for reader in layer.readers:
            hook = partial(before, layer)
            handles.append(reader.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    except _Finished:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Stops:
    """What is done at each layer of one pass."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        visit: Visitor,
        mask: Tensor | None,
        beside: _Beside | None,
    ) -> None:
        self.pending = dict(layers)
        self.visit, self.mask, self.beside = visit, mask, beside
        # The input last read, its version, and its moments.
        self.last: tuple[Tensor, int, Moments] | None = None

    def stop(
        self,
        layer: Layer,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        named: dict[str, Tensor],
    ) -> None:
        """Visit a layer that is about to read its input, unless it has been visited."""
        if layer.name not in self.pending:
            return
        inputs = (*arguments, *named.values())
        original = None
        if self.beside is not None and layer.kind != "experts":
            original = self.beside.input_of(layer.name)
        self.visit(layer, lambda: self._moments(layer, module, inputs, original))
        del self.pending[layer.name]
        if not self.pending:
            raise _Finished

    def _moments(
        self,
        layer: Layer,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        original: Tensor | None,
    ) -> Moments:
        x = inputs[0]
        if layer.kind == "experts":
            return expert_moments(layer, x, inputs[1], self.mask)
        # Two convolutions may unfold the same tensor differently.
        if layer.kind == "conv":
            return moments_of(layer, module, x, original, self.mask)
        if self.last is not None and self.last[0] is x and self.last[1] == times_written(x):
            return self.last[2]
        found = moments_of(layer, module, x, original, self.mask)
        self.last = (x, times_written(x), found)
        return found


class _Beside:
    """A forward pass of another model in a thread of its own, one layer ahead at most.

    Holds its inputs one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Loss,
        batch: Batch,
        layers: Mapping[str, Layer],
        *,
        half: bool,
    ) -> None:
        self.model, self.objective, self.batch = model, objective, batch
        self.layers, self.half = layers, half
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
            with _stopping(self.layers.values(), self._offer), evaluating(self.model):
                _pass(self.model, self.objective, self.batch, half=self.half)
        except Exception as error:  # `input_of` raises it in the thread of the caller
            self.error = error
        finally:
            if not self.stopped.is_set():
                self.inputs.put(None)

    def _offer(
        self,
        layer: Layer,
        _module: nn.Module,
        arguments: tuple[Tensor, ...],
        named: dict[str, Tensor],
    ) -> None:
        """Hand over a layer's input when the one before has been fetched."""
        if self.stopped.is_set():
            raise _Finished
        if layer.name in self.seen:
            return
        self.seen.add(layer.name)
        self.inputs.put((layer.name, arguments[0] if arguments else next(iter(named.values()))))
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
    objective: Loss,
    batch: Batch,
    read: Mapping[str, Layer],
    *,
    half: bool,
) -> Iterator[_Beside | None]:
    # The two models' routers send different tokens to an expert, whose target is known for the
    # common ones alone.
    compared = [name for name, layer in read.items() if layer.kind != "experts"]
    if reference is None or not compared:
        yield None
        return
    model, layers = reference
    beside = _Beside(model, objective, batch, {name: layers[name] for name in compared}, half=half)
    try:
        yield beside
    finally:
        beside.stop()


def _pass(model: nn.Module, objective: Loss, batch: Batch, *, half: bool) -> None:
    """A forward pass, with ``half`` in bfloat16 products: on the CPU twice as fast in half the
    memory.

    An error of 2⁻⁹ in an input is far below what the damping of its moment allows for, and the same
    in two models.
    """
    if not half:
        objective.outputs(model, batch)
        return
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            objective.outputs(model, batch)
    except RuntimeError:
        # An operation without bfloat16. No layer is visited twice.
        narrow = {
            weight: weight.data for weight in model.parameters() if weight.dtype == torch.bfloat16
        }
        try:
            for weight, data in narrow.items():
                weight.data = data.float()
            objective.outputs(model, batch)
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
        # Of a weight that is looked up as well, every bit counts.
        multiplied = layer.kind != "experts" and len(layer.readers) == 1 + len(layer.aliases)
        narrow = multiplied and weight.device.type == "cpu" and weight.dtype == torch.float32
        copied = weight.to(torch.bfloat16) if narrow else weight.clone()
        shared[id(layer.weight)] = nn.Parameter(copied, requires_grad=layer.weight.requires_grad)
    return copy.deepcopy(model, shared)
