"""One forward pass that stops at every layer, with all calibration tokens at hand.

A pre-hook on each layer sees the layer's inputs for all items at once, sums their second moment ``A
= E[x xᵀ]`` in chunks (layers that read the same tensor share it), hands it to a visitor that may
overwrite the weight, and lets the forward go on. Whatever the architecture, later layers then see
what the earlier ones have become. The pass ends before the last layer multiplies, so a language
model's logits over all tokens never exist.

If the uncompressed model runs beside it, layer by layer, the visitor also gets ``D = E[(x̃ − x)
xᵀ]`` with ``x̃`` what the uncompressed model has there: how far the inputs have drifted, and what
the layer can do about it.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Objective, evaluating

_BLOCK = 192  # columns of a block of a Gram matrix
_NARROW = 256  # inputs from which products in 8 bits pay
# input rows per update of a Gram matrix: bounds the memory of unfolded convolutions and upcasts
_ROWS = 4096
# Tokens of the average expert, for each input, that count beside an expert's own;
# `benchmarks/experts.py` tried others.
_BORROWED = 0.5


class _Finished(Exception):
    """The last layer was visited; the rest of the forward pass is not needed."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What a layer's inputs are on average.

    Attributes:
        second: ``E[x xᵀ]``.
        drift: ``E[(x̃ − x) xᵀ]`` against the uncompressed model's inputs ``x̃``; ``None`` if equal
            or unknown.
        mean: ``E[x]``.
        moved: ``E[x̃ − x]``, where there is a drift.
        notes: what the report must say about them.
    """

    second: Float[Tensor, "groups in in"]
    drift: Float[Tensor, "groups in in"] | None = None
    mean: Float[Tensor, "groups in"] | None = None
    moved: Float[Tensor, "groups in"] | None = None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    layers: Mapping[str, Layer],
    visit: Callable[[Layer, Callable[[], Moments | None]], None],
    *,
    reference: tuple[nn.Module, Mapping[str, Layer]] | None = None,
) -> None:
    """Call ``visit(layer, moments)`` for every layer just before it runs; ``moments()`` computes
    those of its inputs.

    ``moments()`` is lazy (a resumed run skips it) and returns ``None`` for embeddings that are only
    looked up; those are visited after the pass. Layers called several times are visited at their
    first call.

    Args:
        reference: the uncompressed model and its layers of the same names, for the drift. It costs
            a second forward pass (on the CPU both are then made with bfloat16 products) and one
            more Gram matrix for each input. Where the two models' inputs have different shapes (a
            router sent other tokens) there is no drift; stacked experts have none.

    Raises:
        ValueError: layers that the forward pass never reached, by name.
    """
    pending = {name: layer for name, layer in layers.items() if layer.readers}
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    shared: dict[str, tuple[Tensor, int, Moments]] = {}

    def before(
        layer: Layer,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        named: dict[str, Tensor],
        beside: _Beside | None,
    ) -> None:
        if layer.name not in pending:
            return
        x, *others = (*arguments, *named.values())
        original = (
            None if beside is None or layer.kind == "experts" else beside.input_of(layer.name)
        )

        def moments() -> Moments:
            if layer.kind == "experts":
                return _expert_moments(layer, x, others[0], mask)
            known = shared.get("last")
            if (
                layer.kind != "conv"
                and known is not None
                and known[0] is x
                and known[1] == x._version
            ):
                return known[2]
            value = _moments(layer, module, x, original, mask)
            if layer.kind != "conv":  # two convolutions may unfold the same tensor differently
                shared["last"] = (x, x._version, value)
            return value

        visit(layer, moments)
        del pending[layer.name]
        if not pending:
            raise _Finished

    weight = next(model.parameters())
    half = weight.dtype == torch.float32 and weight.device.type == "cpu"
    with _beside(reference, objective, batch, pending, half=half) as beside, evaluating(model):
        handles = [
            reader.register_forward_pre_hook(
                lambda module, args, named, layer=layer: before(layer, module, args, named, beside),
                with_kwargs=True,
            )
            for layer in layers.values()
            for reader in layer.readers
        ]
        try:
            _pass(model, objective, batch, half=half and beside is not None)
        except _Finished:
            pass
        finally:
            for handle in handles:
                handle.remove()
    if pending:
        raise ValueError(
            f"the forward pass never reached {len(pending)} layer(s), first "
            f"{next(iter(pending))}: leave them out"
        )
    for layer in layers.values():
        if not layer.readers:
            visit(layer, lambda: None)


class _Beside:
    """A forward pass of another model in a thread of its own, one layer ahead at most: holds its
    inputs one by one."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batch: Batch,
        layers: Mapping[str, Layer],
        *,
        half: bool,
    ) -> None:
        self.model, self.objective, self.batch, self.layers, self.half = (
            model,
            objective,
            batch,
            layers,
            half,
        )
        self.inputs: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(maxsize=1)
        self.stopped, self.over = threading.Event(), False
        self.skipped: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="uncompressed model", daemon=True)
        self.thread.start()

    @torch.no_grad()
    def _run(self) -> None:
        def before(name: str, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            if self.stopped.is_set():
                raise _Finished
            if name not in self.seen:
                self.seen.add(name)
                self.inputs.put((name, arguments[0] if arguments else next(iter(named.values()))))
                if len(self.seen) == len(
                    self.layers
                ):  # the rest, a language model's logits for one, is not needed
                    raise _Finished

        handles = [
            reader.register_forward_pre_hook(
                lambda module, args, named, name=name: before(name, args, named), with_kwargs=True
            )
            for name, layer in self.layers.items()
            for reader in layer.readers
        ]
        try:
            with evaluating(self.model):
                _pass(self.model, self.objective, self.batch, half=self.half)
        except _Finished:
            pass
        except Exception as error:  # `input_of` raises it in the thread of the caller
            self.error = error
        finally:
            for handle in handles:
                handle.remove()
            if not self.stopped.is_set():
                self.inputs.put(None)

    def input_of(self, name: str) -> Tensor | None:
        """The layer's input there, or ``None`` if the pass has ended without it. Raises what ended
        the pass."""
        while name not in self.skipped and not self.over:
            item = self.inputs.get()
            if item is None:
                self.over = True
            elif item[0] == name:
                return item[1]
            else:
                self.skipped[item[0]] = item[1]
        if self.error is not None:
            raise RuntimeError(
                f"the uncompressed model failed before layer {name}: {self.error}"
            ) from self.error
        return self.skipped.pop(name, None)

    def stop(self) -> None:
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.inputs.get(timeout=0.05)
            except queue.Empty:
                continue


def _pass(model: nn.Module, objective: Objective, batch: Batch, *, half: bool) -> None:
    """A forward pass; ``half`` with bfloat16 products, on the CPU twice as fast in half the memory.
    An error of 2⁻⁹ in an input is far below what the damping of its moment allows for, and the same
    in two models."""
    if not half:
        objective.logits(model, batch)
        return
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            objective.logits(model, batch)
    except RuntimeError:
        # An operation without bfloat16. No layer is visited twice.
        narrow = {
            weight: weight.data for weight in model.parameters() if weight.dtype == torch.bfloat16
        }
        try:
            for weight, data in narrow.items():
                weight.data = data.float()
            objective.logits(model, batch)
        finally:
            for weight, data in narrow.items():
                weight.data = data


def coarse_copy(model: nn.Module, layers: Mapping[str, Layer]) -> nn.Module:
    """A copy of the model, to run beside it while the weights of ``layers`` are overwritten. It
    shares all other tensors, and holds those weights in the precision in which they will be
    multiplied (see `_pass`)."""
    memo: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for layer in layers.values():
        weight = layer.weight.detach()
        multiplied = layer.kind != "experts" and len(layer.readers) == 1 + len(
            layer.aliases
        )  # never looked up
        narrow = multiplied and weight.device.type == "cpu" and weight.dtype == torch.float32
        copied = weight.to(torch.bfloat16) if narrow else weight.clone()
        memo[id(layer.weight)] = nn.Parameter(copied, requires_grad=layer.weight.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def _beside(
    reference: tuple[nn.Module, Mapping[str, Layer]] | None,
    objective: Objective,
    batch: Batch,
    pending: Mapping[str, Layer],
    *,
    half: bool,
) -> Iterator[_Beside | None]:
    if reference is None or all(layer.kind == "experts" for layer in pending.values()):
        yield None
        return
    model, layers = reference
    # The two models' routers send different tokens to an expert, whose target is known for the
    # common ones alone.
    routed = {n: layers[n] for n in pending if layers[n].kind != "experts"}
    beside = _Beside(model, objective, batch, routed, half=half)
    try:
        yield beside
    finally:
        beside.stop()


def _moments(
    layer: Layer, module: nn.Module, x: Tensor, original: Tensor | None, mask: Tensor | None
) -> Moments:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if original is not None and original.shape != x.shape:
        original = None
    if (
        layer.kind != "conv"
        and mask is not None
        and x.ndim > 2
        and x.shape[:2] == mask.shape
        and not bool(mask.all())
    ):
        x = x[mask.bool()]
        original = None if original is None else original[mask.bool()]
    second = torch.zeros(layer.groups, layer.shape[1], layer.shape[1], dtype=wide, device=x.device)
    drift = None if original is None else torch.zeros_like(second)
    mean = torch.zeros(layer.groups, layer.shape[1], dtype=wide, device=x.device)
    moved_mean = torch.zeros_like(mean)
    count = 0

    def parts(t: Tensor) -> tuple[Tensor, ...]:
        # Convolutions unfold one item at a time at most; other inputs are already rows.
        return t.split(1) if layer.kind == "conv" else t.reshape(-1, layer.shape[1]).split(_ROWS)

    there = None if original is None else parts(original)
    for i, part in enumerate(parts(x)):
        rows = layer.rows(module, part).to(wide)
        narrow = _narrowed(rows)
        _add_gram(second, rows, narrow)
        mean += rows.sum(1)
        count += rows.shape[1]
        if drift is not None and there is not None:
            moved = layer.rows(module, there[i]).to(wide) - rows
            if narrow is None:
                drift += _coarse_product(moved, rows)
            else:
                _add_product(drift[0], _Bytes.of(moved[0]), narrow)
            moved_mean += moved.sum(1)
    _mirror(second)
    if drift is not None and not bool(drift.any()):
        drift = None
    if drift is None:
        return Moments(second / count, mean=mean / count)
    return Moments(second / count, drift / count, mean=mean / count, moved=moved_mean / count)


def _expert_moments(layer: Layer, x: Tensor, chosen: Tensor, mask: Tensor | None) -> Moments:
    """The moment of each expert's tokens, with ``_BORROWED·in`` tokens of the average expert among
    them: few tokens say little about most directions, and none nothing at all. Many outweigh the
    borrowed ones."""
    if mask is not None and mask.numel() == len(x) and not bool(mask.all()):
        kept = mask.reshape(-1).bool()
        x, chosen = x[kept], chosen[kept]
    width = layer.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    second = torch.zeros(layer.groups, width, width, dtype=wide, device=x.device)
    counts = []
    for total, rows in zip(second.split(1), layer.expert_rows(x, chosen), strict=True):
        for part in rows.split(_ROWS):
            _add_gram(total, part.to(wide)[None])
        counts.append(len(rows))
    _mirror(second)
    average = second.sum(0) / max(1, sum(counts))
    borrowed = _BORROWED * width
    for total, count in zip(second, counts, strict=True):
        total.add_(average, alpha=borrowed).div_(count + borrowed)
    few = sum(count < width for count in counts)
    notes = (
        f"layer {layer.name}: {few} of {layer.groups} experts saw fewer calibration tokens than "
        f"their {width} inputs (the fewest {min(counts)}) and were solved for those of all "
        "experts in part",
    )
    return Moments(second, notes=notes if few else ())


def _mirror(second: Tensor) -> None:
    """Fill the lower triangle from the upper one."""
    for start in _blocks(second.shape[1]):
        stop = start + _BLOCK
        second[:, stop:, start:stop] = second[:, start:stop, stop:].transpose(1, 2)


def _blocks(width: int) -> range:
    return range(0, width, _BLOCK)


def _add_gram(total: Tensor, rows: Tensor, narrow: _Bytes | None = None) -> None:
    """``total += rowsᵀ rows``, blocks on and above the diagonal only: five eighths of the work at
    four blocks. From ``narrow``, where it is given."""
    for start in _blocks(rows.shape[2]):
        block, onwards = slice(start, start + _BLOCK), slice(start, None)
        if narrow is None:
            total[:, block, onwards].baddbmm_(
                rows[:, :, block].transpose(1, 2), rows[:, :, onwards]
            )
        else:
            _add_product(total[0, block, onwards], narrow.columns(block), narrow.columns(onwards))


def _coarse_product(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b``; on the CPU from bfloat16 factors, twice as fast: it only tells where to move, and
    is shrunk anyway."""
    if a.device.type == "cpu" and a.dtype == torch.float32:
        return (a.transpose(1, 2).bfloat16() @ b.bfloat16()).to(a.dtype)
    return a.transpose(1, 2) @ b


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Rows ``(n, in)`` in steps ``(in,)`` of 1/127 of each column's largest value.

    What is lost is noise of a twelfth of a squared step. No value of ``n`` is larger than ``√n``
    root mean squares, so the noise adds to a column's second moment n/193,548 of it at most, 2 %
    for `_ROWS`, and little to the others: far less than other tokens would. (A product rounded to
    bfloat16 is that of no inputs, and too coarse.)
    """

    values: Tensor
    step: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Bytes:
        step = rows.abs().amax(0).div_(127).clamp_min_(torch.finfo(rows.dtype).tiny)
        return cls((rows * step.reciprocal()).round_().to(torch.int8), step)

    def columns(self, which: slice) -> _Bytes:
        return _Bytes(self.values[:, which], self.step[which])


def _narrowed(rows: Tensor) -> _Bytes | None:
    """Rows ``(1, n, in)`` in 8 bits, where the CPU has instructions that multiply them four times
    as fast."""
    fast = (
        rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.cpu._is_vnni_supported()
    )
    return _Bytes.of(rows[0]) if fast and len(rows) == 1 and rows.shape[2] >= _NARROW else None


def _add_product(total: Tensor, a: _Bytes, b: _Bytes) -> None:
    """``total += aᵀ b``, summed in whole numbers."""
    product = torch._int_mm(a.values.T, b.values).to(total.dtype)
    total.addcmul_(product.mul_(b.step), a.step[:, None])
