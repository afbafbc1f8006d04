"""What the shared back-end tests do not reach of the Triton back end: descriptors, splits over the rows, several tiles a program."""

import dataclasses

import pytest
import torch

from fused_lora.backends import triton as backend
from fused_lora.testing import assert_exact, exact_problem, random_problem, run, truth
from fused_lora.triton_kernels import configs

@pytest.fixture
def device_with(monkeypatch):
    """Make the interpreter pretend to be another device."""

    def replace(**properties):
        real = backend._device(torch.device("cpu"))
        monkeypatch.setattr(backend, "_device", lambda device: dataclasses.replace(real, **properties))

    return replace


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device decides, and every other test covers its way")
@pytest.mark.parametrize("bias", [True, False])
def test_descriptors_where_the_rows_are_aligned(poison, device_with, monkeypatch, bias):
    """Tails come from the descriptors' bounds; sizes that no descriptor takes go through pointers."""
    device_with(tma=True)
    made = []
    real = backend.TensorDescriptor.from_tensor
    monkeypatch.setattr(backend.TensorDescriptor, "from_tensor", lambda t, block: made.append(block) or real(t, block))
    for shape, aligned in (((129, 264, 136, 12), True), ((33, 70, 136, 8), False)):
        made.clear()
        p = exact_problem(*shape, torch.float16, bias=bias)
        assert_exact(run(p, backend="triton"), truth(p))
        assert (len(made) == 6) == aligned


def test_splits_over_the_rows(on_triton, poison):
    """Partial sums of several splits, whose last is shorter, give the exact integers."""
    M, N, K, R = 1100, 40, 48, 24
    p = exact_problem(M, N, K, R, on_triton.dtypes[1], torch.float32, device=on_triton.device)
    config = configs.wgrad_config(M, N, R, 2, backend._device(p.x.device))
    assert config.splits > 1 and config.rows_per_split * config.splits > M
    assert_exact(run(p, backend="triton"), truth(p))


def test_programs_that_walk_over_several_tiles(on_triton, poison, monkeypatch):
    """Fewer programs than tiles, and groups of rows of which the last is not full."""
    real = configs.gemm_config
    monkeypatch.setattr(configs, "gemm_config", lambda *a: dataclasses.replace(real(*a), BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, GROUP_M=4, programs=3))
    p = exact_problem(90, 72, 40, 8, on_triton.dtypes[0], device=on_triton.device)
    assert_exact(run(p, backend="triton"), truth(p))


def test_dropout_with_every_rank_block(on_triton, poison):
    """A rank of several blocks, where the masked update has an accumulator of its own."""
    p = random_problem(40, 48, 56, 72, on_triton.dtypes[0], device=on_triton.device)
    seed = torch.tensor([99], device=on_triton.device)
    got, want = run(p, backend="triton", dropout_p=0.5, seed=seed), truth(p, dropout_p=0.5, seed=seed)
    for name in got:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-4)
