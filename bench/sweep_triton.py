"""Tile choices of the Triton kernels, timed against each other and against the frozen layer's GEMM, on one GPU, in at
most four minutes.

    python bench/sweep_triton.py [OUT.json] [--seconds 230]
    TRITON_INTERPRET=1 python bench/sweep_triton.py --check        every variant's result on a CPU, at a tiny size

A group of variants computes the same thing and runs interleaved with `x @ W.T` or `dy @ W`, over inputs that no cache
holds, as CUDA graphs. triton_variants.py has the groups.

Each result is checked against fp64 first; one that is wrong, or does not compile or fit, is reported and not timed. The
winners go to triton_kernels/configs.py by hand, with their line of the table.
"""

import argparse
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton_variants import GROUPS, Setting, Variant, variants

from fused_lora.bench import environment
from fused_lora.bench.runner import check
from fused_lora.bench.timing import Spread, captured, copies, interleave
from fused_lora.files import write_json
from fused_lora.hardware import gpu_clocks
from fused_lora.triton_kernels.configs import Device
from fused_lora.triton_kernels.device import facts

CASES = [
    (8192, N, 4096, R) for N, R in ((4096, 16), (4096, 64), (14336, 16), (1024, 16), (14336, 64), (1024, 64))
]  # M, N, K, R


def _poisoned(*args, made=torch.empty, **kwargs) -> Tensor:
    """torch.empty, where memory that held a right result before must not pass for one."""
    t = made(*args, **kwargs)
    return t.fill_(float("nan")) if t.is_floating_point() else t


def examine(s: Setting, group: str) -> tuple[dict[str, Variant], list[dict]]:
    """The variants whose results are right, and a row for each: its error, or why it is out."""
    exact, right, rows = s.truth(group), {}, []
    for name, variant in variants(s, group).items():
        row = dict(zip("MNKR", s.sizes)) | dict(group=group, variant=name)
        try:
            with mock.patch.object(torch, "empty", _poisoned):
                got = variant(s.given(group))
            row["max_error"] = check(name, got, exact, s.p.x.dtype)
            right[name] = variant
        except Exception as error:  # a wrong result, too much shared memory, a compiler's failure: the rest goes on
            row["refused"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]
        rows.append(row)
    return right, rows


def compile_share(share: tuple[int, int]) -> None:
    """Launch the index-th of every count variants of both ranks once; what fails here is reported by `examine`."""
    index, count = share
    for case in CASES[:2]:
        setting = Setting.of(case, torch.bfloat16, "cuda", facts(torch.device("cuda", 0)))
        for group, variant in [(g, v) for g in GROUPS for v in variants(setting, g).values()][index::count]:
            with suppress(Exception):
                variant(setting.given(group))


def compile_all(seconds: float) -> None:
    """Fill Triton's cache on disk from several processes: one alone would compile for minutes."""
    count = min(12, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(count) as pool:  # leaving it ends who is not done
        pool.map_async(compile_share, [(i, count) for i in range(count)], chunksize=1).wait(seconds)


def _graph_pass(variant: Variant, inputs: list[Tensor]) -> Callable[[], tuple[float]]:
    """One replay over all inputs; seconds for one of them."""
    replay = captured(lambda: deque(map(variant, inputs), maxlen=0))  # keeps no result

    def one() -> tuple[float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end) / 1e3 / len(inputs),)

    return one


def timed(s: Setting, group: str, budget_s: float) -> list[dict]:
    """Rows of a group with the times of every variant that is right."""
    right, rows = examine(s, group)
    inputs = [t.detach() for t in copies(s.given(group))]
    passes = {name: _graph_pass(variant, inputs) for name, variant in right.items()}
    times = interleave(passes, budget_s=budget_s)
    spreads = {name: Spread.of(series.seconds()) for name, series in times.items()}
    for row in rows:
        if row["variant"] in spreads:
            spread = spreads[row["variant"]]
            row |= dict(us=spread.median * 1e6, p20_us=spread.p20 * 1e6, p80_us=spread.p80 * 1e6, rounds=spread.count)
            row["ratio"] = spread.median / spreads["frozen"].median
    return rows


def show(rows: list[dict], console: Console) -> None:
    """One table, fastest first within a group, those that are out last."""
    table = Table("M x K -> N, R", "group", "variant", "us", "p20-p80", "x frozen", "max error")
    place = lambda r: (r["M"], r["N"], r["K"], r["R"], r["group"])  # noqa: E731
    order = {key: i for i, key in enumerate(dict.fromkeys(map(place, rows)))}
    for r in sorted(rows, key=lambda r: (order[place(r)], r.get("us", 1e9))):
        cells = ("", "", "")
        if "us" in r:
            cells = (f"{r['us']:.1f}", f"{r['p20_us']:.1f}-{r['p80_us']:.1f}", f"{r['ratio']:.3f}")
        last = f"{r['max_error']:.1e}" if "max_error" in r else r["refused"]
        style = "bold" if r["variant"] == "frozen" else None
        table.add_row(f"{r['M']} x {r['K']} -> {r['N']}, {r['R']}", r["group"], r["variant"], *cells, last, style=style)
    console.print(table)


def check_all(console: Console) -> int:
    """Every variant of every group at a tiny size in Triton's interpreter, on a pretended H100; returns how many are
    out."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--check runs in Triton's interpreter: set TRITON_INTERPRET=1")
    device, rows = Device(tma=True, sms=132, shared_bytes=232448), []
    for R in (16, 64):
        setting = Setting.of((136, 264, 144, R), torch.float16, "cpu", device)
        rows += [row for group in GROUPS for row in examine(setting, group)[1]]
    show(rows, console)
    return sum("refused" in row for row in rows)


def sweep(output: Path, seconds: float, console: Console) -> None:
    """All cases until the time is up; the JSON is written after each group, so that an end by force loses one."""
    end, rows, left_out = time.monotonic() + seconds, [], []
    compile_all(seconds / 3)
    device = facts(torch.device("cuda", 0))
    for case in CASES:
        setting = Setting.of(case, torch.bfloat16, "cuda", device)
        for group in GROUPS:
            if time.monotonic() > end:
                left_out.append("M={} N={} K={} R={} {}".format(*case, group))
                continue
            rows += [row | gpu_clocks(0) for row in timed(setting, group, budget_s=1.5)]
            write_json(output, dict(environment=environment("cuda"), rows=rows))
    show(rows, console)
    console.print("no time for:", "; ".join(left_out) or "nothing, all is there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("sweep_triton.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=230, help="no group begins after so many")
    parser.add_argument("--check", action="store_true", help="results only, in Triton's interpreter")
    given, console = parser.parse_args(), Console(width=200)
    raise SystemExit(check_all(console) if given.check else sweep(given.output, given.seconds, console))


if __name__ == "__main__":
    main()
