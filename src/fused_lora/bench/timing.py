"""The timer: candidates interleaved in one run, cold inputs, medians with their spread.

On a GPU a candidate's pass is a CUDA graph over inputs that rotate through more than the L2, timed with events; on a
CPU it is a call timed with the wall clock. The order of candidates changes every round, so that none always follows the
same neighbour.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# One pass of a candidate: its times in seconds, one per part (say forward, backward).
Pass = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile of one candidate's times, in seconds, and how many there were."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, times: list[float]) -> "Spread":
        ordered = sorted(times)
        at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def rounds(names: list[str]):
    """The order of each round: shuffled afresh, alike in every run.

    Rotation would leave each candidate its neighbour, and what a neighbour leaves in the caches counts: on a CPU a
    layer that follows PEFT's bf16 one takes 8 % longer.
    """
    shuffle = random.Random(0).shuffle
    while True:
        shuffle(names)
        yield names


def interleave(
    passes: dict[str, Pass], *, budget_s: float, least: int = 5, most: int = 200, clock=time.perf_counter
) -> dict[str, list[tuple[float, ...]]]:
    """Run every pass once a round until the budget is spent.

    Args:
        passes: a callable per candidate that does one pass and returns its times in seconds, one per part (say forward,
            backward).
        budget_s: seconds for all candidates together; exceeded where `least` rounds take longer.
        least, most: rounds at least and at most.
        clock: the clock the budget is read from.
    Returns: the times of every round, by candidate.
    """
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in passes}
    start = clock()
    for done, order in enumerate(rounds(list(passes))):
        if done >= most or (done >= least and clock() - start > budget_s):
            return taken
        for name in order:
            taken[name].append(passes[name]())
    raise AssertionError("rounds() never ends")


def cpu_pass(forward: Callable, inputs: list[torch.Tensor], gradient: torch.Tensor, leaves: list[torch.Tensor]) -> Pass:
    """One forward and backward on the next of `inputs`, each timed; gradients are dropped between passes, outside the
    times."""
    turn = itertools.cycle(inputs)

    def one() -> tuple[float, float]:
        x = next(turn)
        for leaf in (*leaves, *inputs):
            leaf.grad = None
        t0 = time.perf_counter()
        y = forward(x)
        t1 = time.perf_counter()
        y.backward(gradient)
        t2 = time.perf_counter()
        return t1 - t0, t2 - t1

    return one


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph's replay, warmed up on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def gpu_pass(forward: Callable, inputs: list[torch.Tensor], gradient: torch.Tensor, leaves: list[torch.Tensor]) -> Pass:
    """Forward and backward over all `inputs` in a CUDA graph; the backward's time is the difference to a graph of
    forwards alone.

    Returns seconds for one input. Peak memory and correctness are measured elsewhere.
    """

    def forwards():
        for x in inputs:
            forward(x)

    def both():
        for x in inputs:
            for leaf in (*leaves, x):
                leaf.grad = None
            forward(x).backward(gradient)

    replays = [captured(forwards), captured(both)]

    def one() -> tuple[float, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        for event, replay in zip(events, replays):
            event.record()
            replay()
        events[2].record()
        events[2].synchronize()
        fwd, whole = (events[i].elapsed_time(events[i + 1]) / 1e3 / len(inputs) for i in range(2))
        return fwd, whole - fwd

    return one


def copies(x: torch.Tensor, cache_bytes: int) -> list[torch.Tensor]:
    """x and clones of it that together exceed the cache, so that each pass finds its input cold; at most 16."""
    count = min(16, max(2, -(-cache_bytes // max(1, x.numel() * x.element_size()))))
    return [x.detach().clone().requires_grad_() for _ in range(count)]
