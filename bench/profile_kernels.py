"""Where a forward + backward spends its time on the GPU: every kernel of every candidate, and the gaps between them.

    python bench/profile_kernels.py OUT.json [--case M,K,N,R,p]...

Through torch.profiler, on inputs that rotate through more than the L2. A kernel counts from the end of the one before
it, since ours may start early and wait for it. "gaps" is when no kernel runs: launches that wait, and in eager mode the
host. Kernels run a few per cent slower here than in `fused-lora bench`; shares are what to read.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fused_lora.bench import Case, environment
from fused_lora.bench.candidates import candidates_on
from fused_lora.bench.timing import copies
from fused_lora.files import write_json
from fused_lora.hardware import gpu_clocks
from fused_lora.testing import random_problem

CASES = [
    "8192,4096,4096,16,0",
    "8192,4096,4096,16,0.1",
    "8192,4096,14336,16,0",
    "8192,4096,1024,16,0",
    "2048,4096,4096,16,0",
    "16,4096,4096,16,0",
]
PASSES = 20


def parse(text: str) -> Case:
    try:
        M, K, N, R = (int(n) for n in text.split(",")[:4])
        return Case(M, K, N, R, float(text.split(",")[4]), torch.bfloat16)
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"a case must be M,K,N,R,p; got {text!r}") from None


def kernels_of(step, passes: int) -> list[tuple[str, float, float]]:
    """(kernel, start, end) in microseconds of `passes` calls of step."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        for _ in range(passes):
            step()
        torch.cuda.synchronize()
    events = [
        e
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    return [(e.name, e.time_range.start, e.time_range.end) for e in events]


def summary(events: list[tuple[str, float, float]], passes: int) -> list[dict]:
    """One row per kernel in the order of first appearance: calls and microseconds a pass; then the gaps."""
    calls, spent, gaps, busy_until = defaultdict(int), defaultdict(float), 0.0, None
    for name, start, end in sorted(events, key=lambda e: e[1]):
        gaps += 0.0 if busy_until is None else max(0.0, start - busy_until)
        calls[name] += 1
        spent[name] += max(0.0, end - (start if busy_until is None else max(start, busy_until)))
        busy_until = end if busy_until is None else max(end, busy_until)
    rows = [dict(kernel=name, calls=calls[name] / passes, us=spent[name] / passes) for name in calls]
    return [*rows, dict(kernel="gaps", calls=0.0, us=gaps / passes)]


def profile(case: Case, names: list[str]) -> dict[str, list[dict]]:
    p = random_problem(case.M, case.N, case.K, case.R, case.dtype, torch.float32, device="cuda")
    turn = itertools.cycle(copies(p.x))
    found = {}
    for name in names:
        made = candidates_on("cuda")[name](p, case.dropout)

        def step(made=made):
            x = next(turn)
            for leaf in (*made.leaves, x):
                leaf.grad = None
            made.forward(x).backward(p.dy)

        found[name] = summary(kernels_of(step, PASSES), PASSES)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--case", type=parse, action="append", help="M,K,N,R,p; may be repeated")
    given = parser.parse_args()
    names = [n for n in ("frozen", "addmm", "cuda", "triton") if n in candidates_on("cuda")]
    console, document = Console(), dict(environment=environment("cuda"), cases=[])
    for case in given.case or [parse(text) for text in CASES]:
        found = profile(case, names)
        document["cases"].append(dict(case=case.name, candidates=found) | gpu_clocks(torch.cuda.current_device()))
        write_json(given.output, document)
        table = Table("candidate", "kernel", "calls", "us", title=case.name, title_justify="left", box=None)
        for name, rows in found.items():
            for r in rows:
                table.add_row(name, r["kernel"][:90], f"{r['calls']:.1f}", f"{r['us']:.1f}")
            table.add_row(name, "[bold]all", "", f"[bold]{sum(r['us'] for r in rows):.1f}")
        console.print(table)


if __name__ == "__main__":
    main()
