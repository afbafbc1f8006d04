"""Which launches serve a call, with which tiles and splits: pure functions of sizes, dtype and device properties, so
that they are tested without a GPU.

No table by GPU name and no tuning at call time. A figure behind a choice names the device and the date. A caller may
say the words of PLAN_WORDS, the rest is chosen here. Planned on request only is one_launch (lora_gemm_shrink): an H100
found it level with two launches or slower (2026-11-26). It is compiled for every target and right in the interpreter;
`fused-lora tune` and bench/sweep_triton.py ask for it and time it.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import NamedTuple


class Device(NamedTuple):
    """What the choices depend on."""

    tma: bool  # has the tensor memory accelerator (compute capability >= 9.0)
    sms: int  # multiprocessors, or compute units
    shared_bytes: int  # shared memory that one program may use


# (word, the argument of forward_plan or backward_plan that it stands for, its value)
PLAN_WORDS = (
    ("one_launch", "one_launch", True),
    ("no_prefetch", "prefetch", False),
    ("narrow", "narrow", True),
    ("one_read", "one_read", True),
    ("two_reads", "one_read", False),
)


class _Config:
    """A launch's tile, grid and options, of which some are the kernel's constexprs."""

    @cached_property
    def constexprs(self) -> dict[str, int]:
        """What the kernel and the compiler take: the fields in capitals, num_stages and num_warps."""
        taken = (f.name for f in fields(self) if f.name.isupper() or f.name.startswith("num_"))
        return {name: getattr(self, name) for name in taken}


@dataclass(frozen=True)
class GemmConfig(_Config):
    """Of lora_gemm and lora_gemm_shrink."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_stages: int
    num_warps: int
    programs: int  # grid
    tma: bool  # left, right and out go through descriptors, where they lie in memory as those need it
    PREFETCH: bool = False  # the first low-rank tiles are loaded before the loop over K, into registers


@dataclass(frozen=True)
class ShrinkConfig(_Config):
    """Of shrink, low_gradient and grouped_shrink."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_stages: int
    num_warps: int


@dataclass(frozen=True)
class ExpandConfig(_Config):
    """Of expand and grouped_expand."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_stages: int
    num_warps: int


@dataclass(frozen=True)
class WgradConfig(_Config):
    """Of wgrad, grouped_wgrad and dy_pass; BLOCK_C cuts the columns of the wide matrix."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_stages: int
    num_warps: int
    splits: int
    rows_per_split: int


class ForwardPlan(NamedTuple):
    """The launches that make h and y, each with its config: shrink and lora_gemm, or one launch for both."""

    shrink: ShrinkConfig | None = None  # h
    lora_gemm: GemmConfig | None = None  # y
    lora_gemm_shrink: GemmConfig | None = None  # y and h


class BackwardPlan(NamedTuple):
    """The launches that make the needed gradients, each with its config, in this order; None where there is none."""

    low_gradient: ShrinkConfig | None = None  # with optional tensors: dh and what else comes back to the low-rank path
    lora_gemm_shrink: GemmConfig | None = None  # dx and dh
    dy_pass: WgradConfig | None = None  # dh and dB
    shrink: ShrinkConfig | None = None  # dh
    wgrad_B: WgradConfig | None = None  # dB
    lora_gemm: GemmConfig | None = None  # dx
    wgrad_A: WgradConfig | None = None  # dA


@lru_cache(maxsize=4096)
def forward_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    dropout: bool,
    device: Device,
    *,
    one_launch: bool = False,
    prefetch: bool = True,
    narrow: bool = False,
) -> ForwardPlan:
    """What makes h [M, R] from x [M, K], and y [M, N].

    Args:
        itemsize: bytes of an element of x.
        one_launch: lora_gemm_shrink where it can serve and is expected to pay; its operands' rows must then start on 16
            bytes.
        prefetch: in lora_gemm the first low-rank tiles are loaded before the loop over K, where that is possible.
        narrow: tiles of lora_gemm are 128 columns wide where they would be 256.
    """
    if one_launch and not dropout and (both := gemm_shrink_config(M, N, K, R, itemsize, device)):
        return ForwardPlan(lora_gemm_shrink=both)
    gemm = gemm_config(M, N, K, R, itemsize, False, device, prefetch, narrow)
    return ForwardPlan(shrink=shrink_config(M, K, R, itemsize, device), lora_gemm=gemm)


@lru_cache(maxsize=4096)
def backward_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    dropout: bool,
    dx: bool,
    dA: bool,
    dB: bool,
    device: Device,
    *,
    plain: bool = True,
    one_launch: bool = False,
    prefetch: bool = True,
    narrow: bool = False,
    one_read: bool | None = None,
) -> BackwardPlan:
    """What makes the needed ones of dx [M, K], dA [R, K] and dB [N, R] from dy [M, N], and dh [M, R] for the first two.

    Args:
        dx, dA, dB: whether each is needed.
        plain: whether the op has no optional tensors; else low_gradient makes dh.
        one_read: dh and dB come from dy_pass, or each from a read of dy of its own; None: whichever should be faster.
        The others as in `forward_plan`.
    """
    dh = dx or dA
    wgrad_A = wgrad_config(M, K, R, itemsize, device) if dA else None
    if not plain:
        return BackwardPlan(
            low_gradient=low_gradient_config(M, N, R, itemsize, device),
            wgrad_B=wgrad_config(M, N, R, itemsize, device) if dB else None,
            lora_gemm=gemm_config(M, K, N, R, itemsize, dropout, device, prefetch, narrow) if dx else None,
            wgrad_A=wgrad_A,
        )
    dy_pass = dy_pass_config(M, N, R, itemsize, device, one_read) if dh and dB else None
    if one_launch and dx and dy_pass is None and not dropout:
        both = gemm_shrink_config(M, K, N, R, itemsize, device)
        if both is not None:
            wgrad_B = wgrad_config(M, N, R, itemsize, device) if dB else None
            return BackwardPlan(lora_gemm_shrink=both, wgrad_B=wgrad_B, wgrad_A=wgrad_A)
    return BackwardPlan(
        dy_pass=dy_pass,
        shrink=shrink_config(M, N, R, itemsize, device) if dh and dy_pass is None else None,
        wgrad_B=wgrad_config(M, N, R, itemsize, device) if dB and dy_pass is None else None,
        lora_gemm=gemm_config(M, K, N, R, itemsize, dropout, device, prefetch, narrow) if dx else None,
        wgrad_A=wgrad_A,
    )


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv looks for constexprs first, for 1.9 us (EPYC 9005, Triton 3.9)."""
    return -(-a // b)


def _power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least n, within bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def _stages(shared_bytes: int, bytes_per_stage: int, most: int) -> int:
    return max(1, min(most, shared_bytes // bytes_per_stage))


def gemm_config(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    dropout: bool,
    device: Device,
    prefetch: bool = True,
    narrow: bool = False,
) -> GemmConfig:
    """Tiles of lora_gemm for out [M, N] = left [M, K] @ right + low [M, R] @ thin.

    128 x 256 x 64 with eight warps reaches cuBLAS on an H100, 128 x 128 x 64 is 1.17 times as slow (Triton 3.6, 8192 x
    4096 x 4096, bf16, 2026-11-23). Dropout needs a second accumulator, for which 256 columns have no registers left.
    """
    BLOCK_R = _power_of_two(R, 16, 32)
    BLOCK_K = 64 if device.tma else 32
    if itemsize == 4:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = 64, 64, 32, 4, 3
    elif M <= 64:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = _power_of_two(M, 16, 64), 64, 128, 4, 5
    elif device.tma and not (dropout or narrow) and cdiv(M, 128) * cdiv(N, 256) * 2 > device.sms:
        BLOCK_M, BLOCK_N, warps, most = 128, 256, 8, 3
    elif cdiv(M, 128) * cdiv(N, 128) * 2 > device.sms:
        BLOCK_M, BLOCK_N, warps, most = 128, 128, 8 if device.tma or dropout else 4, 4
    else:
        BLOCK_M, BLOCK_N, warps, most = 64, 128, 4, 4
    out_tile = BLOCK_M * BLOCK_N * itemsize if device.tma else 0  # staged for the TMA store
    low_rank = (BLOCK_M + BLOCK_N) * BLOCK_R * itemsize
    stages = _stages(device.shared_bytes - max(out_tile, low_rank), (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize, most)
    tiles = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    # With TMA one program a multiprocessor walks over the tiles; without it the hardware's own scheduler overlaps tiles
    # better.
    programs = min(tiles, device.sms) if device.tma and warps == 8 else tiles
    # Prefetched tiles make both directions 1 to 3 % faster in each of eight cases (H100, Triton 3.6, 2026-11-26). They
    # wait in registers: at 128 x 256 a rank block of 32 takes 225 of the 255 (compiled for sm_90). Several blocks come
    # in a loop of their own; with the first apart from it, Triton 3.6 wants more tensor memory than sm_100 has.
    prefetch = prefetch and device.tma and itemsize < 4 and R <= BLOCK_R
    return GemmConfig(BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, 8, stages, warps, programs, device.tma, prefetch)


def gemm_shrink_config(M: int, N: int, K: int, R: int, itemsize: int, device: Device) -> GemmConfig | None:
    """Tiles of lora_gemm_shrink, the one launch that makes low too; None where it cannot serve, or shrink and lora_gemm
    are the better choice.

    It takes TMA, the large tile, tiles for every multiprocessor, so that few wait for the first column, and a rank
    block that leaves three stages of shared memory. On an H100 a probe of this form took 396 us, shrink and lora_gemm
    35 + 383 us (8192 x 4096 x 4096, bf16, R = 16, Triton 3.6, 2026-11-23); this kernel itself is level with the two or
    slower (H200, 2026-11-26).
    """
    c = gemm_config(M, N, K, R, itemsize, False, device)
    few_tiles = cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N) < device.sms
    if not device.tma or itemsize == 4 or R > c.BLOCK_R or c.BLOCK_N < 256 or few_tiles:
        return None
    stages = _stages(device.shared_bytes - 1024, (c.BLOCK_M + c.BLOCK_N + c.BLOCK_R) * c.BLOCK_K * itemsize, 3)
    return replace(c, num_stages=stages, PREFETCH=True) if stages == 3 else None


def shrink_config(M: int, K: int, R: int, itemsize: int, device: Device) -> ShrinkConfig:
    """Tiles of shrink for low [M, R] from left [M, K]: enough rows in flight to stream left at the memory's speed."""
    BLOCK_R = _power_of_two(R, 16, 128)
    BLOCK_M = 32 if cdiv(M, 32) >= device.sms else 16
    BLOCK_K = (128 if BLOCK_R <= 64 else 64) * (1 if itemsize == 4 else 2)
    stages = _stages(device.shared_bytes // 2, (BLOCK_M + BLOCK_R) * BLOCK_K * itemsize, 4)
    return ShrinkConfig(BLOCK_M, BLOCK_K, BLOCK_R, stages, 4)


def low_gradient_config(M: int, N: int, R: int, itemsize: int, device: Device) -> ShrinkConfig:
    """Tiles of low_gradient for dh [M, R] from dy [M, N]: shrink's with half the depth, as tiles of y and dz may lie
    beside dy's in registers. Timed within DoRA's step alone (bench/NOTES.md)."""
    c = shrink_config(M, N, R, itemsize, device)
    BLOCK_K = c.BLOCK_K // 2
    thin = c.BLOCK_R * BLOCK_K * 4  # an fp32 factor, as it comes
    stages = _stages(device.shared_bytes // 2, 2 * c.BLOCK_M * BLOCK_K * itemsize + thin, 4)
    return replace(c, BLOCK_K=BLOCK_K, num_stages=stages)


def expand_config(M: int, N: int, R: int, itemsize: int) -> ExpandConfig:
    """Tiles of expand for out [M, N]: wide in N, along which memory is read and written. No GPU has timed it yet."""
    BLOCK_M, BLOCK_N = (64, 128) if itemsize < 4 else (64, 64)
    return ExpandConfig(_power_of_two(M, 16, BLOCK_M), BLOCK_N, _power_of_two(R, 16, 64), 2, 4)


def wgrad_config(M: int, C: int, R: int, itemsize: int, device: Device) -> WgradConfig:
    """Tiles and splits of wgrad for out [R, C] from left [M, C]: two programs a multiprocessor, at least 256 rows for
    each."""
    BLOCK_R = _power_of_two(R, 16, 64)
    BLOCK_M, BLOCK_C = (64, 128) if itemsize < 4 else (32, 64)
    stages = _stages(device.shared_bytes // 2, (BLOCK_C + BLOCK_R) * BLOCK_M * itemsize, 4)
    tiles = cdiv(C, BLOCK_C) * cdiv(R, BLOCK_R)
    splits = max(1, min(2 * device.sms // tiles, M // 256))
    rows_per_split = cdiv(cdiv(M, splits), BLOCK_M) * BLOCK_M
    return WgradConfig(BLOCK_M, BLOCK_C, BLOCK_R, stages, 4, cdiv(M, rows_per_split), rows_per_split)


def dy_pass_config(
    M: int, N: int, R: int, itemsize: int, device: Device, wanted: bool | None = None
) -> WgradConfig | None:
    """Tiles and splits of dy_pass, two programs a multiprocessor; None where shrink and wgrad, which read dy twice, are
    the better choice, unless it is `wanted`, and beyond 32 ranks.

    That is where the fp32 slabs, 8 R (1 / BLOCK_C + 1 / rows of a split) bytes for an element of dy written and read,
    pass two fifths of dy's own bytes: in bf16 from about R = 20 on, and for narrow N (8192 x 1024 at R = 16 takes a
    half). Larger ranks want larger tiles than there are registers for. Evidence: on an H100 an untuned pass with fp32
    atomics took 44 us against 38 for dB's part alone and 35 for dh's (8192 x 4096, R = 16, Triton 3.6, 2026-11-23);
    this kernel's own measurement is pending.
    """
    BLOCK_R = _power_of_two(R, 16, 32)
    BLOCK_M, BLOCK_C = (64 if device.tma and itemsize < 4 else 32), (256 if itemsize < 4 else 128)
    blocks = cdiv(N, BLOCK_C)
    splits = max(1, min(2 * device.sms // blocks, M // (4 * BLOCK_M)))
    rows_per_split = cdiv(cdiv(M, splits), BLOCK_M) * BLOCK_M
    splits = cdiv(M, rows_per_split)
    slab_bytes = 8 * R * ((blocks > 1) / BLOCK_C + (splits > 1) / rows_per_split)
    if R > BLOCK_R or wanted is False or (wanted is None and slab_bytes > 0.4 * itemsize):
        return None
    beside = BLOCK_C * BLOCK_R * itemsize + 2 * BLOCK_M * BLOCK_R * 4  # the B tile; h and dh tiles on their way
    stages = 1 + _stages(device.shared_bytes // 2 - beside, BLOCK_M * BLOCK_C * itemsize, 3)
    return WgradConfig(BLOCK_M, BLOCK_C, BLOCK_R, stages, 4, splits, rows_per_split)


def grouped_shrink_config(P: int, G: int, K: int, R: int, itemsize: int, device: Device) -> ShrinkConfig:
    """Tiles of grouped_shrink for low [P, R] in G groups; no more rows than a group has on average. No GPU has timed
    the grouped kernels yet."""
    c = shrink_config(P, K, R, itemsize, device)
    return replace(c, BLOCK_M=16) if P < 32 * G else c


def grouped_expand_config(P: int, G: int, N: int, R: int, itemsize: int) -> ExpandConfig:
    """Tiles of grouped_expand for P rows in G groups; no more rows than a group has on average."""
    return expand_config(max(P // G, 1), N, R, itemsize)


def grouped_wgrad_config(P: int, C: int, R: int, itemsize: int, device: Device) -> WgradConfig:
    """Tiles of grouped_wgrad, and the positions of a work item: as if all were one group, rounded to a power of two, of
    which few kernels are made."""
    c = wgrad_config(max(P, 1), C, R, itemsize, device)
    return replace(c, rows_per_split=_power_of_two(c.rows_per_split, 128, 65536))
