"""The gradient of out_scale from y: as near to the truth as PyTorch's from z, whatever the bias and the scale are."""

import pytest
import torch

from fused_lora import lora_linear
from fused_lora.ops.reference import Variant, composition
from fused_lora.testing import assert_close, random_problem, run, with_optional


def gradient(p, out_scale, op) -> torch.Tensor:
    m = out_scale.clone().requires_grad_()
    op(m).backward(p.dy)
    return m.grad


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, 0.5, 1.0, 3.0, 300.0])
def test_a_bias_of_any_size(dtype, bias, backend):
    """Where the bias is most of y, y's digits are the bias's, and z is computed again."""
    p = random_problem(64, 160, 40, 4, dtype)
    p.bias = None if bias is None else torch.full_like(p.bias, bias)
    if bias is not None:
        p.bias[::3] = 0.01  # columns of both kinds
    m = torch.rand(160) + 0.5
    given = p.weight, p.lora_A, p.lora_B
    wide = [t if t is None else t.double() for t in (p.x, *given, p.bias)]
    q = random_problem(64, 160, 40, 4, torch.float64)
    q.dy = p.dy.double()
    got = gradient(p, m, lambda m: lora_linear(p.x, *given, 1.5, bias=p.bias, out_scale=m, backend=backend))
    peer = gradient(p, m, lambda m: composition(p.x, *given, p.bias, 1.5, None, Variant(out_scale=m))[0])
    exact = gradient(q, m.double(), lambda m: composition(*wide, 1.5, None, Variant(out_scale=m))[0])
    assert_close({"out_scale": got}, {"out_scale": peer}, {"out_scale": exact})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, -1e-4, 1e-30, 1e-38])
def test_a_scale_that_leaves_nothing_of_z(dtype, scale):
    p = random_problem(64, 160, 40, 4, dtype)
    m = torch.full((160,), scale)
    m[::2] = 1.0
    given = p.weight, p.lora_A, p.lora_B
    wide = [t.double() for t in (p.x, *given, p.bias)]
    q = random_problem(64, 160, 40, 4, torch.float64)
    q.dy = p.dy.double()
    for fixed in (p.bias, None):
        wide[-1] = None if fixed is None else fixed.double()
        got = gradient(p, m, lambda m, b=fixed: lora_linear(p.x, *given, 1.5, bias=b, out_scale=m))
        peer = gradient(p, m, lambda m, b=fixed: composition(p.x, *given, b, 1.5, None, Variant(out_scale=m))[0])
        exact = gradient(q, m.double(), lambda m: composition(*wide, 1.5, None, Variant(out_scale=m))[0])
        assert_close({"out_scale": got}, {"out_scale": peer}, {"out_scale": exact})


@pytest.mark.parametrize("plan", ["inside", "around"])
@pytest.mark.parametrize("lost", [False, True])
def test_the_gradient_has_the_scale_s_dtype(plan, lost):
    p = with_optional(random_problem(9, 12, 16, 4), ["out_scale"], exact=False)
    m = p.variant.out_scale.double()
    m[3] *= not lost
    p.variant = p.variant._replace(out_scale=m)
    got, want = (run(p, backend=name, needs=p.needs())["dout_scale"] for name in (f"cpu:{plan}", "reference"))
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_y_must_stay_as_it_is_only_for_the_scale():
    p = random_problem(8, 12, 16, 4)
    m = torch.ones(12, requires_grad=True)
    x = p.x.clone().requires_grad_()
    lora_linear(x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m.detach()).add_(1.0).sum().backward()
    y = lora_linear(x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m)
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_scale_alone_trains_and_its_gradients_batch():
    """Nothing else needs x; and dy may stand for a batch."""
    p = random_problem(8, 12, 16, 4)
    m = torch.rand(12, requires_grad=True)
    m.data[3] = 0.0
    given = p.x, p.weight, p.lora_A, p.lora_B
    y = lora_linear(*given, 1.5, bias=p.bias, out_scale=m)
    want = composition(*given, p.bias, 1.5, None, Variant(out_scale=m))[0]
    dys = torch.stack((p.dy, 2 * p.dy))
    got = torch.autograd.grad(y, m, dys, is_grads_batched=True)
    torch.testing.assert_close(got, torch.autograd.grad(want, m, dys, is_grads_batched=True), rtol=1e-4, atol=1e-4)
