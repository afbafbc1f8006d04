"""The choices of tiles are legal for every size, dtype and kind of GPU, without a GPU."""

import itertools

import pytest

from fused_lora.triton_kernels.configs import Device, gemm_config, shrink_config, wgrad_config

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
        blocks = (g.BLOCK_M, g.BLOCK_N, g.BLOCK_K, g.BLOCK_R, *(b for c in (s, w) for b in (c.BLOCK_M, c.BLOCK_WIDE, c.BLOCK_R)))
        assert all(b >= 16 and b & (b - 1) == 0 for b in blocks), "tl.dot takes powers of two from 16"
        assert g.BLOCK_M <= 256 and g.BLOCK_N <= 256, "a side of a TMA box is at most 256"
        assert (g.BLOCK_M + g.BLOCK_N) * g.BLOCK_K * itemsize * g.num_stages <= device.shared_bytes
        assert (s.BLOCK_M + s.BLOCK_R) * s.BLOCK_WIDE * itemsize * s.num_stages <= device.shared_bytes
        assert (w.BLOCK_WIDE + w.BLOCK_R) * w.BLOCK_M * itemsize * w.num_stages <= device.shared_bytes
        tiles = -(-M // g.BLOCK_M) * -(-C // g.BLOCK_N)
        assert 1 <= g.programs <= tiles
        assert s.BLOCK_M < 64, "the masked left operand must not go to wgmma"
        assert w.splits * w.rows_per_split >= M > (w.splits - 1) * w.rows_per_split, "the splits cover the rows, none is empty"
        assert w.splits == 1 or w.rows_per_split % w.BLOCK_M == 0


def test_accumulators_fit_the_registers():
    """Accumulators take at most 128 of the 255 registers of a thread; with dropout there are two."""
    for device, M, N, dropout in itertools.product(DEVICES.values(), SIZES, WIDTHS, (False, True)):
        c = gemm_config(M, N, 4096, 16, 2, dropout, device)
        assert c.BLOCK_M * c.BLOCK_N * (2 if dropout else 1) // (c.num_warps * 32) <= 128


def test_large_products_take_the_measured_tile_on_hopper():
    c = gemm_config(8192, 4096, 4096, 16, 2, False, DEVICES["H100"])
    assert (c.BLOCK_M, c.BLOCK_N, c.BLOCK_K, c.num_stages, c.num_warps, c.programs) == (128, 256, 64, 3, 8, 132)


def test_wgrad_fills_the_card():
    c = wgrad_config(8192, 4096, 16, 2, DEVICES["H100"])
    assert 132 < (4096 // c.BLOCK_WIDE) * c.splits <= 264
