"""lora_linear() as users call it: shapes, dtypes, autocast, pruning of what is saved, checkpointing, messages."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_lora import backends, lora_linear, lora_update
from fused_lora.ops import linear, schema, update
from fused_lora.ops.dropout import dropout_mask
from fused_lora.testing import assert_close, random_problem, run, truth


def leaves(p):
    return [t.detach().clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.bias)]


def call(p, x, A, B, bias, **kwargs):
    return lora_linear(x, p.weight, A, B, p.scaling, bias=bias, **kwargs)


def test_autograd_gives_what_the_operators_give(backend):
    p = random_problem(20, 24, 32, 8, backend.dtypes[0], device=backend.device)
    x, A, B, bias = leaves(p)
    y = call(p, x, A, B, bias, backend=backend.name)
    y.backward(p.dy)
    out = dict(y=y.detach(), dx=x.grad, dA=A.grad, dB=B.grad, dbias=bias.grad)
    assert_close(out, run(p, backend="reference"), truth(p))


@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 0), (2, 3), (2, 1, 3)])
def test_leading_dimensions(lead):
    p = random_problem(1, 6, 10, 3)
    x = torch.randn(*lead, 10, requires_grad=True)
    y = lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias)
    want = F.linear(x, p.weight, p.bias) + p.scaling * F.linear(F.linear(x, p.lora_A), p.lora_B)
    assert y.shape == (*lead, 6)
    torch.testing.assert_close(y, want)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (dx_want,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(dx, dx_want)


def test_empty_batch_gives_zero_gradients():
    p = random_problem(0, 6, 10, 3)
    x, A, B, bias = leaves(p)
    call(p, x, A, B, bias).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (x, A, B, bias))


@pytest.mark.parametrize("trained", ["x", "lora_A", "lora_B", "bias", "none"])
def test_saves_only_what_a_needed_gradient_uses(trained):
    """x is kept for dA alone, h for dB alone; parameters are kept by reference; no mask and no dropped copy ever."""
    p = random_problem(64, 40, 48, 8)
    tensors = {"x": p.x, "lora_A": p.lora_A, "lora_B": p.lora_B, "bias": p.bias}
    for name, t in tensors.items():
        t.requires_grad_(name == trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t.data_ptr(), tuple(t.shape))) or t, lambda t: t
    ):
        lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, dropout_p=0.5)
    own = {t.data_ptr() for t in (p.weight, p.lora_A, p.lora_B)}
    extra = {shape for ptr, shape in kept if ptr not in own}
    assert (
        extra
        == {"x": {(1,)}, "lora_A": {(64, 48), (1,)}, "lora_B": {(64, 8), (1,)}, "bias": {(1,)}, "none": set()}[trained]
    )


def test_saves_no_copy_of_x():
    """Whatever x's dimensions and strides, what is saved of it is x's own memory."""
    A, B, W = torch.randn(4, 8, requires_grad=True), torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
    for x in (torch.randn(5, 8), torch.randn(2, 5, 8), torch.randn(5, 2, 8).transpose(0, 1), torch.randn(2, 8, 5).mT):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_linear(x, W, A, B, 1.0)
        assert [
            t
            for t in kept
            if t.numel() == x.numel() and t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        ]
        assert sum(t.numel() for t in kept) == x.numel() + W.numel() + A.numel() + B.numel() + x.numel() // 8 * 4


def test_trained_weight_gets_its_gradient():
    """W is meant to be frozen, but a gradient that is asked for is never dropped."""
    p = random_problem(9, 6, 10, 3)
    p.weight.requires_grad_()
    lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling).backward(p.dy)
    torch.testing.assert_close(p.weight.grad, p.dy.t() @ p.x)


def test_retain_graph_and_double_use():
    p = random_problem(9, 10, 10, 3)
    x, A, B, bias = leaves(p)
    y = call(p, call(p, x, A, B, bias), A, B, bias)
    y.backward(torch.ones_like(y), retain_graph=True)
    first = [t.grad.clone() for t in (x, A, B, bias)]
    y.backward(torch.ones_like(y))
    for t, once in zip((x, A, B, bias), first):
        assert torch.equal(t.grad, 2 * once)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_behaves_as_linear_does(base, adapter, autocast):
    p = random_problem(16, 24, 32, 8)
    weight, bias = p.weight.to(base), p.bias.to(base)
    x, A, B = p.x.requires_grad_(), p.lora_A.to(adapter).requires_grad_(), p.lora_B.to(adapter).requires_grad_()
    with torch.autocast("cpu", autocast):
        want = F.linear(x, weight, bias)
        y = lora_linear(x, weight, A, B, 1.0, bias=bias)
    assert y.dtype == want.dtype == autocast
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (x.dtype, A.dtype, B.dtype)
    half = p.to(autocast, adapter if adapter == torch.float32 else autocast)
    half.scaling = 1.0
    same = run(half, backend="reference")
    exact = truth(half)
    assert_close({"y": y.detach()}, same, exact)


@pytest.mark.parametrize("backend", ["cpu", "cpu:around", "reference"])
@pytest.mark.parametrize("base_trains", [False, True])
def test_a_backward_under_autocast_computes_in_the_forwards_dtype(backend, base_trains):
    p = random_problem(20, 24, 32, 8)
    x, A, B, bias = leaves(p)
    frozen_or_not = [t.requires_grad_(base_trains) for t in (bias, p.weight)]
    wanted = [x, A, B, *(frozen_or_not if base_trains else ())]
    y = call(p, x, A, B, bias, backend=backend)
    want = torch.autograd.grad(y, wanted, p.dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, wanted, p.dy)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    p = random_problem(16, 24, 32, 8)

    def grads(wrap):
        x, A, B, bias = leaves(p)
        torch.manual_seed(11)
        y = wrap(lambda *a: call(p, *a, dropout_p=0.5), x, A, B, bias)
        y.backward(p.dy)
        return [y.detach(), x.grad, A.grad, B.grad, bias.grad]

    plain = grads(lambda f, *a: f(*a))
    recomputed = grads(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_dropout_follows_the_global_seed_and_training():
    p = random_problem(16, 24, 32, 8)
    args = (p.x, p.weight, p.lora_A, p.lora_B, p.scaling)

    def draw(seed, **kwargs):
        torch.manual_seed(seed)
        return lora_linear(*args, dropout_p=0.5, **kwargs)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, training=False), lora_linear(*args))
    state = torch.get_rng_state()
    lora_linear(*args)
    assert torch.equal(state, torch.get_rng_state())  # no dropout, no draw


def test_scaling_as_a_tensor_trains_and_matches_the_float():
    p = random_problem(16, 24, 32, 8)
    s = torch.tensor(1.5, requires_grad=True)
    A = p.lora_A.requires_grad_()
    y = lora_linear(p.x, p.weight, A, p.lora_B, s)
    torch.testing.assert_close(y, lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5))
    ds, dA = torch.autograd.grad(y, (s, A), p.dy)
    s2 = torch.tensor(1.5, requires_grad=True)
    want = F.linear(p.x, p.weight) + s2 * F.linear(F.linear(p.x, A), p.lora_B)
    torch.testing.assert_close((ds, dA), torch.autograd.grad(want, (s2, A), p.dy), rtol=1e-4, atol=1e-4)


def test_inplace_on_the_result():
    """Models add the residual in place."""
    p = random_problem(6, 10, 10, 3)
    x, A, B, bias = leaves(p)
    for shape in ((6, 10), (2, 3, 10)):
        y = call(p, x.view(shape), A, B, bias)
        before = y.detach().clone()
        y += 1.0
        assert torch.equal(y, before + 1.0)
        got = torch.autograd.grad(y, (x, A, B), p.dy.view(shape))
        want = torch.autograd.grad(call(p, x.view(shape), A, B, bias), (x, A, B), p.dy.view(shape))
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("trained", ["x, A, B", "bias too", "with a gate"])
def test_second_derivatives(trained, dropout_p):
    """The gradient's gradient is the composition's, also where one input is made from another."""
    p = random_problem(6, 10, 12, 3).to(torch.float64)
    lead, gate = (2, 3), torch.rand(2, 3, 1, dtype=torch.float64) if trained == "with a gate" else None
    mask = None

    def by_composition(x, A, B, bias):
        given = x if mask is None else x * mask
        low = F.linear(given, A) if gate is None else F.linear(given, A) * gate
        return F.linear(x, p.weight, bias) + p.scaling * F.linear(low, B)

    def ours(x, A, B, bias):
        torch.manual_seed(7)
        return lora_linear(x, p.weight, A, B, p.scaling, bias=bias, gate=gate, dropout_p=dropout_p)

    def second(f):
        given = [t.clone().requires_grad_() for t in (p.x.view(*lead, 12), p.lora_A, p.lora_B, p.bias)]
        x, A, B, bias = given
        y = f(x * 2, A * x.mean(), B, bias if trained == "bias too" else bias.detach())
        wanted = given if trained == "bias too" else given[:3]
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        again = torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)
        return [*first, *again]

    if dropout_p:
        torch.manual_seed(7)
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        mask = dropout_mask(seed, 6, 12, dropout_p, torch.float64).view(*lead, 12)
    torch.testing.assert_close(second(ours), second(by_composition))


def test_second_derivatives_without_x_are_refused():
    """Where A is frozen x is not kept: what would need it raises, batched first derivatives take h."""
    p = random_problem(6, 10, 12, 3)
    x, B = p.x.clone().requires_grad_(), p.lora_B.clone().requires_grad_()
    y = lora_linear(x, p.weight, p.lora_A, B, p.scaling)
    with pytest.raises(RuntimeError, match="needs x, which is kept only where lora_A trains"):
        torch.autograd.grad(y.sum(), B, create_graph=True)
    batch = torch.stack([p.dy, 2 * p.dy])
    (together,) = torch.autograd.grad(y, B, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, B, dy, retain_graph=True)[0] for dy in batch])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("scaling", [1.5, 0.0])
@pytest.mark.parametrize("kind", ["linear", "gate and h_in", "update"])
def test_second_derivatives_over_a_frozen_A(kind, scaling):
    """From h, which is kept where neither A nor x trains, with dropout in it."""
    p = random_problem(6, 10, 12, 4).to(torch.float64)
    base = F.linear(p.x, p.weight)
    mask = dropout_mask(torch.tensor([5]), 6, 12, 0.5, torch.float64)

    def outcome(f):
        B, gate, h_in = (
            p.lora_B.clone().requires_grad_(),
            torch.rand(6, 2, dtype=torch.float64),
            torch.ones(6, 4).double(),
        )
        given = [B] if kind != "gate and h_in" else [B, gate.requires_grad_(), h_in.requires_grad_()]
        y = f(*given)
        first = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), given)]

    def plain(B, gate=None, h_in=0.0):
        low = F.linear(p.x * mask, p.lora_A) + h_in
        return base + scaling * F.linear(low if gate is None else low * gate.repeat_interleave(2, 1), B)

    def ours(B, gate=None, h_in=None):
        if kind == "update":
            return lora_update(base, p.x, p.lora_A, B, scaling, dropout_p=0.5)
        return lora_linear(p.x, p.weight, p.lora_A, B, scaling, gate=gate, h_in=h_in, dropout_p=0.5)

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, update):
            patch.setattr(module, "draw_seed", lambda x, dropout_p: torch.tensor([5]))
        torch.manual_seed(0)
        got = outcome(ours)
    torch.manual_seed(0)
    torch.testing.assert_close(got, outcome(plain))


def test_second_derivatives_over_an_input_of_their_own():
    """x is not kept beside x_lora, and not needed."""
    p = random_problem(6, 10, 12, 4).to(torch.float64)

    def outcome(f):
        given = [t.clone().requires_grad_() for t in (p.x, p.x.flip(0), p.lora_A, p.lora_B)]
        first = torch.autograd.grad(f(*given).sin().sum(), given, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), given)]

    want = outcome(lambda x, x_lora, A, B: F.linear(x, p.weight) + 1.5 * F.linear(F.linear(x_lora, A), B))
    got = outcome(lambda x, x_lora, A, B: lora_linear(x, p.weight, A, B, 1.5, x_lora=x_lora))
    torch.testing.assert_close(got, want)


def test_batched_gradients_of_a_gate():
    p = random_problem(6, 10, 12, 4)
    gate = torch.rand(6, 2, requires_grad=True)
    y = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.5, gate=gate)
    batch = torch.stack([p.dy, 2 * p.dy])
    (together,) = torch.autograd.grad(y, gate, batch, is_grads_batched=True, retain_graph=True)
    apart = torch.stack([torch.autograd.grad(y, gate, dy, retain_graph=True)[0] for dy in batch])
    torch.testing.assert_close(together, apart)


def test_functional_transforms():
    """torch.func.grad goes through the Function (setup_context style)."""
    p = random_problem(6, 10, 12, 3)
    got = torch.func.grad(lambda A: lora_linear(p.x, p.weight, A, p.lora_B, p.scaling).pow(2).sum())(p.lora_A)
    A = p.lora_A.clone().requires_grad_()
    (F.linear(p.x, p.weight) + p.scaling * F.linear(F.linear(p.x, A), p.lora_B)).pow(2).sum().backward()
    torch.testing.assert_close(got, A.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, expected", [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (512, 512), (513, 1024)])
def test_who_serves_depends_on_the_bucket_of_rows_alike_on_both_paths(monkeypatch, rows, expected):
    """The eager path's remembered verdict, the operator's forward and its backward ask for the same request; K = 24 is
    no power of two, so neither is the number of x's elements."""
    asked = []

    def pick(backend, request):
        asked.append(request)
        return backends.pick(backend, request)

    monkeypatch.setattr(linear, "pick", pick)
    monkeypatch.setattr(schema, "pick", pick)
    monkeypatch.setattr(linear, "_VERDICTS", {})
    p = random_problem(rows, 16, 24, 4)
    for shape in ((1, rows, 24), (1, rows, 24), (rows, 24), (rows, 24)):
        lora_linear(p.x.view(shape), p.weight, p.lora_A, p.lora_B, 1.0)
    run(p, backend="auto")
    assert len(asked) in (4, 6)  # a second eager call of a kind remembers, where there is an eager path
    assert {request.M for request in asked} == {expected} and len(set(asked)) == 1
