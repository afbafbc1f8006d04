"""few_rows of the CPU back end: x of so few rows that W is not packed for them, as when tokens are generated."""

from dataclasses import replace

import pytest
import torch

from fused_lora import _C, lora_linear
from fused_lora.backends import cpu, cpu_product
from fused_lora.ops.reference import PLAIN
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth, with_optional

DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype, adapter", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (67, 33, 8), (130, 513, 17), (64, 512, 16), (9, 97, 40)])
def test_every_number_of_rows(shape, dtype, adapter):
    """Whole tiles and parts of them, in both directions, and with the optional tensors that few_rows takes."""
    for M in range(1, _C.few_rows + 2):
        p, q = exact_problem(M, *shape, dtype, adapter), random_problem(M, *shape, dtype, adapter)
        if "inside" not in cpu.plans(request_of(p.x, p.weight, p.lora_A, PLAIN)):
            assert dtype is torch.bfloat16
            pytest.skip("this CPU has no bf16 instructions, or AMX, which has no plan inside for so few rows")
        assert_exact(run(p, backend="cpu:inside"), truth(p))
        got, other, want = (
            {"y": values["y"]} for values in (run(q, backend="cpu:inside"), run(q, backend="reference"), truth(q))
        )
        assert_close(got, other, want)
        p = with_optional(p, ("x_lora", "out_scale"), exact=True)
        assert_exact(run(p, backend="cpu:inside", needs=p.needs()), truth(p, needs=p.needs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_a_stride_beside_nan(dtype):
    """Exactly, of parts of wider matrices that are NaN elsewhere, by the layer's product and by the product alone."""
    if not cpu_product.serves(dtype):
        pytest.skip("this CPU has no product of its own in this dtype")
    x, weight = torch.full((7, 120), torch.nan, dtype=dtype), torch.full((75, 130), torch.nan, dtype=dtype)
    x[1:6, 3:84], weight[2:72, 7:88] = torch.randint(-1, 2, (5, 81)), torch.randint(-1, 2, (70, 81))
    x, weight = x[1:6, 3:84], weight[2:72, 7:88]
    A, B, bias = torch.randint(-1, 2, (8, 81)).float(), torch.randint(-1, 2, (70, 8)).float(), torch.ones(70).to(dtype)
    base = x.float() @ weight.float().T + 1.0
    low = x.float() @ A.T
    got = lora_linear(x, weight, A, B, 0.0, bias=bias, backend="cpu:inside")
    assert torch.equal(got, base.to(dtype)) and torch.equal(cpu_product.product(x, weight, bias), base.to(dtype))
    got = lora_linear(x, weight, A, B, 1.0, bias=bias, backend="cpu:inside")
    assert torch.equal(got, (base + low.to(dtype).float() @ B.T).to(dtype))


def test_dropout_of_the_fewest_rows_packs_nothing(monkeypatch):
    """few_rows draws no mask, and the products that pack W are slower than PyTorch's there."""
    given, real = [], _C.cpu_forward
    monkeypatch.setattr(_C, "cpu_forward", lambda **kw: given.append(kw["W"]) or real(**kw))
    x, weight, A, B = torch.randn(3, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)
    lora_linear(x[:1], weight, A, B, 1.0, dropout_p=0.5)
    lora_linear(x, weight, A, B, 1.0, dropout_p=0.5, backend="cpu:inside")
    assert given == [None, None]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fewest_rows_of_a_weight_that_lies_transposed(dtype, dropout_p):
    """Exactly, both directions, with the mask of the plan around PyTorch's product. On AMX the plan inside has these of
    so few rows alone."""
    served = 0
    for M in (1, 2, 3, 4):
        p = exact_problem(M, 67, 130, 8, dtype, torch.float32)
        for q in (p, replace(p, weight=p.weight.t().contiguous().t())):
            if "inside" not in cpu.plans(request_of(q.x, q.weight, q.lora_A, PLAIN)):
                continue
            found, served = [], served + 1
            for plan in ("inside", "around"):
                torch.manual_seed(M)
                leaves = [t.detach().clone().requires_grad_() for t in (q.x, q.lora_A, q.lora_B)]
                y = lora_linear(
                    leaves[0], q.weight, *leaves[1:], 1.0, bias=q.bias, dropout_p=dropout_p, backend=f"cpu:{plan}"
                )
                found.append([y.detach(), *torch.autograd.grad(y, leaves, q.dy)])
            assert all(map(torch.equal, *found))
            if not dropout_p:
                assert_exact(run(q, backend="cpu:inside"), truth(q))
    if not served:
        pytest.skip("this CPU has no product of its own in this dtype")


def test_the_fewest_rows_are_served_by_default():
    """A token alone, however W lies, and its gradient."""
    x, weight, A, B = torch.randn(1, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)
    first = "inside" if _C.cpu_features()["avx2"] else "around"
    x.requires_grad_()
    for W in (weight, weight.t().contiguous().t()):
        assert cpu.plans(request_of(x, W, A, PLAIN))[0] == first
        x.grad = None
        lora_linear(x, W, A, B, 1.0).sum().backward()
        torch.testing.assert_close(x.grad, (weight + B @ A).sum(0, keepdim=True), rtol=1e-4, atol=1e-4)
