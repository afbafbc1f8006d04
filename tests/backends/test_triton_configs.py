"""The choices of tiles are legal for every size, dtype and kind of GPU, without a GPU."""

import itertools

import pytest

from fused_lora.triton_kernels.configs import (
    Device,
    backward_plan,
    dy_pass_config,
    forward_plan,
    gemm_config,
    gemm_shrink_config,
    shrink_config,
    wgrad_config,
)

DEVICES = {
    "T4-like": Device(tma=False, sms=40, shared_bytes=64 * 1024),
    "A100": Device(tma=False, sms=108, shared_bytes=166912),
    "RTX 4090": Device(tma=False, sms=128, shared_bytes=101376),
    "H100": Device(tma=True, sms=132, shared_bytes=232448),
    "MI300X": Device(tma=False, sms=304, shared_bytes=65536),
}
SIZES = [1, 16, 17, 64, 65, 512, 4096, 16384, 262144]
WIDTHS = [8, 65, 576, 4096, 14336]
RANKS = [1, 8, 12, 16, 64, 256, 320]


@pytest.mark.parametrize("name", DEVICES)
def test_choices_are_legal(name):
    device = DEVICES[name]
    for M, C, R, itemsize, dropout in itertools.product(SIZES, WIDTHS, RANKS, (2, 4), (False, True)):
        g = gemm_config(M, C, 4096, R, itemsize, dropout, device)
        s, w = shrink_config(M, C, R, itemsize, device), wgrad_config(M, C, R, itemsize, device)
        blocks = [size for c in (g, s, w) for name, size in c.constexprs.items() if name.startswith("BLOCK_")]
        assert all(b >= 16 and b & (b - 1) == 0 for b in blocks), "tl.dot takes powers of two from 16"
        assert g.BLOCK_M <= 256 and g.BLOCK_N <= 256, "a side of a TMA box is at most 256"
        assert (g.BLOCK_M + g.BLOCK_N) * g.BLOCK_K * itemsize * g.num_stages <= device.shared_bytes
        assert (s.BLOCK_M + s.BLOCK_R) * s.BLOCK_K * itemsize * s.num_stages <= device.shared_bytes
        assert (w.BLOCK_C + w.BLOCK_R) * w.BLOCK_M * itemsize * w.num_stages <= device.shared_bytes
        tiles = -(-M // g.BLOCK_M) * -(-C // g.BLOCK_N)
        assert 1 <= g.programs <= tiles
        assert s.BLOCK_M < 64, "the masked left operand must not go to wgmma"
        assert w.splits * w.rows_per_split >= M > (w.splits - 1) * w.rows_per_split, (
            "the splits cover the rows, none is empty"
        )
        assert w.splits == 1 or w.rows_per_split % w.BLOCK_M == 0


def test_accumulators_fit_the_registers():
    """Accumulators take at most 128 of the 255 registers of a thread; with dropout there are two."""
    for device, M, N, dropout in itertools.product(DEVICES.values(), SIZES, WIDTHS, (False, True)):
        c = gemm_config(M, N, 4096, 16, 2, dropout, device)
        assert c.BLOCK_M * c.BLOCK_N * (2 if dropout else 1) // (c.num_warps * 32) <= 128


def test_large_products_take_the_measured_tile_on_hopper():
    c = gemm_config(8192, 4096, 4096, 16, 2, False, DEVICES["H100"])
    assert (c.BLOCK_M, c.BLOCK_N, c.BLOCK_K, c.num_stages, c.num_warps, c.programs) == (128, 256, 64, 3, 8, 132)


def test_one_launch_is_planned_on_request_only():
    """And only where there is no dropout and dB is not needed; what is prefetched by default is not if so asked."""
    sizes, device = (8192, 4096, 4096, 16, 2), DEVICES["H100"]
    forward, backward = forward_plan(*sizes, False, device), backward_plan(*sizes, False, True, True, False, device)
    for plan in (forward, backward):
        assert plan.lora_gemm_shrink is None and plan.shrink and plan.lora_gemm.PREFETCH
    assert not forward_plan(*sizes, False, device, prefetch=False).lora_gemm.PREFETCH
    forward = forward_plan(*sizes, False, device, one_launch=True)
    assert forward.lora_gemm_shrink and forward.shrink is forward.lora_gemm is None
    assert forward_plan(*sizes, True, device, one_launch=True) == forward_plan(*sizes, True, device)
    for dx, dA, dB, dropout, one_read in itertools.product((False, True), repeat=5):
        given = (*sizes, dropout, dx, dA, dB, device)
        backward = backward_plan(*given, one_launch=True, one_read=one_read)
        if dx and not (dB and one_read) and not dropout:
            assert backward.lora_gemm_shrink and backward.shrink is backward.lora_gemm is backward.dy_pass is None
            assert (backward.wgrad_A is not None, backward.wgrad_B is not None) == (dA, dB)
        else:
            assert backward == backward_plan(*given, one_read=one_read)
    for R, reads in (
        (32, True),
        (16, False),
        (16, None),
        (64, True),
    ):  # the other choice than the usual, where it can be
        backward = backward_plan(8192, 4096, 4096, R, 2, False, True, True, True, device, one_read=reads)
        assert (backward.dy_pass is None) == (backward.shrink is not None) == (R == 64 or reads is False)


@pytest.mark.parametrize("R", [16, 64])
def test_each_result_is_made_once(R):
    """What is needed is made by one launch, what is not needed by none, and dy is read once where that pays."""
    for dx, dA, dB, dropout in itertools.product((False, True), repeat=4):
        p = backward_plan(8192, 4096, 4096, R, 2, dropout, dx, dA, dB, DEVICES["H100"])
        assert (p.lora_gemm is not None, p.wgrad_A is not None) == (dx, dA)
        assert (p.dy_pass is not None) + (p.shrink is not None) == (dx or dA)
        assert (p.dy_pass is not None) + (p.wgrad_B is not None) == dB
        assert (p.dy_pass is not None) == (R == 16 and dB and (dx or dA))


def test_prefetch_only_where_one_rank_block_is_all():
    for device, M, N, R, itemsize, dropout in itertools.product(
        DEVICES.values(), SIZES, WIDTHS, RANKS, (2, 4), (False, True)
    ):
        c = gemm_config(M, N, 4096, R, itemsize, dropout, device)
        assert (device.tma and itemsize == 2 and R <= c.BLOCK_R) == c.PREFETCH


def test_one_launch_choices():
    """TMA, half precision, rank blocks up to 32, tiles for every multiprocessor, three stages with the rank tile."""
    device = DEVICES["H100"]
    for M, N, R in itertools.product(SIZES, WIDTHS, [*RANKS, 32, 33]):
        assert all(gemm_shrink_config(M, N, 4096, R, 2, other) is None for other in DEVICES.values() if not other.tma)
        assert gemm_shrink_config(M, N, 4096, R, 4, device) is None
        c = gemm_shrink_config(M, N, 4096, R, 2, device)
        if c is None:
            continue
        assert R <= c.BLOCK_R <= 32 and c.num_stages >= 3
        assert (c.BLOCK_M + c.BLOCK_N + c.BLOCK_R) * c.BLOCK_K * c.num_stages * 2 < device.shared_bytes
        assert device.sms <= -(-M // c.BLOCK_M) * -(-N // c.BLOCK_N) and c.programs == device.sms
    for N in (1024, 4096, 14336):
        assert gemm_shrink_config(8192, N, 4096, 16, 2, device) is not None
    assert gemm_shrink_config(8192, 4096, 4096, 64, 2, device) is None
    assert gemm_shrink_config(512, 4096, 4096, 16, 2, device) is None


def test_wgrad_fills_the_card():
    c = wgrad_config(8192, 4096, 16, 2, DEVICES["H100"])
    assert 132 < (4096 // c.BLOCK_C) * c.splits <= 264


@pytest.mark.parametrize("name", DEVICES)
def test_dy_pass_choices_are_legal(name):
    device = DEVICES[name]
    for M, N, R, itemsize in itertools.product(SIZES, WIDTHS, [*RANKS, 32], (2, 4)):
        c = dy_pass_config(M, N, R, itemsize, device)
        if c is None:
            continue
        assert c.BLOCK_R >= R and all(b >= 16 and b & (b - 1) == 0 for b in (c.BLOCK_M, c.BLOCK_C, c.BLOCK_R))
        assert (
            c.num_stages - 1
        ) * c.BLOCK_M * c.BLOCK_C * itemsize + c.BLOCK_C * c.BLOCK_R * itemsize <= device.shared_bytes
        assert c.splits * c.rows_per_split >= M > (c.splits - 1) * c.rows_per_split, (
            "the splits cover the rows, none is empty"
        )
        assert c.splits == 1 or c.rows_per_split % c.BLOCK_M == 0
        blocks = -(-N // c.BLOCK_C)
        assert c.splits * blocks <= max(2 * device.sms, blocks)
        slabs = 8 * R * (M * blocks * (blocks > 1) + N * c.splits * (c.splits > 1))
        assert slabs <= 0.45 * M * N * itemsize or M < 64 or N < 512, (
            "the slabs cost less than the second read; tails of tiny sizes aside"
        )


def test_dy_pass_where_it_pays():
    """R = 16 at the widths of large models, at two programs a multiprocessor; not R = 64, and not a narrow dy."""
    device = DEVICES["H100"]
    for N in (4096, 14336):
        c = dy_pass_config(8192, N, 16, 2, device)
        assert device.sms < c.splits * N // c.BLOCK_C <= 2 * device.sms
    assert dy_pass_config(8192, 4096, 64, 2, device) is None
    assert dy_pass_config(8192, 1024, 16, 2, device) is None
