"""The reference against autograd in fp64: every optional argument alone and all at once, and the dropout mask's
statistics."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import lora_linear
from fused_lora.ops.dropout import dropout_mask

M, N, K, R, S = 7, 6, 5, 4, 0.75
OPTIONS = ("x_lora", "h_in", "gate", "out_scale", "grad_row_scale")


def tensors(options, gate_blocks=2):
    g = torch.Generator().manual_seed(0)
    shapes = dict(
        x=(M, K),
        weight=(N, K),
        lora_A=(R, K),
        lora_B=(N, R),
        bias=(N,),
        x_lora=(M, K),
        h_in=(M, R),
        gate=(M, gate_blocks),
        out_scale=(N,),
        grad_row_scale=(N,),
    )
    made = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return {
        name: t.requires_grad_(name != "grad_row_scale")
        for name, t in made.items()
        if name not in OPTIONS or name in options
    }


class ScaleRows(torch.autograd.Function):
    """Identity whose gradient's columns are scaled: ALLoRA's definition, on the low-rank term's parameters only."""

    @staticmethod
    def forward(ctx, t, c):
        ctx.save_for_backward(c)
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0][:, None], None


def formula(
    x, weight, lora_A, lora_B, bias, x_lora=None, h_in=None, gate=None, out_scale=None, grad_row_scale=None, mask=None
):
    """The op in one line of autograd; the product BA carries the row scaling of its gradient."""
    x_lora = x if x_lora is None else x_lora
    x_lora = x_lora if mask is None else x_lora * mask
    if grad_row_scale is not None:
        fixed = S * (x_lora @ lora_A.detach().t()) @ lora_B.detach().t()
        BA = ScaleRows.apply(lora_B @ lora_A, grad_row_scale)
        low = fixed + S * (x_lora.detach() @ (BA - BA.detach()).t())
    else:
        h = x_lora @ lora_A.t()
        h = h if h_in is None else h + h_in
        h = h if gate is None else h * gate.repeat_interleave(R // gate.shape[1], 1)
        low = S * h @ lora_B.t()
    y = F.linear(x, weight) + low
    return (y if out_scale is None else y * out_scale) + bias


SUBSETS = [s for n in range(5) for s in itertools.combinations(OPTIONS[:4], n)] + [
    ("grad_row_scale",),
    ("grad_row_scale", "out_scale"),
    ("grad_row_scale", "x_lora"),
]


@pytest.mark.parametrize("options", SUBSETS, ids=lambda s: "+".join(s) or "plain")
def test_forward_and_backward_match_autograd(options):
    ours, theirs = tensors(options), tensors(options)
    y = lora_linear(
        *(ours[n] for n in ("x", "weight", "lora_A", "lora_B")),
        S,
        backend="reference",
        bias=ours["bias"],
        **{n: ours[n] for n in options},
    )
    want = formula(**theirs)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn(M, N, dtype=torch.float64)
    y.backward(dy)
    want.backward(dy)
    for name in ours:
        if name != "grad_row_scale":
            torch.testing.assert_close(
                ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("options", [(), OPTIONS[:4]], ids=["plain", "all"])
@pytest.mark.parametrize("return_h", [False, True])
def test_gradcheck(options, return_h):
    """Numerical derivatives of everything at once, the returned h included."""
    made = tensors(options, gate_blocks=4)
    names = list(made)

    def call(*values):
        a = dict(zip(names, values))
        return lora_linear(
            a.pop("x"),
            a.pop("weight"),
            a.pop("lora_A"),
            a.pop("lora_B"),
            S,
            backend="reference",
            return_h=return_h,
            **a,
        )

    torch.autograd.gradcheck(call, tuple(made.values()))


def test_returned_h_excludes_scale_gate_and_h_in():
    t = tensors(("h_in", "gate"))
    _, h = lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], S, h_in=t["h_in"], gate=t["gate"], return_h=True)
    torch.testing.assert_close(h, t["x"] @ t["lora_A"].t())


@pytest.mark.parametrize("way", ["eager", "operators"])
@pytest.mark.parametrize("names", [(), ("x_lora", "h_in", "gate", "out_scale")])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_gradient_through_the_returned_h_alone(lead, names, way):
    """Weights that hold infinities have no part in it; once more differentiated, too. (torch.compile hands a Function
    zeros for what was not used.)"""
    t = tensors(())
    x, A = torch.randn(*lead, K, dtype=torch.float64, requires_grad=True), t["lora_A"]
    sizes = dict(x_lora=(*lead, K), h_in=(*lead, R), gate=(*lead, 2), out_scale=(N,))
    given = {n: torch.randn(sizes[n], dtype=torch.float64, requires_grad=True) for n in names}
    weight, B = (torch.full_like(t[n], torch.inf).requires_grad_(n == "lora_B") for n in ("weight", "lora_B"))

    low = given.get("x_lora", x)
    with FlopCounterMode(display=False) if way == "operators" else nullcontext():
        torch.manual_seed(3)
        _, h = lora_linear(x, weight, A, B, S, dropout_p=0.4, return_h=True, **given)
        got = torch.autograd.grad(h.square().sum(), (low, A), create_graph=way == "eager")
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    mask = dropout_mask(seed, 6, K, 0.4, torch.float64).view_as(low)
    expected = torch.autograd.grad(((low * mask) @ A.t()).square().sum(), (low, A), create_graph=True)
    torch.testing.assert_close(got, expected)
    if way == "eager":
        again = [torch.autograd.grad(sum(g.square().sum() for g in grads), (low, A)) for grads in (got, expected)]
        torch.testing.assert_close(*again)


def test_autocast_leaves_the_gradient_through_h_alone():
    """It has acted on what the op was given, and must not act again in a backward that runs under it."""
    x, A = torch.randn(M, K, requires_grad=True), torch.randn(R, K, requires_grad=True)
    found = []
    for enabled in (False, True):
        _, h = lora_linear(x, torch.randn(N, K), A, torch.randn(N, R), S, return_h=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(h.sum(), (x, A)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_decides_nothing(default):
    """What the CPU's kernels write is made in the dtype that they write."""
    shapes = dict(x=(M, K), weight=(N, K), A=(R, K), B=(N, R), gate=(M, 2), out_scale=(N,), h_in=(M, R))
    t = {name: torch.rand(shape, requires_grad=True) for name, shape in shapes.items()}
    given, optional = [t.pop(name) for name in ("x", "weight", "A", "B")], t

    def gradients(backend):
        y = lora_linear(*given, S, backend=backend, **optional)
        return torch.autograd.grad(y.square().sum(), (*given, *optional.values()))

    want = gradients("reference")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        got = gradients("cpu")
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(got, want)


def test_zero_scaling_keeps_the_gate_gradient_finite():
    t = tensors(("gate",))
    lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], 0.0, gate=t["gate"]).sum().backward()
    assert torch.equal(t["gate"].grad, torch.zeros(M, 2, dtype=torch.float64))


def test_dropout_in_the_reference_is_the_mask():
    t = tensors(())
    torch.manual_seed(3)
    y = lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], S, bias=t["bias"], dropout_p=0.4)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    mask = dropout_mask(seed, M, K, 0.4, torch.float64)
    torch.testing.assert_close(y, formula(**tensors(()), mask=mask))


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10: zero counter and key, and all ones."""
    words = draws(0, rows=1, cols=8)
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def draws(seed, rows, cols):
    """The four words behind the first eight columns of the last row, read off the mask by bisection on p."""
    low, high = [0] * 8, [65536] * 8
    for _ in range(16):
        for j in range(8):
            middle = (low[j] + high[j]) // 2
            kept = dropout_mask(torch.tensor([seed]), rows, cols, middle / 65536)[-1, j] > 0
            low[j], high[j] = (middle, high[j]) if kept else (low[j], middle)
    return [low[2 * j] | low[2 * j + 1] << 16 for j in range(4)]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.99])
def test_mask_statistics(p):
    """Mean one, drop rate p within five standard deviations, rows and columns uncorrelated."""
    mask = dropout_mask(torch.tensor([42]), 512, 1024, p)
    n = mask.numel()
    assert abs((mask == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-5
    kept = (mask > 0).double() - (1 - p)
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[:, 8:], kept[:, :-8])):
        assert abs((a * b).mean().item()) < 5 * p * (1 - p) / n**0.5 + 1e-5


def test_mask_does_not_depend_on_the_shape():
    big = dropout_mask(torch.tensor([7]), 40, 64, 0.3)
    assert torch.equal(dropout_mask(torch.tensor([7]), 11, 29, 0.3), big[:11, :29])


def test_seeds_differ():
    a, b = (dropout_mask(torch.tensor([s]), 64, 64, 0.5) for s in (1, 2**33 + 1))
    assert 0.4 < (a == b).double().mean().item() < 0.6
