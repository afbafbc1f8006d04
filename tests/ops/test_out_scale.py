"""The gradient of out_scale from y: as near to the truth as PyTorch's from z, whatever the bias and the scale are."""

import gc
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import lora_linear
from fused_lora.ops import eager
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


CHANGES = {
    "relu": lambda y: y.relu_(),
    "add": lambda y: y.add_(1.0),
    "element": lambda y: y.index_put_((torch.tensor([0]),), torch.tensor(2.0, dtype=y.dtype)),
    "view": lambda y: (y.view(-1)[:7].zero_(), y)[1],
    "turned": lambda y: (y.transpose(0, 1).mul_(2.0), y)[1],
}


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("dtype, lead", [(torch.float32, (24,)), (torch.float32, (2, 3, 4)), (torch.bfloat16, (24,))])
@pytest.mark.parametrize("change", CHANGES)
def test_y_may_be_changed_in_place(change, dtype, lead, listens):
    """Models have nn.ReLU(inplace=True) behind a layer: y is computed again then. A weight that trains goes by the
    Function for everybody."""
    p = random_problem(24, 160, 40, 4, dtype)
    p.x, p.dy = p.x.view(*lead, 40), p.dy.view(*lead, 160)
    p.weight.requires_grad_(listens)
    m = torch.rand(160) + 0.5
    given = p.weight, p.lora_A, p.lora_B
    wide = [t.detach().double() for t in (p.x, *given, p.bias)]
    q = random_problem(24, 160, 40, 4, torch.float64)
    act = CHANGES[change]
    got = gradient(p, m, lambda m: act(lora_linear(p.x, *given, 1.5, bias=p.bias, out_scale=m)))
    y = lora_linear(p.x, *given, 1.5, bias=p.bias, out_scale=m).detach().requires_grad_()
    act(y.clone()).backward(p.dy)
    p.dy, q.dy = y.grad, y.grad.double()  # of what passed, which rounding decides where y is nearly zero
    peer = gradient(p, m, lambda m: composition(p.x, *given, p.bias, 1.5, None, Variant(out_scale=m))[0])
    exact = gradient(q, m.double(), lambda m: composition(*wide, 1.5, None, Variant(out_scale=m))[0])
    assert_close({"out_scale": got}, {"out_scale": peer}, {"out_scale": exact})


def test_y_changed_in_place_with_dropout_and_more_inputs():
    """What is computed again has the mask, x_lora, h_in, gate and the norm of the first time."""
    p = random_problem(24, 160, 40, 4)
    rows = torch.randn(24, 40), torch.randn(24, 4), torch.rand(24, 2)
    m, norm, kept = torch.rand(160) + 0.5, torch.rand(160) + 0.5, []
    for change in (False, True):
        leaves = [t.clone().requires_grad_() for t in (m, p.x, p.lora_A, p.lora_B, *rows)]
        scale, x, A, B, x_lora, h_in, gate = leaves
        torch.manual_seed(3)
        more = dict(x_lora=x_lora, h_in=h_in, gate=gate, out_norm=norm)
        y = lora_linear(x, p.weight, A, B, 1.5, bias=p.bias, dropout_p=0.3, out_scale=scale, **more)
        y = y.mul_(2.0) if change else y * 2.0
        y.backward(p.dy)
        kept.append([leaf.grad for leaf in leaves])
    for plain, changed in zip(*kept):
        assert torch.equal(plain, changed)


def test_what_is_kept_of_y_is_gone_with_the_graph():
    """Nothing keeps y alive but its graph, and hooks on saved tensors get all that is kept of it."""
    p = random_problem(64, 160, 40, 4)
    m, packed = torch.ones(160, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, packed.__getitem__):
        y = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m)
    saved = [t for t in packed if t.shape == y.shape and t.data_ptr() == y.data_ptr()]
    assert len(saved) == 1, "y's memory goes through the hooks"
    memory = weakref.ref(y.untyped_storage())
    del y, saved, packed[:]
    gc.collect()
    assert memory() is None


def test_nothing_of_y_is_kept_without_gradients(monkeypatch):
    """Not in generation, where it would cost each layer some microseconds a token."""
    kept, real = [], eager.keep_result
    monkeypatch.setattr(eager, "keep_result", lambda y: kept.append(y) or real(y))
    p, m = random_problem(8, 12, 16, 4), torch.ones(12, requires_grad=True)
    with torch.no_grad():
        lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m)
    assert not kept
    lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, out_scale=m)
    assert len(kept) == 1


def test_a_step_of_two_layers_with_relu_in_place_is_pefts():
    import peft

    import fused_lora.peft

    grads = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(inplace=True), torch.nn.Linear(12, 4))
        config = peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if fuse:
            fused_lora.peft.fuse(model, strict=True)
        model(torch.randn(5, 8)).square().sum().backward()
        grads.append({name: t.grad for name, t in model.named_parameters() if t.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 6
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


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
