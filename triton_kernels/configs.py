"""Tile shapes and splits: pure functions of sizes, dtype and device properties, so that they are tested without a GPU.

No table by GPU name and no tuning at call time. A figure behind a choice names the device and the date.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the choices depend on."""

    tma: bool  # has the tensor memory accelerator (compute capability >= 9.0)
    sms: int  # multiprocessors, or compute units
    shared_bytes: int  # shared memory that one program may use


@dataclass(frozen=True)
class GemmConfig:
    """Of lora_gemm."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_stages: int
    num_warps: int
    programs: int  # grid


@dataclass(frozen=True)
class ThinConfig:
    """Of shrink and wgrad; BLOCK_WIDE cuts the columns of the wide matrix (K in shrink)."""

    BLOCK_M: int
    BLOCK_WIDE: int
    BLOCK_R: int
    num_stages: int
    num_warps: int
    splits: int = 1
    rows_per_split: int = 0


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least n, within bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def _stages(shared_bytes: int, bytes_per_stage: int, most: int) -> int:
    return max(1, min(most, shared_bytes // bytes_per_stage))


def gemm_config(M: int, N: int, K: int, R: int, itemsize: int, dropout: bool, device: Device) -> GemmConfig:
    """Tiles of lora_gemm for out [M, N] = left [M, K] @ right + low [M, R] @ thin.

    128 x 256 x 64 with eight warps reaches cuBLAS on an H100, 128 x 128 x 64 is 1.17 times as slow (Triton 3.6, 8192 x 4096 x 4096, bf16,
    2026-11-23). Dropout needs a second accumulator, for which 256 columns have no registers left.
    """
    BLOCK_R = _power_of_two(R, 16, 32)
    if itemsize == 4:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = 64, 64, 32, 4, 3
    elif M <= 64:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = _power_of_two(M, 16, 64), 64, 128, 4, 5
    elif device.tma and not dropout and _cdiv(M, 128) * _cdiv(N, 256) * 2 > device.sms:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = 128, 256, 64, 8, 3
    elif _cdiv(M, 128) * _cdiv(N, 128) * 2 > device.sms:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = 128, 128, 64 if device.tma else 32, 8 if device.tma or dropout else 4, 4
    else:
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = 64, 128, 64 if device.tma else 32, 4, 4
    out_tile = BLOCK_M * BLOCK_N * itemsize if device.tma else 0  # staged for the TMA store
    low_rank = (BLOCK_M + BLOCK_N) * BLOCK_R * itemsize
    stages = _stages(device.shared_bytes - max(out_tile, low_rank), (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize, most)
    tiles = _cdiv(M, BLOCK_M) * _cdiv(N, BLOCK_N)
    # With TMA one program a multiprocessor walks over the tiles; without it the hardware's own scheduler overlaps tiles better.
    programs = min(tiles, device.sms) if device.tma and warps == 8 else tiles
    return GemmConfig(BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, 8, stages, warps, programs)


def shrink_config(M: int, K: int, R: int, itemsize: int, device: Device) -> ThinConfig:
    """Tiles of shrink for h [M, R] from x [M, K]: enough rows in flight to stream x at the memory's speed."""
    BLOCK_R = _power_of_two(R, 16, 128)
    BLOCK_M = 32 if _cdiv(M, 32) >= device.sms else 16
    BLOCK_K = (128 if BLOCK_R <= 64 else 64) * (1 if itemsize == 4 else 2)
    stages = _stages(device.shared_bytes // 2, (BLOCK_M + BLOCK_R) * BLOCK_K * itemsize, 4)
    return ThinConfig(BLOCK_M, BLOCK_K, BLOCK_R, stages, 4)


def wgrad_config(M: int, C: int, R: int, itemsize: int, device: Device) -> ThinConfig:
    """Tiles and splits of wgrad for out [R, C] from wide [M, C]: two programs a multiprocessor, at least 256 rows for each."""
    BLOCK_R = _power_of_two(R, 16, 64)
    BLOCK_M, BLOCK_C = (64, 128) if itemsize < 4 else (32, 64)
    stages = _stages(device.shared_bytes // 2, (BLOCK_C + BLOCK_R) * BLOCK_M * itemsize, 4)
    tiles = _cdiv(C, BLOCK_C) * _cdiv(R, BLOCK_R)
    splits = max(1, min(2 * device.sms // tiles, M // 256))
    rows_per_split = _cdiv(_cdiv(M, splits), BLOCK_M) * BLOCK_M
    return ThinConfig(BLOCK_M, BLOCK_C, BLOCK_R, stages, 4, _cdiv(M, rows_per_split), rows_per_split)
