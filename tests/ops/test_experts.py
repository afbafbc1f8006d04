"""grouped_linear: the product of experts whose rows are sorted by expert."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fused_lora.backends import cpu_product
from fused_lora.ops.experts import grouped_linear

E, K, N = 4, 10, 6
OFFSETS = torch.tensor([0, 3, 3, 8, 9])  # the second expert has no rows


def problem(dtype=torch.float64, is_transposed=False, M=9):
    """x [M, K] and a weight of small integers, whose products are exact."""
    g = torch.Generator().manual_seed(0)
    shape = (E, K, N) if is_transposed else (E, N, K)
    x, weight = (torch.randint(-1, 2, size, generator=g).to(dtype) for size in ((M, K), shape))
    return x.requires_grad_(), weight


def by_loop(x, weight, offsets, is_transposed):
    parts = zip(x.split(offsets.diff().tolist()), weight, strict=True)
    return torch.cat([F.linear(rows, W.t() if is_transposed else W) for rows, W in parts])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_expert_multiplies_its_own_rows(dtype, is_transposed):
    x, weight = problem(dtype, is_transposed)
    y, want = (product(x, weight, OFFSETS, is_transposed) for product in (grouped_linear, by_loop))
    assert torch.equal(y, want)
    dy = torch.ones_like(y).cumsum(1)
    (dx,), (wanted,) = (torch.autograd.grad(out, x, dy) for out in (y, want))
    assert torch.equal(dx, wanted)
    (expanded,) = torch.autograd.grad(grouped_linear(x, weight, OFFSETS, is_transposed).sum(), x)
    assert expanded.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_whole_panels_and_several_blocks(monkeypatch, dtype, is_transposed):
    """By the CPU's own product where that pays: for few rows; in fp32, and where W is packed as it lies, for any."""
    rows, taken, real = [8, 7, 0, 60], [], cpu_product.product
    monkeypatch.setattr(
        cpu_product, "product", lambda x, *given, **more: taken.append(len(x)) or real(x, *given, **more)
    )
    g, (K, N) = torch.Generator().manual_seed(0), (1160, 1056)
    x = (torch.rand(sum(rows), K, generator=g) < 0.05).to(dtype).requires_grad_()
    shape = (4, K, N) if is_transposed else (4, N, K)
    weight, offsets = torch.randint(-1, 2, shape, generator=g).to(dtype), torch.tensor([0, *rows]).cumsum(0)
    y, want = (product(x, weight, offsets, is_transposed) for product in (grouped_linear, by_loop))
    serves, single = cpu_product.serves(dtype), dtype is torch.float32
    turned, as_it_lies = [8, 7, 60] if single else [8, 7], [8, 7, 60]
    forward, backward = (as_it_lies, turned) if is_transposed else (turned, as_it_lies)
    assert torch.equal(y, want) and taken == forward * serves
    dy = (torch.rand(y.shape, generator=g) < 0.05).to(dtype)
    (dx,), (wanted,) = (torch.autograd.grad(out, x, dy) for out in (y, want))
    assert torch.equal(dx, wanted) and taken == (forward + backward) * serves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_width_that_does_not_fit_is_refused(dtype):
    x, weight = problem(dtype)
    for wrong, is_transposed in ((x[:, :-1], False), (x, True)):
        with pytest.raises(ValueError, match="x must have the weight's .* columns; got shape"):
            grouped_linear(wrong, weight, OFFSETS, is_transposed)
    nothing = grouped_linear(x[:, :0], weight[:, :, :0], OFFSETS)
    assert torch.equal(nothing, torch.zeros(9, N, dtype=dtype))


def test_gradients_of_gradients_and_no_rows():
    x, weight = problem()
    torch.autograd.gradgradcheck(lambda x: grouped_linear(x, weight, OFFSETS).square(), (x,))
    empty = x.detach()[:0].requires_grad_()
    y = grouped_linear(empty, weight, torch.zeros(E + 1, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, N) and empty.grad.shape == (0, K)


def test_the_operator_keeps_its_promises():
    x, weight = problem(torch.float32)
    opcheck(torch.ops.fused_lora.grouped_linear.default, (x.detach(), weight, OFFSETS, False))
    compiled = torch.compile(lambda x: grouped_linear(x, weight, OFFSETS).square(), backend="aot_eager", fullgraph=True)
    (dx,), (wanted,) = (
        torch.autograd.grad(f(x).sum(), x) for f in (compiled, lambda x: by_loop(x, weight, OFFSETS, False).square())
    )
    assert torch.equal(dx, wanted)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x, weight, OFFSETS).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * N * K


def test_autocast_leaves_its_dtype():
    x, weight = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, OFFSETS).dtype == torch.float32
