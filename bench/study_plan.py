"""What the study runs, in which order, and which learning rate a condition is reported at."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
SEEDS = (0, 1, 2, 3, 4)  # the first is the sweep's
EXTENSIONS = 3  # rates that a sweep may grow by
FIRST_SEEDS = 3  # what every condition has before any gets more
TOKENS_A_RUN, SEQ_LEN = 8192, 128


@dataclass(frozen=True)
class Condition:
    """A way to fine-tune; `halves` are its learning rates as halves of a power of ten: -5 is 10**-2.5."""

    name: str
    halves: tuple[int, ...] = (-6, -5, -4)
    rank: int = 16
    alpha: float = 32.0
    targets: str = "all-linear"
    variant: str = "lora"
    optimizer: str = "adamw"
    merges: tuple[int, ...] = ()  # steps after which the adapter is folded in and a fresh one begins
    rewarm: int = 0  # warm-up steps after each of them
    full: bool = False
    batch: int = 2
    grows: bool = True  # whether its sweep may

    @property
    def steps(self) -> int:
        return TOKENS_A_RUN // (self.batch * SEQ_LEN)


class Run(NamedTuple):
    condition: Condition
    lr: float
    seed: int


FULL = (-9, -8, -7)
# LoRA's centre 10**-2.5 is the half power next to the recipe of "LoRA Without Regret" for this model and length, 2e-3.
# rsLoRA's scaling at r=64 is eight times LoRA's; LoRA+ gives B sixteen times A's rate; LoRA-Pro's paper stays below
# LoRA's usual rates, LoRA-RITE's users go up to twenty times higher.
MAIN = (
    Condition("full", FULL, full=True),
    Condition("LoRA r=16"),
    Condition("LoRA r=4", rank=4),
    Condition("LoRA r=64", rank=64),
    Condition("attention only r=33", rank=33, targets=ATTENTION),
    Condition("MLP only r=20", rank=20, targets=MLP),
    Condition("rsLoRA r=64", (-7, -6, -5), rank=64, variant="rslora"),
    Condition("DoRA r=16", variant="dora"),
    Condition("LoRA+ r=16", (-8, -7, -6), optimizer="loraplus"),
    Condition("LoRA-RITE r=16", (-6, -5, -4, -3), optimizer="rite"),
    Condition("LoRA-Pro r=16", (-7, -6, -5), optimizer="pro"),
    Condition("Riemannian r=16", optimizer="riemannian"),
    Condition("LoRA-FA r=16", optimizer="lora-fa"),
    Condition("PeriodicLoRA r=16", merges=(8, 16, 24), rewarm=2),
    Condition("Chain of LoRA r=16", merges=(11, 21)),
)
BATCHES = (Condition("full, batch 8", FULL, full=True, batch=8), Condition("LoRA r=16, batch 8", batch=8))
# Added after the figures of the first two stages, and chosen by nothing: it tells what a method does from what its rate
# does, where the sweep took another rate for LoRA than for the method, by a hair.
CONTROL = (Condition("LoRA r=16 at 0.001", (-6,), grows=False),)
CONDITIONS = MAIN + BATCHES + CONTROL


def rate(half: int) -> float:
    """10**(half / 2) to three digits, as rows hold it."""
    return float(f"{10 ** (half / 2):.3g}")


def best_rate(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    """The learning rate with the lowest validation loss among the sweep's finished runs; the lower one of equals."""
    swept = [r for r in rows if r["condition"] == name and r["seed"] == SEEDS[0] and r["validation"] is not None]
    return min(swept, key=lambda r: (r["validation"], r["lr"]))["lr"] if swept else None


def next_run(
    rows: Sequence[dict[str, Any]], stages: Sequence[Sequence[Condition]] = (MAIN, BATCHES, CONTROL)
) -> Run | None:
    """The first run of the plan that has no row: for each stage the sweeps, further rates while the best lies at
    an edge, then the next seeds at the best rate; at last the other seeds. A condition whose runs all diverged ends
    there."""
    done = {(r["condition"], r["lr"], r["seed"]) for r in rows}
    for stage in stages:
        planned = [Run(c, rate(half), SEEDS[0]) for c in stage for half in c.halves]
        missing = [run for run in planned if (run.condition.name, run.lr, run.seed) not in done]
        if missing:
            return missing[0]
        for condition in stage:
            lr = _extension(rows, condition)
            if lr is not None:
                return Run(condition, lr, SEEDS[0])
        missing = _repeats(rows, stage, SEEDS[1:FIRST_SEEDS])
        if missing:
            return missing[0]
    missing = _repeats(rows, [c for stage in stages for c in stage], SEEDS[FIRST_SEEDS:])
    return missing[0] if missing else None


def _repeats(rows: Sequence[dict[str, Any]], conditions: Iterable[Condition], seeds: Iterable[int]) -> list[Run]:
    """Runs at the best rates that have no row, seed by seed."""
    done = {(r["condition"], r["lr"], r["seed"]) for r in rows}
    best = {c: lr for c in conditions if (lr := best_rate(rows, c.name)) is not None}
    return [Run(c, lr, seed) for seed in seeds for c, lr in best.items() if (c.name, lr, seed) not in done]


def _extension(rows: Sequence[dict[str, Any]], condition: Condition) -> float | None:
    """The rate beyond the edge that the best one lies at, if the sweep may grow."""
    swept = {r["lr"] for r in rows if r["condition"] == condition.name and r["seed"] == SEEDS[0]}
    best = best_rate(rows, condition.name)
    if (
        best is None
        or not condition.grows
        or len(swept) >= len(condition.halves) + EXTENSIONS
        or min(swept) < best < max(swept)
    ):
        return None
    half = round(2 * math.log10(best))
    return rate(half - 1 if best == min(swept) else half + 1)
