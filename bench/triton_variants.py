"""What bench/sweep_triton.py times: for each group, every way to compute the same results with the Triton kernels.

backward         dx, dA and dB by each of the back end's plans, the launches together
forward, dx      y and h, dx and dh: one launch, or shrink + lora_gemm; and lora_gemm alone from a given h, dh
dh dB            dy_pass against shrink + wgrad
shrink, wgrad    h from x, dA from x and dh
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fused_lora.backends import Request, bucket, triton
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.testing import Problem, random_problem
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.configs import Device, GemmConfig, ShrinkConfig, WgradConfig
from fused_lora.triton_kernels.dy_pass import dy_pass
from fused_lora.triton_kernels.lora_gemm import lora_gemm
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink
from fused_lora.triton_kernels.shrink import shrink
from fused_lora.triton_kernels.wgrad import wgrad

GROUPS = ["backward", "dh dB", "forward", "dx", "shrink", "wgrad"]
OF_DY = ("backward", "dx", "dh dB")
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
        return self.p.dy if group in OF_DY else self.p.x

    def truth(self, group: str) -> dict[str, Tensor]:
        """What the group's variants compute, in fp64 from the same inputs and intermediates."""
        x, weight, A, B, dy, h, dh = (
            t.double() for t in (self.p.x, self.p.weight, self.p.lora_A, self.p.lora_B, self.p.dy, self.h, self.dh)
        )
        frozen = dy @ weight if group in OF_DY else x @ weight.t()
        made = {
            "backward": lambda: {"dx": frozen + dh @ A, "dA": dh.t() @ x, "dB": dy.t() @ h},
            "forward": lambda: {"y": frozen + h @ B.t(), "h": h},
            "dx": lambda: {"dx": frozen + dh @ A, "dh": dh},
            "dh dB": lambda: {"dh": dh, "dB": dy.t() @ h},
            "shrink": lambda: {"h": h},
            "wgrad": lambda: {"dA": dh.t() @ x},
        }
        return made[group]() | {"frozen": frozen}


def told(c: GemmConfig | ShrinkConfig | WgradConfig) -> str:
    """In a table's words."""
    return " ".join(f"{key.removeprefix('BLOCK_').removeprefix('num_')}={value}" for key, value in asdict(c).items())


def _persistent(c: GemmConfig, M: int, N: int, device: Device, **change) -> GemmConfig:
    c = replace(c, **change)
    return replace(c, programs=min(device.sms, -(-M // c.BLOCK_M) * -(-N // c.BLOCK_N)))


def gemm_configs(M: int, N: int, K: int, R: int, device: Device) -> list[GemmConfig]:
    """Of lora_gemm: today's choice, and what differs from the large tile in one respect."""
    now = configs.gemm_config(M, N, K, R, 2, False, device)
    large = replace(now, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_stages=3, num_warps=8)
    changes = [{}, dict(GROUP_M=4), dict(GROUP_M=16), dict(PREFETCH=not now.PREFETCH), dict(BLOCK_N=128, num_stages=4)]
    changes += [dict(BLOCK_N=128, BLOCK_K=128), dict(BLOCK_M=256, BLOCK_N=128)]
    changes += [dict(BLOCK_M=64, num_stages=4, num_warps=4)]
    changes += [dict(BLOCK_R=64), dict(BLOCK_R=64, PREFETCH=True)] if R > 32 else []
    return list(dict.fromkeys([now, *(_persistent(large, M, N, device, **change) for change in changes)]))


def gemm_shrink_configs(M: int, N: int, R: int, device: Device) -> list[GemmConfig]:
    """Of lora_gemm_shrink, which takes the rank in one block."""
    block_r = max(16, 1 << (R - 1).bit_length())
    large = GemmConfig(128, 256, 64, block_r, 8, 3, 8, device.sms, tma=True, PREFETCH=block_r <= 32)
    changes = [{}, dict(num_stages=4), dict(GROUP_M=4), dict(GROUP_M=16), dict(PREFETCH=not large.PREFETCH)]
    changes += [dict(BLOCK_N=128, num_stages=4)]
    return [_persistent(large, M, N, device, **change) for change in changes]


def _split_over_rows(
    now: WgradConfig | None, tiles: list[tuple], M: int, C: int, BLOCK_R: int, sms: int
) -> list[WgradConfig]:
    """The choice of today, and tiles of (rows, columns, stages, warps) in as many splits as make one or two programs a
    multiprocessor."""
    made = [now] if now else []
    for (BLOCK_M, BLOCK_C, stages, warps), programs in itertools.product(tiles, (sms, 2 * sms)):
        splits = max(1, programs // -(-C // BLOCK_C))
        rows = -(-M // splits // BLOCK_M) * BLOCK_M
        made.append(WgradConfig(BLOCK_M, BLOCK_C, BLOCK_R, stages, warps, -(-M // rows), rows))
    return list(dict.fromkeys(made))


def dy_pass_configs(M: int, N: int, R: int, device: Device) -> list[WgradConfig]:
    tiles = [(64, 256, 4, 4), (64, 256, 3, 4), (64, 512, 3, 8), (32, 512, 4, 4)]
    tiles += [(64, 128, 4, 4), (128, 256, 3, 8), (32, 256, 4, 4), (64, 256, 4, 8)]
    now = configs.dy_pass_config(M, N, R, 2, device)
    return _split_over_rows(now, tiles, M, N, max(16, 1 << (R - 1).bit_length()), device.sms)


def wgrad_configs(M: int, C: int, R: int, device: Device) -> list[WgradConfig]:
    tiles = [(64, 128, 5, 4), (64, 256, 4, 4), (64, 256, 3, 8), (128, 128, 3, 4), (32, 256, 5, 4)]
    now = configs.wgrad_config(M, C, R, 2, device)
    return _split_over_rows(now, tiles, M, C, now.BLOCK_R, device.sms)


def shrink_configs(M: int, K: int, R: int, device: Device) -> list[ShrinkConfig]:
    now = configs.shrink_config(M, K, R, 2, device)
    tiles = [(16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 3, 4), (32, 256, 6, 4)]
    tiles += [(32, 512, 3, 4), (32, 256, 4, 8), (16, 512, 4, 4), (16, 256, 4, 2)]
    changed = (replace(now, BLOCK_M=m, BLOCK_K=k, num_stages=s, num_warps=w) for m, k, s, w in tiles)
    return list(dict.fromkeys([now, *changed]))


def _big_product(s: Setting, forward: bool) -> dict[str, Variant]:
    """y and h from x, or dx and dh from dy: in two launches, lora_gemm alone from a given low, and in one launch."""
    p, (M, N, K, R) = s.p, s.sizes
    down, thin, given_low = (p.lora_A, p.lora_B, s.h) if forward else (p.lora_B, p.lora_A, s.dh)
    out, low = ("y", "h") if forward else ("dx", "dh")
    columns, along = (N, K) if forward else (K, N)  # the result's columns, the sums' length
    shrink_now = configs.shrink_config(M, along, R, 2, s.device)
    gemm_now = configs.gemm_config(M, columns, along, R, 2, False, s.device)

    def two(left):
        made = shrink(left, down, p.scaling, shrink_now, down_rk=forward)
        return {out: lora_gemm(left, p.weight, made, thin, None, gemm_now, right_nk=forward), low: made}

    def alone(left, c):
        return {out: lora_gemm(left, p.weight, given_low, thin, None, c, right_nk=forward)}

    def one(left, c):
        made = lora_gemm_shrink(left, p.weight, down, thin, None, p.scaling, c, right_nk=forward)
        return dict(zip((out, low), made))

    return (
        {"shrink + lora_gemm": two}
        | {f"lora_gemm {told(c)}": partial(alone, c=c) for c in gemm_configs(M, columns, along, R, s.device)}
        | {f"one launch {told(c)}": partial(one, c=c) for c in gemm_shrink_configs(M, columns, R, s.device)}
    )


def _both_from_dy(s: Setting) -> dict[str, Variant]:
    """dh and dB from dy: in two reads of it, and in one."""
    p, (M, N, _, R) = s.p, s.sizes
    shrink_now, wgrad_now = configs.shrink_config(M, N, R, 2, s.device), configs.wgrad_config(M, N, R, 2, s.device)

    def two(dy):
        dh = shrink(dy, p.lora_B, p.scaling, shrink_now, down_rk=False)
        return {"dh": dh, "dB": wgrad(s.h, dy, p.lora_B.dtype, wgrad_now, transposed=True)}

    def one(dy, c):
        return dict(zip(("dh", "dB"), dy_pass(dy, p.lora_B, s.h, p.scaling, c)))

    made = {f"dy_pass {told(c)}": partial(one, c=c) for c in dy_pass_configs(M, N, R, s.device)}
    return {"shrink + wgrad": two} | made


def _whole_backward(s: Setting) -> dict[str, Variant]:
    """dx, dA and dB from dy, by the plans that `fused-lora tune` tries."""
    p, (M, N, K, R) = s.p, s.sizes
    request = Request(p.x.device, p.x.dtype, p.lora_A.dtype, bucket(M), N, K, R, aligned=True, optional=())
    needs = Gradients(x=True, lora_A=True, lora_B=True, bias=False)

    def made(dy, plan):
        given = (p.x, p.weight, p.lora_A, p.lora_B, s.h, None, None, p.scaling, 0.0, None)
        found = triton.backward(dy, None, *given, needs, PLAIN, plan)
        return {"dx": found.x, "dA": found.lora_A, "dB": found.lora_B}

    return {f"plan {plan or 'of the heuristics'}": partial(made, plan=plan) for plan in triton.plans(request)}


def variants(s: Setting, group: str) -> dict[str, Variant]:
    """Every way to compute the group's results, by name, and the frozen layer's GEMM."""
    p, (M, _, K, R) = s.p, s.sizes
    frozen = {"frozen": lambda left: {"frozen": left @ (p.weight if group in OF_DY else p.weight.t())}}
    if group == "backward":
        return frozen | _whole_backward(s)
    if group in ("forward", "dx"):
        return frozen | _big_product(s, group == "forward")
    if group == "dh dB":
        return frozen | _both_from_dy(s)
    if group == "shrink":
        made = lambda x, c: {"h": shrink(x, p.lora_A, p.scaling, c, down_rk=True)}  # noqa: E731
        return frozen | {f"shrink {told(c)}": partial(made, c=c) for c in shrink_configs(M, K, R, s.device)}
    if group == "wgrad":
        made = lambda x, c: {"dA": wgrad(s.dh, x, p.lora_A.dtype, c)}  # noqa: E731
        return frozen | {f"wgrad {told(c)}": partial(made, c=c) for c in wgrad_configs(M, K, R, s.device)}
    raise ValueError(f"group must be among {', '.join(GROUPS)}; got {group!r}")
