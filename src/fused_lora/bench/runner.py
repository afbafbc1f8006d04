"""One case: check every candidate against fp64, then time them together, then count what each holds for its
backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fused_lora.bench.candidates import Made, back_end, candidates_on, is_plan
from fused_lora.bench.cases import Case
from fused_lora.bench.timing import Pass, Series, Spread, copies, cpu_pass, gpu_pass, interleave, ratio
from fused_lora.testing import Problem, random_problem, truth

T = TypeVar("T")
CHAIN = 24  # layers of the chain in `host_cost`
_OURS = ("fused", "triton", "cuda", "cpu")  # with any plan: A and B in fp32, the mask drawn from a seed


class WrongResult(AssertionError):
    """A candidate whose result is off: it is not timed."""


def outcome(made: Made, p: Problem) -> dict[str, Tensor]:
    """y, dx, dA, dB of one forward and backward."""
    x = p.x.detach().clone().requires_grad_()
    for leaf in made.leaves:
        leaf.grad = None
    y = made.forward(x)
    y.backward(p.dy)
    got = {"y": y.detach()}
    for name, t in zip(("dx", "dA", "dB"), (x, *made.leaves)):
        if t.grad is None:
            raise WrongResult(f"{name} is missing")
        got[name] = t.grad
    return got


def check(name: str, got: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The largest error of `got` relative to the largest element of the truth, over y and the gradients.

    A maximum, so that one bad tile shows. Half precision may be off by 4 units in the last place of the largest element
    (base product, h, update and sum are rounded once each), fp32 by 64 (thousands of terms accumulate in fp32).
    Raises: WrongResult naming candidate, tensor, error and limit.
    """
    limit = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    worst = 0.0
    for tensor, value in got.items():
        want = exact[tensor]
        scale = want.abs().max().item() or 1.0
        error = (value.double() - want).abs().max().item() / scale
        if not error <= limit:
            raise WrongResult(
                f"{name}: {tensor} is off by {error:.2e} of its largest element, over the limit {limit:.2e}"
            )
        worst = max(worst, error)
    return worst


def _check_dropout(name: str, made: Made, p: Problem, dropout: float) -> None:
    """Ours draws its mask from a seed that can be replayed: compare with the truth under that mask."""
    torch.manual_seed(1)
    got = outcome(made, p)
    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=p.x.device)
    check(name, got, truth(p, dropout_p=dropout, seed=seed), p.x.dtype)


def held_bytes(made: Made, p: Problem) -> int:
    """Bytes kept for the backward beyond x and the parameters: distinct storages seen by saved-tensor hooks."""
    own = {t.untyped_storage().data_ptr() for t in (p.weight, p.bias, *made.leaves) if t is not None}
    x = p.x.detach().clone().requires_grad_()
    own.add(x.untyped_storage().data_ptr())
    held: dict[int, int] = {}

    def pack(t: Tensor):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = made.forward(x)
    held.pop(y.untyped_storage().data_ptr(), None)
    return sum(held.values())


def peak_bytes(made: Made, p: Problem) -> int:
    """Most bytes that one forward and backward allocates at once, outputs included; 0 where it cannot be measured
    (CPU)."""
    if p.x.device.type != "cuda":
        return 0
    outcome(made, p)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(made, p)
    return torch.cuda.max_memory_allocated() - before


def prepare(names: list[str], make: Callable[[str], T]) -> tuple[dict[str, T], dict[str, dict]]:
    """What `make` gives for each candidate, and for those where it raises what stands in their rows instead of figures:
    wrong, failed or does not fit, and why in one line. So one bad candidate does not end a run.

    Raises: what `make` raises for frozen: without it there is nothing to compare with.
    """
    ready: dict[str, T] = {}
    dropped: dict[str, dict] = {}
    for name in names:
        try:
            ready[name] = make(name)
        except Exception as error:
            if name == "frozen":
                raise
            dropped[name] = _fault(name, error)
    return ready, dropped


def _fault(name: str, error: Exception) -> dict:
    text = " ".join(str(error).split())[:400].removeprefix(f"{name}: ")
    if isinstance(error, WrongResult):
        return dict(fault="wrong", why=text)
    kind = "does not fit" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return dict(fault=kind, why=f"{type(error).__name__}: {text}")


@dataclass(frozen=True)
class _Ready:
    """A candidate whose result is right, and what is known of it before it is timed."""

    one_pass: Pass
    error: float
    held: int
    peak: int


def _is_ours(name: str) -> bool:
    return name.partition(":")[0] in _OURS


def _maker(name: str, device: str) -> Callable[[Problem, float], Made]:
    return back_end(name) if is_plan(name, device) else candidates_on(device)[name]


def _checked(name: str, case: Case, p: Problem, exact: dict[str, Tensor], inputs: list[Tensor]) -> _Ready:
    """Make, check, warm up and weigh one candidate: what can go wrong goes wrong here, before anything is timed."""
    make = _maker(name, p.x.device.type)
    plain = make(p, 0.0)
    error = check(name, outcome(plain, p), exact, case.dtype)
    made = make(p, case.dropout) if case.dropout else plain
    if case.dropout and _is_ours(name):
        _check_dropout(name, made, p, case.dropout)
    one_pass = (gpu_pass if p.x.device.type == "cuda" else cpu_pass)(made.forward, inputs, p.dy, made.leaves)
    one_pass()
    ready = _Ready(one_pass, error, held_bytes(made, p), peak_bytes(made, p))
    one_pass()
    return ready


def run_case(case: Case, device: str, names: list[str], budget_s: float, least: int = 5) -> list[dict]:
    """One row per candidate: times in microseconds and ratios to frozen, both with 95 % intervals, memory, error; or
    that it was dropped, and why.

    Args:
        case: the sizes.
        device: cpu or cuda.
        names: of `candidates_on(device)`, or of a back end's plan; frozen must be among them.
        budget_s: seconds of timing for all candidates together.
        least: rounds at the least, whatever they take.
    Raises: what the frozen layer raises, WrongResult if it is off.
    """
    p = random_problem(case.M, case.N, case.K, case.R, case.dtype, torch.float32, device=device)
    exact, base = truth(p), truth(replace(p, lora_B=torch.zeros_like(p.lora_B)))
    inputs = copies(p.x)
    ready, dropped = prepare(names, lambda name: _checked(name, case, p, base if name == "frozen" else exact, inputs))
    times = interleave({name: r.one_pass for name, r in ready.items()}, budget_s=budget_s, least=least)
    rows = _rows(case, times, ready) | {n: case.facts() | dict(candidate=n) | why for n, why in dropped.items()}
    return [rows[name] for name in names]


def _rows(case: Case, times: dict[str, Series], ready: dict[str, _Ready]) -> dict[str, dict]:
    parts = {"fwd": lambda t: t[0], "bwd": lambda t: t[1], "both": lambda t: t[0] + t[1]}
    rows = {}
    for name, series in times.items():
        row = case.facts() | dict(
            candidate=name,
            adapter_dtype="float32" if name == "peft" or _is_ours(name) else str(case.dtype)[6:],
            rounds=series.clean,
            rounds_disturbed=len(series.rounds) - series.clean,
            max_error=ready[name].error,
            held_bytes=ready[name].held,
            peak_bytes=ready[name].peak,
            floor=1.0 if name == "frozen" else case.floor,
        )
        for part, get in parts.items():
            row |= Spread.of(series.seconds(get)).facts(part, "us", 1e6)
            row |= ratio_facts(f"{part}_ratio", ratio(series, times["frozen"], get))
        rows[name] = row | dict(gflops=case.flops() / row["both_us"] / 1e3)
    return rows


def ratio_facts(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    """A ratio and its interval as a row of figures holds them."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found))


def host_cost(device: str, budget_s: float, names: list[str]) -> list[dict]:
    """Eager forward and backward on tiny tensors (M=4, K=N=16, R=4), microseconds a layer, of one layer and of many in
    a chain: what Python, autograd and launches cost. That of one holds what every backward() costs, whatever it runs
    through. Candidates are dropped as in `run_case`."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problems = [random_problem(4, 16, 16, 4, dtype, torch.float32, device=device, seed=seed) for seed in range(CHAIN)]
    p = problems[0]
    exact, base = truth(p), truth(replace(p, lora_B=torch.zeros_like(p.lora_B)))

    def make(name: str) -> tuple[Pass, Pass]:
        made = [_maker(name, device)(each, 0.0) for each in problems]
        check(name, outcome(made[0], p), base if name == "frozen" else exact, dtype)

        def one_pass(of: list[Made]) -> Pass:
            def chain(x: Tensor) -> Tensor:
                for each in of:
                    x = each.forward(x)
                return x

            run = cpu_pass(chain, copies(p.x, cold=False), p.dy, [leaf for each in of for leaf in each.leaves])
            for _ in range(200):
                run()
            return run

        return one_pass(made[:1]), one_pass(made)

    ready, dropped = prepare(names, make)
    rows: dict[str, dict] = {name: dict(candidate=name) for name in ready}
    for n, part, of_peft, depth in ((0, "host", "of_peft", 1), (1, "chain", "chain_of_peft", CHAIN)):
        passes = {name: both[n] for name, both in ready.items()}
        # every round counts: to look who waited costs such passes 5 %, and of thousands the median is steady
        times = interleave(passes, budget_s=budget_s / 2, least=500 // depth, most=20000, waited=lambda: 0)
        for name, series in times.items():
            rows[name] |= Spread.of(series.seconds()).facts(part, "us", 1e6 / depth)
            if "peft" in times:
                rows[name] |= ratio_facts(of_peft, ratio(series, times["peft"]))
    return [*rows.values(), *[dict(candidate=name) | why for name, why in dropped.items()]]
