"""grouped_lora_linear(): equal to the base product and grouped_lora_update, whoever listens."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import grouped_lora_update
from fused_lora.backends import cpu_product, pick
from fused_lora.ops import grouped_linear
from fused_lora.ops.grouped_linear import grouped_lora_linear
from fused_lora.ops.reference import PLAIN
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close

N, K, RANKS = 24, 33, (3, 8, 2)


def problem(dtype=torch.float32, *, indexed=True, biased=True, trains=(True,) * 7):
    """weight, bias, offsets, rows, dy, and what may train: x and the factors. A group is empty."""
    g = torch.Generator().manual_seed(0)
    fill = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    leaves = [fill(4, 5, K), *(fill(R, K) / 6 for R in RANKS), *(fill(N, R) for R in RANKS)]
    leaves = [t.requires_grad_(train) for t, train in zip(leaves, trains)]
    rows = torch.randperm(20, generator=g)[:15] if indexed else None
    offsets = torch.tensor([0, 9, 9, 15 if indexed else 20])
    return fill(N, K), fill(N) if biased else None, offsets, rows, fill(4, 5, N), leaves


def ours(weight, bias, offsets, rows, x, *factors, ps=(0.0,) * 3):
    return grouped_lora_linear(x, weight, bias, factors[:3], factors[3:], [0.5, 1.0, 2.0], offsets, rows, ps)


def apart(weight, bias, offsets, rows, x, *factors, ps=(0.0,) * 3):
    y, given = F.linear(x, weight, bias), (factors[:3], factors[3:], [0.5, 1.0, 2.0], offsets)
    return grouped_lora_update(y, x, *given, rows=rows, dropout_p=ps)


def results(f, given, dy, leaves, **options):
    """y and the gradients of what trains, by name; dropout's draws are the same in each call."""
    torch.manual_seed(7)
    y = f(*given, *leaves, **options)
    trained = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(y, trained, dy) if trained else []
    return dict(y=y.detach()) | {str(i): grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize(
    "trains", [(True,) * 7, (True,) + (False,) * 6, (False,) + (True,) * 6, (False, True) * 3 + (0,)]
)
@pytest.mark.parametrize("indexed, biased", [(True, True), (False, False)])
def test_is_the_base_product_and_the_update(trains, indexed, biased):
    for dtype in (torch.float32, torch.bfloat16):
        *given, dy, leaves = problem(dtype, indexed=indexed, biased=biased, trains=map(bool, trains))
        exact = [t if t is None or not t.is_floating_point() else t.double() for t in given]
        truth = results(
            apart, exact, dy.double(), [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        )
        for _ in range(2):  # the second call relies on the first one's checks
            assert_close(results(ours, given, dy, leaves), results(apart, given, dy, leaves), truth)
        with torch.no_grad():
            found = [{"y": f(*given, *leaves)} for f in (ours, apart)]
            assert_close(*found, truth)
    masked = [results(f, given, dy, leaves, ps=(0.5, 0.1, 0.0)) for f in (ours, apart)]
    torch.testing.assert_close(*masked, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_product_is_plain_lora_s(monkeypatch, dtype):
    """Of the kernels where that is "inside", forward and backward; its row follows from the weight's strides."""
    calls, real = [], cpu_product.product
    monkeypatch.setattr(cpu_product, "product", lambda x, W, *bias: calls.append(W.shape) or real(x, W, *bias))
    weight, *given, dy, leaves = problem(dtype)
    for each in (weight, weight.t().contiguous().t()):
        x = leaves[0].detach()
        plan = pick("auto", request_of(x, each, leaves[1], PLAIN)).plan
        own = plan == "inside" and cpu_product.serves(dtype)
        calls.clear()
        results(ours, (each, *given), dy, leaves)
        assert calls == [each.shape, each.t().shape] * own


def test_other_tensors_after_the_first_call_are_checked_anew():
    *given, dy, leaves = problem()
    ours(*given, *leaves)
    given[0] = given[0].bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        ours(*given, *leaves)
    given[0] = given[0].float()
    with pytest.raises(ValueError, match="lora_B must have lora_A's rank"):
        ours(*given, *leaves[:6], torch.zeros(N, 5))
    strided = [t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in leaves]
    torch.testing.assert_close(results(ours, given, dy, strided), results(apart, given, dy, leaves))


def test_the_result_is_nobodys_view(monkeypatch):
    *given, dy, leaves = problem()
    monkeypatch.setattr(grouped_linear, "grouped_lora_update", None)  # this is not the way through it
    y = ours(*given, *leaves)
    y += 1.0
    y.backward(dy)
    with torch.no_grad():
        before = leaves[0].clone()
        ours(*given, *leaves).zero_()
    assert torch.equal(leaves[0], before)


def test_second_derivatives_batched_gradients_autocast_and_modes():
    *given, dy, leaves = problem()

    def second(f):
        first = torch.autograd.grad(f(*given, *leaves).pow(2).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves)]

    torch.testing.assert_close(second(ours), second(apart), rtol=1e-4, atol=1e-3)

    def batched(f):
        return torch.autograd.grad(f(*given, *leaves), leaves, torch.stack([dy, 2 * dy]), is_grads_batched=True)

    torch.testing.assert_close(batched(ours), batched(apart), rtol=1e-4, atol=1e-4)
    y = ours(*given, *leaves)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [f(*given, *leaves) for f in (ours, apart)]
        grads = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(*outputs) and outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads, torch.autograd.grad(apart(*given, *leaves), leaves, dy))
    with FlopCounterMode(display=False) as counter:
        ours(*given, *leaves)
    assert any("grouped_update" in str(op) for op in counter.flop_counts["Global"])
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(*given, x, *leaves[1:]).pow(2).sum())(leaves[0]),
        torch.func.grad(lambda x: apart(*given, x, *leaves[1:]).pow(2).sum())(leaves[0]),
    )


def test_compiles_into_one_graph():
    *given, dy, leaves = problem()
    ours(*given, *leaves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, given, dy, leaves), results(ours, given, dy, leaves))
