"""The gradient of out_scale from y: as near to the truth as PyTorch's from z, whatever the bias and the scale are."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def _with_norm(apart: bool, how, dtype=torch.float32, bias=0.5):
    """What `how` makes of the op with m and n apart, or m / n by PyTorch."""
    torch.manual_seed(0)
    p = random_problem(9, 12, 16, 4, dtype)
    p.bias.fill_(bias)
    m, n = torch.rand(12) + 0.5, torch.rand(12) + 0.5
    leaves = [t.detach().clone().requires_grad_() for t in (p.x[None], p.lora_A, p.lora_B, m)]

    def op(x, A, B, m):
        given = dict(out_scale=m, out_norm=n) if apart else dict(out_scale=m / n)
        return lora_linear(x, p.weight, A, B, 1.5, bias=p.bias, **given)

    return how(op, leaves, p.dy[None])


def _plainly(op, leaves, dy):
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _twice(op, leaves, dy):
    first = torch.autograd.grad(op(*leaves), leaves, dy, create_graph=True)
    return [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)]


class _Listens(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _heard(op, leaves, dy):
    with _Listens():
        return _plainly(op, leaves, dy)


def _transformed(op, leaves, dy):
    y, pull = torch.func.vjp(op, *[t.detach() for t in leaves])
    return [y, *pull(dy)]


def _forward(op, leaves, dy):
    made = torch.func.jvp(op, tuple(t.detach() for t in leaves), tuple(torch.ones_like(t) for t in leaves))
    return list(made)


@pytest.mark.parametrize("how", [_plainly, _twice, _heard, _transformed, _forward])
@pytest.mark.parametrize("bias", [0.5, 300.0])
def test_a_norm_divides_the_scale(how, bias):
    """As PyTorch's division does, whoever looks on, in all gradients."""
    got, want = _with_norm(True, how, bias=bias), _with_norm(False, how, bias=bias)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-4)


def test_a_norm_divides_in_half_precision_too():
    got, want = (_with_norm(apart, _plainly, torch.bfloat16) for apart in (True, False))
    assert all(map(torch.equal, got[:-1], want[:-1]))
    torch.testing.assert_close(got[-1], want[-1])


def test_a_norm_that_does_not_fit_is_refused():
    p, m = random_problem(9, 12, 16, 4), torch.ones(12)
    given = p.x, p.weight, p.lora_A, p.lora_B, 1.5
    lora_linear(*given, out_scale=m, out_norm=m)
    for n, scale, message in (
        (m, None, "out_norm must be None without an out_scale; got a tensor of shape \\[12\\]"),
        (m[:5], m, "out_norm must have out_scale's shape \\[12\\] and dtype float32; got \\[5\\] and torch.float32"),
        (m.bfloat16(), m, "out_norm must have out_scale's shape .* torch.bfloat16"),
        (m.clone().requires_grad_(), m, "out_norm must not require a gradient"),
        (m.to_sparse(), m, "out_norm must be a dense tensor; got layout torch.sparse_coo"),
        (m.to("meta"), m, "out_norm must be on x's device cpu; got meta"),
        (1.0, m, "out_norm must be a torch.Tensor; got float"),
    ):
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match=message):
                lora_linear(*given, out_scale=scale, out_norm=n, backend=backend)


def test_a_norm_must_stay_as_it_is():
    p, m, n = random_problem(9, 12, 16, 4), torch.rand(12, requires_grad=True), torch.ones(12)
    y = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m, out_norm=n)
    n.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_tensors_are_asked_for_no_address():
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        p, m = random_problem(9, 12, 16, 4), torch.ones(12, requires_grad=True)
        for _ in range(2):
            y = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m, out_norm=torch.ones(12))
            assert torch.autograd.grad(y, m, torch.ones_like(y))[0].shape == (12,)
