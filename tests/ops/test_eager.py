"""Calls with optional tensors where nobody listens: straight to the back end, with the dispatcher's results."""

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import lora_linear
from fused_lora.ops import internals, linear
from fused_lora.testing import random_problem

LEAD, N, K, R = (2, 3), 24, 32, 4
NAMES = ("x_lora", "h_in", "gate", "out_scale", "grad_row_scale")
SETS = [*[(name,) for name in NAMES], (), ("h_in", "gate"), NAMES]

eager = pytest.mark.skipif(internals._TensorGuards is None, reason="PyTorch has no guards: every call is checked")


class Listens(TorchDispatchMode):
    """Sees the names of the operators and changes nothing."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def problem(names, dtype=torch.float32, lead=LEAD):
    """x, A, B, the trained optional tensors (all but grad_row_scale) and all optional tensors by name."""
    p = random_problem(6, N, K, R, dtype)
    made = dict(
        x_lora=torch.randn(*lead, K).to(dtype),
        h_in=torch.randn(*lead, R).to(dtype),
        gate=torch.rand(*lead, 2),
        out_scale=torch.rand(N) + 0.5,
        grad_row_scale=torch.rand(N),
    )
    given = {name: made[name] for name in names}
    x = p.x[:1].expand(torch.Size(lead).numel(), K).reshape(*lead, K)
    leaves = [t.detach().clone().requires_grad_() for t in (x, p.lora_A, p.lora_B)]
    leaves += [t.requires_grad_() for name, t in given.items() if name != "grad_row_scale"]
    return p, leaves, given


def call(p, leaves, given, **kwargs):
    return lora_linear(leaves[0], p.weight, leaves[1], leaves[2], 1.5, bias=p.bias, **given, **kwargs)


def results(p, leaves, given, **kwargs):
    made = call(p, leaves, given, **kwargs)
    outputs = made if isinstance(made, tuple) else (made,)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) * 0.5 for t in outputs])
    return [t.detach() for t in outputs] + list(grads)


@eager
@pytest.mark.parametrize("return_h", [False, True])
@pytest.mark.parametrize("names", SETS, ids=lambda names: "+".join(names) or "none")
def test_the_eager_path_is_taken_and_equals_the_dispatchers(monkeypatch, names, return_h):
    if not (names or return_h):
        pytest.skip("a plain call")
    for lead, dropout_p in ((LEAD, 0.0), ((6,), 0.0), (LEAD, 0.25)):
        given, taken = problem(names, lead=lead), []
        real = linear.eager_variant_apply
        monkeypatch.setattr(linear, "eager_variant_apply", lambda *args: taken.append(1) or real(*args))
        kwargs = dict(return_h=return_h, dropout_p=dropout_p)
        torch.manual_seed(3)
        got = results(*given, **kwargs)
        assert len(taken) == 1
        torch.manual_seed(3)
        with Listens() as listener:
            want = results(*given, **kwargs)
        assert len(taken) == 1 and {"fused_lora::forward", "fused_lora::backward"} <= listener.seen
        assert all(map(torch.equal, got, want)) and len(got) == len(want)
        monkeypatch.undo()


@eager
def test_a_listener_that_comes_after_the_forward_sees_the_backward():
    p, leaves, given = problem(("gate", "out_scale"))
    want = results(p, leaves, given)[1:]
    y = call(p, leaves, given)
    with Listens() as listener:
        got = torch.autograd.grad(y, leaves, torch.ones_like(y) * 0.5)
    assert "fused_lora::backward" in listener.seen and all(map(torch.equal, got, want))


def test_what_changes_after_a_verdict_is_checked_anew():
    """Rows, ranks, dtypes and the listeners may change from call to call, wrong arguments are named each time."""
    names = ("h_in", "gate", "out_scale")
    p, leaves, given = problem(names)
    call(p, leaves, given)
    wrong = {
        "h_in": given["h_in"][..., :3],
        "gate": given["gate"][:1],  # as many dimensions, other rows
        "out_scale": given["out_scale"].bfloat16(),
    }
    for name, t in wrong.items():
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{name} must have shape"):
                call(p, leaves, given | {name: t})
    with pytest.raises(ValueError, match="^gate must be on x's device"):
        call(p, leaves, given | {"gate": given["gate"].detach().to("meta")})
    with pytest.raises(ValueError, match="^dropout_p must be in"):
        call(p, leaves, given, dropout_p=1.0)
    with pytest.raises(ValueError, match="^backend must be one of"):
        call(p, leaves, given, backend="none")
    with pytest.raises(ValueError, match="^weight must have x's dtype"):
        lora_linear(leaves[0].bfloat16(), p.weight, *leaves[1:3], 1.5, bias=p.bias, **given)
    for dtype, lead in ((torch.bfloat16, LEAD), (torch.float32, (5, 3)), (torch.float64, LEAD)):
        other = problem(names, dtype, lead)
        got = results(*other)
        with Listens():
            assert all(map(torch.equal, got, results(*other)))


def test_one_tensor_given_twice():
    p, leaves, _ = problem(())
    other = leaves[0].detach().clone().requires_grad_()
    for _ in range(2):
        both = torch.autograd.grad(call(p, leaves, {"x_lora": leaves[0]}).sum(), leaves[0])[0]
        apart = torch.autograd.grad(call(p, leaves, {"x_lora": other}).sum(), (leaves[0], other))
        torch.testing.assert_close(both, apart[0] + apart[1])


@eager
@pytest.mark.parametrize("lead", [(6,), LEAD])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_function_is_applied(monkeypatch, mode, lead):
    """The same bits; and a result that the residual can be added to in place, then and with gradients."""
    p, leaves, _ = problem((), lead=lead)
    want = call(p, leaves, {})
    monkeypatch.setattr(linear, "eager_apply", None)
    with mode():
        y = call(p, leaves, {})
        assert torch.equal(y, want) and not y.requires_grad and y.grad_fn is None
        assert torch.equal(y.clone().add_(1.0), want + 1.0)
    if mode is torch.no_grad:
        y += leaves[0].sum()
        assert y.requires_grad


@pytest.mark.parametrize("names", [(), ("out_scale",)], ids=["plain", "out_scale"])
def test_a_gradient_that_is_still_on_its_way_is_waited_for(names):
    """What sequence parallelism gathers for the backward is a tensor without memory until somebody looks at it."""
    p = random_problem(6, N, K, R, torch.float32)
    given = {name: torch.rand(N) + 0.5 for name in names}
    x, A, B = (t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B))

    def gradients(dy):
        return torch.autograd.grad(lora_linear(x, p.weight, A, B, 0.5, **given), (x, A, B), dy)

    for got, want in zip(gradients(AsyncCollectiveTensor(p.dy)), gradients(p.dy)):
        assert torch.equal(got, want)
