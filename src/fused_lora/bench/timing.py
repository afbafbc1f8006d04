"""The timer: candidates interleaved in one run, cold inputs, undisturbed rounds, medians with their intervals.

On a GPU a candidate's pass is a CUDA graph over inputs that rotate through more than the L2, timed with events; on a
CPU it is a call timed with the wall clock. The order of candidates changes every round, so that none always follows the
same neighbour.
"""

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# One pass of a candidate: its times in seconds, one per part (say forward, backward).
Pass = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Spread:
    """Median, its 95 % interval, and 20th and 80th percentile of one candidate's times, in seconds, and how many there
    were."""

    median: float
    low: float
    high: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, times: list[float]) -> "Spread":
        ordered, skip = sorted(times), _skipped(len(times))
        at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
        return cls(statistics.median(ordered), ordered[skip], ordered[-1 - skip], at(0.2), at(0.8), len(ordered))

    def facts(self, name: str, unit: str, scale: float) -> dict[str, float]:
        """As a row of figures holds them: <name>_us, <name>_low_us and so on, for unit "us" and a scale of 1e6."""
        values = dict(median=self.median, low=self.low, high=self.high, p20=self.p20, p80=self.p80)
        return {f"{name}_{key}_{unit}".replace("_median", ""): value * scale for key, value in values.items()}


def _skipped(count: int) -> int:
    """How many of the smallest and of the largest of `count` values lie outside the median's 95 % interval, from the
    binomial distribution of how many fall below the median; 0 where so few values cannot tell (5 or less)."""
    if count > 100:
        return int(count / 2 - 0.98 * math.sqrt(count)) - 1
    skip, outcomes = 0, 1  # of 2^count outcomes, those in which `skip` or fewer values fall below the median
    while outcomes + math.comb(count, skip + 1) <= 0.025 * 2**count:
        skip += 1
        outcomes += math.comb(count, skip)
    return skip


@dataclass
class Series:
    """One candidate's rounds: a tuple of seconds each, one per part (say forward, backward), and which of them count.

    A round in which a thread of this process waited for a CPU says more of the other processes than of the candidate:
    it doesn't count, unless too few would be left.
    """

    rounds: list[tuple[float, ...]] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)

    @property
    def clean(self) -> int:
        return sum(self.counts)

    def seconds(self, part: Callable[[tuple[float, ...]], float] = sum) -> list[float]:
        """The times that count, of one part or of all together."""
        return [part(t) for t, counts in zip(self.rounds, self.counts) if counts]


def ratio(of: Series, base: Series, part: Callable[[tuple[float, ...]], float] = sum) -> tuple[float, float, float]:
    """The ratio of the medians and its 95 % interval, by bootstrap over the rounds that count for both: what slows a
    round down slows both, so that pairs tell more than each alone. With fewer than six such rounds the interval reaches
    from the fastest over the slowest to the slowest over the fastest."""
    if of is base:
        return 1.0, 1.0, 1.0
    value = statistics.median(of.seconds(part)) / statistics.median(base.seconds(part))
    both = [(part(a), part(b)) for a, b, *ok in zip(of.rounds, base.rounds, of.counts, base.counts) if all(ok)]
    if len(both) < 6:
        ours, theirs = of.seconds(part), base.seconds(part)
        return value, min(ours) / max(theirs), max(ours) / min(theirs)
    pairs, generator = torch.tensor(both, dtype=torch.float64), torch.Generator().manual_seed(0)
    drawn = pairs[torch.randint(len(both), (1000, len(both)), generator=generator)]
    medians = drawn.quantile(0.5, dim=1)
    low, high = (medians[:, 0] / medians[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, min(value, low), max(value, high)


_schedstat: dict[str, int] = {}  # a thread's open file
_waits: dict[str, int] = {}  # what it has told last; of threads that have ended, too, so that the sum never falls


def waited_ns() -> int:
    """Nanoseconds that the threads of this process have been ready without a CPU to run on, since they began; 0 where
    the system doesn't tell."""
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return 0
    for thread in {*threads, *_schedstat}:
        try:
            if thread not in _schedstat:
                _schedstat[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            _waits[thread] = int(os.pread(_schedstat[thread], 64, 0).split()[1])
        except (OSError, ValueError, IndexError):  # it has ended, or there is no such file
            if thread in _schedstat:
                os.close(_schedstat.pop(thread))
    return sum(_waits.values())


def _disturbed(waited: int, seconds: tuple[float, ...]) -> bool:
    """Whether a pass says little: its threads waited for 20 us, and for a thousandth of its time."""
    return waited > max(20e-6, 1e-3 * sum(seconds)) * 1e9


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
    passes: dict[str, Pass],
    *,
    budget_s: float,
    least: int = 5,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
    waited: Callable[[], int] = waited_ns,
    enough: Callable[[dict[str, Series]], bool] = lambda series: False,
) -> dict[str, Series]:
    """Run every pass once a round until the budget is spent.

    Args:
        passes: a callable per candidate that does one pass and returns its times in seconds, one per part (say forward,
            backward).
        budget_s: seconds for all candidates together; exceeded where `least` rounds take longer, and up to three times
            where other processes leave fewer than `least` rounds undisturbed. If there are too few even then, all
            count.
        least, most: rounds at least and at most.
        clock: the clock the budget is read from.
        waited: tells for how many nanoseconds this process's threads have waited for a CPU.
        enough: asked every few rounds; ends the run before the budget does.
    Returns: the times of every round, by candidate.
    """
    series = {name: Series() for name in passes}
    start = clock()
    for done, order in enumerate(rounds(list(passes))):
        fewest = min((each.clean for each in series.values()), default=0)
        over = clock() - start > (budget_s if fewest >= least else 3 * budget_s)
        if done >= most or (done >= least and over):
            break
        if fewest >= least and done % 4 == 0 and enough(series):
            break
        before = waited()
        for name in order:
            seconds = passes[name]()
            after = waited()
            series[name].rounds.append(seconds)
            series[name].counts.append(not _disturbed(after - before, seconds))
            before = after
    for each in series.values():
        if each.clean < least:
            each.counts = [True] * len(each.rounds)
    return series


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
    """`step` as a CUDA graph's replay, warmed up on a side stream first.

    The replay keeps `step`, since the graph reads the tensors that it holds: the allocator may give the memory of those
    that are gone back to the device, at the latest when the next graph is captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: Callable[[], None] = step) -> None:
        graph.replay()

    return replay


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


_PAST_CACHES = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes that no cache of the kind holds


def copies(x: torch.Tensor, cold: bool = True) -> list[torch.Tensor]:
    """x and clones of it, two at the least; where they are to be cold, together more than any cache holds, so that each
    pass finds its input in memory, but at most 16."""
    past = _PAST_CACHES[x.device.type] if cold else 0
    count = min(16, max(2, -(-past // max(1, x.numel() * x.element_size()))))
    return [x.detach().clone().requires_grad_() for _ in range(count)]
