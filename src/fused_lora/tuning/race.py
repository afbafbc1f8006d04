"""Which candidate is fastest at a case: forward and backward through autograd, interleaved, undisturbed rounds."""

import itertools

import torch
from torch import Tensor

from fused_lora.bench import candidates
from fused_lora.bench.cases import Case
from fused_lora.bench.timing import Series, Spread, copies, cpu_pass, gpu_pass, interleave, ratio
from fused_lora.testing import Problem, random_problem


def race(names: list[str], case: Case, device: str, budget_s: float) -> dict[str, dict[str, float]]:
    """Microseconds of a forward and backward with 95 % intervals, by candidate, and what they are over the frozen
    layer's; "frozen" is one of them.

    It ends before its budget where the fastest is told from the second: the interval of their ratio leaves out 1.
    """
    p = random_problem(case.M, case.N, case.K, case.R, case.dtype, torch.float32, bias=False, device=device)
    inputs = copies(p.x)
    passes = {name: _pass(name, p, case.dropout, inputs) for name in ("frozen", *names)}
    for one in itertools.chain(passes.values(), passes.values()):
        one()
    times = interleave(passes, budget_s=budget_s, least=7, enough=_told_apart)
    return {name: _figures(series, times["frozen"]) for name, series in times.items()}


def _pass(name: str, p: Problem, dropout: float, inputs: list[Tensor]):
    made = (candidates.frozen if name == "frozen" else candidates.back_end(name))(p, dropout)
    one = gpu_pass if p.x.is_cuda else cpu_pass
    return one(made.forward, inputs, p.dy, made.leaves)


def _told_apart(times: dict[str, Series]) -> bool:
    ours = [series for name, series in times.items() if name != "frozen"]
    if len(ours) < 2:
        return True
    first, second = sorted(ours, key=lambda series: Spread.of(series.seconds()).median)[:2]
    return ratio(second, first)[1] > 1.0


def _figures(series: Series, frozen: Series) -> dict[str, float]:
    spread = Spread.of(series.seconds())
    over, low, high = ratio(series, frozen)
    figures = dict(us=spread.median * 1e6, low_us=spread.low * 1e6, high_us=spread.high * 1e6)
    return figures | dict(ratio=over, ratio_low=low, ratio_high=high, rounds=series.clean)
