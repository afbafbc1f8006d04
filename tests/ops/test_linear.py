"""lora_linear() as users call it: shapes, dtypes, autocast, pruning of what is saved, checkpointing, messages."""

import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_lora import lora_linear
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
        y += 1.0
        y.sum().backward()


@pytest.mark.parametrize("trained", ["x, A, B", "bias too", "with a gate"])
def test_differentiating_twice_is_refused(trained):
    p = random_problem(6, 10, 12, 3)
    x, A, B, bias = leaves(p)
    gate = torch.rand(6, 1, requires_grad=True) if trained == "with a gate" else None
    bias.requires_grad_(trained == "bias too")
    y = lambda: call(p, x, A, B, bias, gate=gate)
    (dx,) = torch.autograd.grad(y().pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(y().pow(2).sum(), x)[0])
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_functional_transforms():
    """torch.func.grad goes through the Function (setup_context style)."""
    p = random_problem(6, 10, 12, 3)
    got = torch.func.grad(lambda A: lora_linear(p.x, p.weight, A, p.lora_B, p.scaling).pow(2).sum())(p.lora_A)
    A = p.lora_A.clone().requires_grad_()
    (F.linear(p.x, p.weight) + p.scaling * F.linear(F.linear(p.x, A), p.lora_B)).pow(2).sum().backward()
    torch.testing.assert_close(got, A.grad, rtol=1e-4, atol=1e-3)


GOOD = dict(x=(4, 32), weight=(24, 32), lora_A=(8, 32), lora_B=(24, 8), bias=(24,))
BAD = [
    (dict(x=(4, 31)), r"x must have shape \[\.\.\., 32\] to match weight \[24, 32\]; got \[4, 31\]"),
    (dict(lora_A=(16, 31)), r"lora_A must have shape \[R, 32\] with R >= 1 to match x\[\.\.\., 32\]; got \[16, 31\]"),
    (dict(lora_A=(0, 32), lora_B=(24, 0)), r"lora_A must have shape \[R, 32\] with R >= 1"),
    (dict(lora_B=(24, 9)), r"lora_B must have shape \[24, 8\].*got \[24, 9\]"),
    (dict(bias=(23,)), r"bias must have shape \[24\].*got \[23\]"),
    (dict(weight=(24,)), r"weight must have shape \[N, K\]"),
    (dict(x=()), r"x must have shape \[\.\.\., 32\]"),
    (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
    (dict(dropout_p=-0.1), r"dropout_p must be in \[0, 1\); got -0.1"),
    (dict(dropout_p=float("nan")), r"dropout_p must be in \[0, 1\); got nan"),
    (
        dict(backend="trition"),
        r"backend must be one of auto, cuda, triton, cpu, reference; got 'trition' \(did you mean 'triton'\?\)",
    ),
    (dict(dtype_weight=torch.float16), r"weight must have x's dtype torch.float32; got torch.float16"),
    (dict(dtype_x=torch.int64), r"x must be bfloat16, float16, float32 or float64; got torch.int64"),
    (dict(dtype_lora_A=torch.float16), r"lora_A must have x's dtype torch.float32 or float32; got torch.float16"),
    (dict(dtype_bias=torch.float16), r"bias must have x's dtype"),
    (dict(device_weight="meta"), r"weight must be on x's device cpu; got meta"),
    (dict(gate=(4, 3)), r"gate must have shape \[4, 'k'\] with k dividing R = 8; got \[4, 3\]"),
    (dict(h_in=(4, 7)), r"h_in must have shape \[4, 8\]"),
    (dict(out_scale=(23,)), r"out_scale must have shape \[24\] and dtype float32; got \[23\]"),
    (dict(x_lora=(3, 32)), r"x_lora must have x's shape \[4, 32\]"),
    (dict(scaling=torch.ones(2)), r"scaling must be a number or a 0-d tensor; got a tensor of shape \[2\]"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_named(change, message):
    change = dict(change)
    dtypes = {k[6:]: change.pop(k) for k in list(change) if k.startswith("dtype_")}
    devices = {k[7:]: change.pop(k) for k in list(change) if k.startswith("device_")}
    shapes = GOOD | {k: v for k, v in change.items() if isinstance(v, tuple)}
    other = {k: v for k, v in change.items() if not isinstance(v, tuple)}
    t = {k: torch.zeros(v, dtype=dtypes.get(k, torch.float32), device=devices.get(k, "cpu")) for k, v in shapes.items()}
    scaling = other.pop("scaling", 1.0)
    with pytest.raises(ValueError, match=message):
        lora_linear(t.pop("x"), t.pop("weight"), t.pop("lora_A"), t.pop("lora_B"), scaling, **t, **other)


def test_named_back_end_refuses_and_says_what_it_supports():
    p = random_problem(4, 24, 32, 8)
    with pytest.raises(ValueError, match="backend 'cpu' supports plain LoRA only"):
        lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0, out_scale=torch.ones(24), backend="cpu")
    with pytest.raises(ValueError, match="backend 'cpu' supports bfloat16, float16 and float32; got torch.float64"):
        d = p.to(torch.float64)
        lora_linear(d.x, d.weight, d.lora_A, d.lora_B, 1.0, backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend 'cuda' supports"):
            lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0, backend="cuda")


class Listener(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every operator and lets it pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def outcome(call):
    """What a call says: the error's text, or that it ran."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "ran"


def test_the_remembered_verdict_and_the_explained_one_agree():
    """Plain calls are checked once for each kind of arguments and remembered; calls that somebody listens to are
    checked each time. Random arguments, good and bad, in random order: both say the same, the first time and again."""
    g = random.Random(0)
    N, K, R = 6, 10, 3
    shapes = dict(x=(4, K), weight=(N, K), lora_A=(R, K), lora_B=(N, R), bias=(N,))
    ran = 0
    for _ in range(400):
        drawn = {}
        for name, shape in shapes.items():
            wrong = g.random() < 0.12
            others = [(), shape[:-1], (*shape[:-1], shape[-1] + 1), (0,) * len(shape), (1, *shape)]
            size = g.choice(others) if wrong else shape
            dtype = g.choice([torch.float16, torch.int32, torch.float64]) if g.random() < 0.08 else torch.float32
            device = "meta" if g.random() < 0.03 else "cpu"
            drawn[name] = torch.zeros(size, dtype=dtype, device=device)
        drawn["bias"] = drawn["bias"] if g.random() < 0.7 else None
        if g.random() < 0.05:  # no tensor at all, or another's
            drawn[g.choice(list(shapes))] = g.choice([None, *drawn.values()])
        dropout_p = g.choice([0.0, 0.5, 1.0, -0.1, float("nan"), "0.1", None]) if g.random() < 0.1 else 0.0
        backend = g.choice(["cpu", "reference", "gpu", None, 3, "cuda"]) if g.random() < 0.1 else "auto"
        bias = drawn.pop("bias")

        def call():
            lora_linear(*drawn.values(), 1.0, bias=bias, dropout_p=dropout_p, backend=backend)

        first, again = outcome(call), outcome(call)
        with Listener():
            explained = outcome(call)
        assert first == again == explained, (drawn, bias, dropout_p, backend)
        ran += first == "ran"
    assert 50 < ran < 350
