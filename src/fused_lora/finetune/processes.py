"""Data-parallel training: the processes that torchrun or `accelerate launch` has started, each with its share of every
step.

Model, adapter and optimizer are whole and alike, to the bit, in all of them; the first one writes. A single process is
the case of one, without communication. A group that the caller has made already counts as it is.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """(this process's number, how many there are), as the launcher's environment says; (0, 1) without one."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ.get("RANK") or 0), count) if count > 1 else (0, 1)


@contextmanager
def joined(device: str) -> Iterator[None]:
    """With the other processes for the time of a run, on a GPU of this process's own.

    Raises: ValueError if the launcher's environment does not say where they meet, or device names one GPU for all.
    """
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda")
    if ":" in device:
        raise ValueError(f"--device must be cpu or cuda with several processes, a GPU for each; got {device}")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    # Which the first optimizer step would import, and which then keeps the group beyond its end: gloo's threads live on
    # to the interpreter's, where one of them may abort the process.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _together() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def check_shares(blocks: int) -> None:
    """Raises ValueError unless each process has one of the blocks of a step at least."""
    if blocks < count():
        raise ValueError(
            f"batch_size * grad_accum must be at least the number of processes, {count()}, which share them; got "
            f"{blocks}"
        )


def part_ways(seed: int) -> None:
    """Have each process but the first, which goes on as one alone would, draw numbers of its own, for dropout."""
    if rank():
        torch.manual_seed(seed + (rank() << 32))


def summed(number: float, device: torch.device | str) -> float:
    """The sum of a number over the processes."""
    if count() == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient its sum over the processes, in fp32 at least; what has none in any of them keeps none."""
    if count() == 1:
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    flat = torch.cat([known, *(g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients)])
    dist.all_reduce(flat)
    totals = flat[len(parameters) :].split([p.numel() for p in parameters])
    for p, anywhere, total in zip(parameters, flat[: len(parameters)].tolist(), totals):
        if anywhere:
            p.grad = total.view_as(p).to(p.dtype)


def gathered(state: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of each process as one [processes, ...] on the CPU."""
    if count() == 1:
        return state.cpu()[None]
    states = [torch.empty_like(state, device=device) for _ in range(count())]
    dist.all_gather(states, state.to(device))
    return torch.stack(states).cpu()


def by_first(do: Callable[[], T]) -> T:
    """What the first process does; its result, or its exception, in all of them."""
    if count() == 1:
        return do()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
