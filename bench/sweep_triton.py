"""Tile choices of the Triton kernels, timed against each other and against the frozen layer's GEMM, on one GPU, in at
most four minutes.

    python bench/sweep_triton.py [OUT.json] [--seconds 230]
    TRITON_INTERPRET=1 python bench/sweep_triton.py --check        every variant's result on a CPU, at a tiny size

A group of variants computes the same thing and runs interleaved with `x @ W.T` or `dy @ W`, over inputs that no cache
holds, as CUDA graphs:

    forward, dx      y and h, dx and dh: one launch, or shrink + lora_gemm; and lora_gemm alone from a given h, dh
    dh dB            dy_pass against shrink + wgrad
    shrink, wgrad    h from x, dA from x and dh

Each result is checked against fp64 first; one that is wrong, or does not compile or fit, is reported and not timed. The
winners go to triton_kernels/configs.py by hand, with their line of the table.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.configs import Device, GemmConfig, ThinConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_lora.backends import triton as backend
from fused_lora.bench import environment
from fused_lora.bench.runner import check
from fused_lora.bench.timing import Spread, _captured, copies, interleave
from fused_lora.files import write_whole
from fused_lora.testing import Problem, random_problem

CASES = [
    (8192, N, 4096, R) for N, R in ((4096, 16), (4096, 64), (14336, 16), (1024, 16), (14336, 64), (1024, 64))
]  # M, N, K, R
GROUPS = ["dh dB", "forward", "dx", "shrink", "wgrad"]
Variant = Callable[[Tensor], dict[str, Tensor]]  # from x or dy, whichever the group reads


@dataclass
class Setting:
    """One case: inputs, and the intermediates that a kernel is given when it is timed alone."""

    p: Problem
    h: Tensor  # [M, R], in x's dtype
    dh: Tensor  # [M, R]
    device: Device
    sizes: tuple[int, int, int, int]  # M, N, K, R

    @classmethod
    def of(cls, sizes: tuple[int, int, int, int], dtype: torch.dtype, where: str, device: Device) -> "Setting":
        p = random_problem(*sizes, dtype, torch.float32, bias=False, device=where)
        h, dh = p.x.double() @ p.lora_A.double().t(), p.dy.double() @ p.lora_B.double()
        return cls(p, (p.scaling * h).to(dtype), (p.scaling * dh).to(dtype), device, sizes)

    def given(self, group: str) -> Tensor:
        """What the group reads, and must find cold."""
        return self.p.dy if group in ("dx", "dh dB") else self.p.x

    def truth(self, group: str) -> dict[str, Tensor]:
        """What the group's variants compute, in fp64 from the same inputs and intermediates."""
        x, weight, A, B, dy, h, dh = (
            t.double() for t in (self.p.x, self.p.weight, self.p.lora_A, self.p.lora_B, self.p.dy, self.h, self.dh)
        )
        frozen = dy @ weight if group in ("dx", "dh dB") else x @ weight.t()
        made = {
            "forward": lambda: {"y": frozen + h @ B.t(), "h": h},
            "dx": lambda: {"dx": frozen + dh @ A, "dh": dh},
            "dh dB": lambda: {"dh": dh, "dB": dy.t() @ h},
            "shrink": lambda: {"h": h},
            "wgrad": lambda: {"dA": dh.t() @ x},
        }
        return made[group]() | {"frozen": frozen}


def told(c: GemmConfig | ThinConfig) -> str:
    """In a table's words."""
    return " ".join(f"{key.removeprefix('BLOCK_').removeprefix('num_')}={value}" for key, value in vars(c).items())


def _persistent(c: GemmConfig, M: int, N: int, device: Device, **change) -> GemmConfig:
    c = replace(c, **change)
    return replace(c, programs=min(device.sms, -(-M // c.BLOCK_M) * -(-N // c.BLOCK_N)))


def gemm_configs(M: int, N: int, K: int, R: int, device: Device) -> list[GemmConfig]:
    """Of lora_gemm: today's choice, and what differs from the large tile in one respect."""
    now = configs.gemm_config(M, N, K, R, 2, False, device)
    large = replace(now, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_stages=3, num_warps=8)
    changes = [
        {},
        dict(GROUP_M=4),
        dict(GROUP_M=16),
        dict(PREFETCH=not now.PREFETCH),
        dict(BLOCK_N=128, num_stages=4),
        dict(BLOCK_N=128, BLOCK_K=128),
        dict(BLOCK_M=256, BLOCK_N=128),
        dict(BLOCK_M=64, num_stages=4, num_warps=4),
    ]
    changes += [dict(BLOCK_R=64), dict(BLOCK_R=64, PREFETCH=True)] if R > 32 else []
    return list(dict.fromkeys([now, *(_persistent(large, M, N, device, **change) for change in changes)]))


def gemm_shrink_configs(M: int, N: int, R: int, device: Device) -> list[GemmConfig]:
    """Of lora_gemm_shrink, which takes the rank in one block."""
    block_r = max(16, 1 << (R - 1).bit_length())
    large = GemmConfig(128, 256, 64, block_r, 8, 3, 8, device.sms, PREFETCH=block_r <= 32)
    changes = [
        {},
        dict(num_stages=4),
        dict(GROUP_M=4),
        dict(GROUP_M=16),
        dict(PREFETCH=not large.PREFETCH),
        dict(BLOCK_N=128, num_stages=4),
    ]
    return [_persistent(large, M, N, device, **change) for change in changes]


def _split_over_rows(
    now: ThinConfig | None, tiles: list[tuple], M: int, C: int, BLOCK_R: int, sms: int
) -> list[ThinConfig]:
    """The choice of today, and tiles of (rows, columns, stages, warps) in as many splits as make one or two programs a
    multiprocessor."""
    made = [now] if now else []
    for (BLOCK_M, BLOCK_C, stages, warps), programs in itertools.product(tiles, (sms, 2 * sms)):
        splits = max(1, programs // -(-C // BLOCK_C))
        rows = -(-M // splits // BLOCK_M) * BLOCK_M
        made.append(ThinConfig(BLOCK_M, BLOCK_C, BLOCK_R, stages, warps, -(-M // rows), rows))
    return list(dict.fromkeys(made))


def dy_pass_configs(M: int, N: int, R: int, device: Device) -> list[ThinConfig]:
    tiles = [
        (64, 256, 4, 4),
        (64, 256, 3, 4),
        (64, 512, 3, 8),
        (32, 512, 4, 4),
        (64, 128, 4, 4),
        (128, 256, 3, 8),
        (32, 256, 4, 4),
        (64, 256, 4, 8),
    ]
    now = configs.dy_pass_config(M, N, R, 2, device)
    return _split_over_rows(now, tiles, M, N, max(16, 1 << (R - 1).bit_length()), device.sms)


def wgrad_configs(M: int, C: int, R: int, device: Device) -> list[ThinConfig]:
    tiles = [(64, 128, 5, 4), (64, 256, 4, 4), (64, 256, 3, 8), (128, 128, 3, 4), (32, 256, 5, 4)]
    now = configs.wgrad_config(M, C, R, 2, device)
    return _split_over_rows(now, tiles, M, C, now.BLOCK_R, device.sms)


def shrink_configs(M: int, K: int, R: int, device: Device) -> list[ThinConfig]:
    now = configs.shrink_config(M, K, R, 2, device)
    tiles = [
        (16, 256, 4, 4),
        (32, 128, 4, 4),
        (32, 256, 3, 4),
        (32, 256, 6, 4),
        (32, 512, 3, 4),
        (32, 256, 4, 8),
        (16, 512, 4, 4),
        (16, 256, 4, 2),
    ]
    return list(
        dict.fromkeys(
            [now, *(replace(now, BLOCK_M=m, BLOCK_WIDE=k, num_stages=s, num_warps=w) for m, k, s, w in tiles)]
        )
    )


def _big_product(s: Setting, forward: bool) -> dict[str, Variant]:
    """y and h from x, or dx and dh from dy."""
    p, (M, N, K, R) = s.p, s.sizes
    rank, thin, given_low = (p.lora_A, p.lora_B, s.h) if forward else (p.lora_B, p.lora_A, s.dh)
    out, aside, wide, along = (
        ("y", "h", N, K) if forward else ("dx", "dh", K, N)
    )  # names; the result's columns, the sums' length
    of_thin = (R, 1) if forward else (1, K)  # strides along its columns, its rank
    of_rank = (K, 1) if forward else (1, R)  # strides along its rank, along the sums

    def gemm(left, low, c=None):
        return backend._lora_gemm(left, p.weight, forward, low, thin, *of_thin, None, 0.0, None, c)

    def two(left):
        low = backend._shrink(left, rank, *of_rank, R, p.scaling, 0.0, None)
        return {out: gemm(left, low), aside: low}

    def one(left, c):
        made = backend._lora_gemm_shrink(
            left, p.weight, forward, thin, *of_thin, None, p.scaling, c, rank.to(left.dtype)
        )
        return dict(zip((out, aside), made))

    made = {
        f"lora_gemm {told(c)}": lambda left, c=c: {out: gemm(left, given_low, c)}
        for c in gemm_configs(M, wide, along, R, s.device)
    }
    return (
        {"shrink + lora_gemm": two}
        | made
        | {f"one launch {told(c)}": lambda left, c=c: one(left, c) for c in gemm_shrink_configs(M, wide, R, s.device)}
    )


def variants(s: Setting, group: str) -> dict[str, Variant]:
    """Every way to compute the group's results, by name, and the frozen layer's GEMM."""
    p, (M, N, K, R) = s.p, s.sizes

    def shrink(x, thin, along, c=None):
        return backend._shrink(x, thin, *along, R, p.scaling, 0.0, None, c)

    def wgrad(thin, wide, shape, along, c=None):
        return backend._wgrad(thin, wide, torch.empty(shape, device=wide.device), *along, 0.0, None, c)

    frozen = {"frozen": lambda left: {"frozen": left @ (p.weight if group in ("dx", "dh dB") else p.weight.t())}}
    if group in ("forward", "dx"):
        return frozen | _big_product(s, group == "forward")
    if group == "dh dB":
        two = {"shrink + wgrad": lambda dy: {"dh": shrink(dy, p.lora_B, (1, R)), "dB": wgrad(s.h, dy, (N, R), (1, R))}}
        one = lambda dy, c: dict(zip(("dh", "dB"), backend._dy_pass(dy, p.lora_B, s.h, p.scaling, c)))  # noqa: E731
        return (
            frozen
            | two
            | {f"dy_pass {told(c)}": lambda dy, c=c: one(dy, c) for c in dy_pass_configs(M, N, R, s.device)}
        )
    if group == "shrink":
        return frozen | {
            f"shrink {told(c)}": lambda x, c=c: {"h": shrink(x, p.lora_A, (K, 1), c)}
            for c in shrink_configs(M, K, R, s.device)
        }
    if group == "wgrad":
        return frozen | {
            f"wgrad {told(c)}": lambda x, c=c: {"dA": wgrad(s.dh, x, (R, K), (K, 1), c)}
            for c in wgrad_configs(M, K, R, s.device)
        }
    raise ValueError(f"group must be among {', '.join(GROUPS)}; got {group!r}")


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
        setting = Setting.of(case, torch.bfloat16, "cuda", backend._device(torch.device("cuda", 0)))
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
    replay = _captured(lambda: deque(map(variant, inputs), maxlen=0))  # keeps no result

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
    inputs = [t.detach() for t in copies(s.given(group), 256 << 20)]  # more bytes than any L2 holds
    passes = {name: _graph_pass(variant, inputs) for name, variant in right.items()}
    spreads = {name: Spread.of([t for (t,) in ts]) for name, ts in interleave(passes, budget_s=budget_s).items()}
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
        cells = (
            (f"{r['us']:.1f}", f"{r['p20_us']:.1f}-{r['p80_us']:.1f}", f"{r['ratio']:.3f}")
            if "us" in r
            else ("", "", "")
        )
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
    with mock.patch.object(backend, "_device", lambda _: device):
        for R in (16, 64):
            setting = Setting.of((136, 264, 144, R), torch.float16, "cpu", device)
            rows += [row for group in GROUPS for row in examine(setting, group)[1]]
    show(rows, console)
    return sum("refused" in row for row in rows)


def sweep(output: Path, seconds: float, console: Console) -> None:
    """All cases until the time is up; the JSON is written after each group, so that an end by force loses one."""
    end, rows, left_out = time.monotonic() + seconds, [], []
    compile_all(seconds / 3)
    device = backend._device(torch.device("cuda", 0))
    for case in CASES:
        setting = Setting.of(case, torch.bfloat16, "cuda", device)
        for group in GROUPS:
            if time.monotonic() > end:
                left_out.append("M={} N={} K={} R={} {}".format(*case, group))
                continue
            rows += timed(setting, group, budget_s=1.5)
            write_whole(
                {output: (json.dumps(dict(environment=environment("cuda"), rows=rows), indent=1) + "\n").encode()}
            )
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
