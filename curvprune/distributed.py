"""Several processes that share one job, as ``torchrun`` starts them: each takes its share of the
data or the layers, and sums are added up. Alone, a process has everything to itself and nothing
here communicates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The first process works alone for hours on a large model, while the others wait. torch's own limit
# is 30 minutes (10 for NCCL); a process that has died is noticed at once, whatever the limit.
LONGEST_WAIT = timedelta(days=7)


def shared() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if shared() else 0


def world() -> int:
    return dist.get_world_size() if shared() else 1


def is_first() -> bool:
    """Whether this is the first process of its job, also before it has joined the others."""
    joined = dist.is_available() and dist.is_initialized()
    return rank() == 0 if joined else os.environ.get("RANK", "0") == "0"


def my_share(parts: Sequence[T]) -> Sequence[T]:
    """Every ``world()``-th part, from the ``rank()``-th on."""
    return parts[rank() :: world()] if shared() else parts


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if shared():
        dist.all_reduce(tensor)
    return tensor


def gather(values: Tensor) -> Tensor:
    """The values of all processes, one after the other, on the CPU."""
    if not shared():
        return values.cpu()
    # As objects: shares differ in length, and NCCL knows no tensors of the CPU.
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, values.cpu())
    return torch.cat(parts)


def first_says(answer: bool) -> bool:
    """The answer of the first process, in all of them: what is on disk may look different a moment
    later."""
    return bool(all_sum(torch.tensor(float(answer and rank() == 0))))


def wait() -> None:
    """Until all processes are here."""
    if shared():
        dist.barrier()


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did and the program has not; leave them
    at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    # One device a process, before anything is allocated on the first.
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()
