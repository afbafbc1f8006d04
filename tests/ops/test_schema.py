"""The two operators as PyTorch sees them: opcheck, torch.compile, fake tensors, selective checkpointing."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fused_lora import lora_linear
from fused_lora.testing import random_problem

FORWARD, BACKWARD = torch.ops.fused_lora.forward.default, torch.ops.fused_lora.backward.default
SEED = torch.tensor([5], dtype=torch.int64)


def forward_args(p, *, dropout=False, variant=(None,) * 5):
    tensors = (p.x, p.weight, p.lora_A, p.lora_B, p.bias)
    return (*tensors, p.scaling, 0.5 if dropout else 0.0, SEED if dropout else None, *variant, "auto")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(dtype, dropout):
    p = random_problem(6, 10, 12, 3, dtype)
    p.x = p.x.t().contiguous().t()  # a permuted dense layout
    torch.library.opcheck(FORWARD, forward_args(p, dropout=dropout))


def test_opcheck_variants():
    p = random_problem(6, 10, 12, 4)
    variant = (torch.randn(6, 12), torch.randn(6, 4), torch.randn(6, 2), torch.rand(10), torch.rand(10))
    torch.library.opcheck(FORWARD, forward_args(p, variant=variant))
    tensors = (p.dy, torch.randn(6, 4), p.x, p.weight, p.lora_A, p.lora_B, torch.randn(6, 4), p.x[:, :10], p.bias)
    torch.library.opcheck(BACKWARD, (*tensors, 1.5, 0.0, None, *variant, [True] * 9, "auto"))


@pytest.mark.parametrize("needs", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 1), (0, 0, 1, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_opcheck_backward(needs):
    p = random_problem(6, 10, 12, 3)
    mask = [bool(n) for n in needs] + [False] * 4
    p.weight = p.weight.t().contiguous().t() if needs[1] else p.weight  # as in a trained Conv1D
    tensors = (p.dy, None, p.x, p.weight, p.lora_A, p.lora_B, torch.randn(6, 3), None, None)
    torch.library.opcheck(BACKWARD, (*tensors, 1.5, 0.5, SEED, *(None,) * 5, mask, "auto"))


def step(x, W, A, B, bias, scaling=1.5, dropout_p=0.0):
    y = lora_linear(x, W, A, B, scaling, bias=bias, dropout_p=dropout_p)
    return torch.nn.functional.gelu(y).square().mean()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    """fullgraph=True raises at the first graph break; values and gradients are those of eager."""
    p = random_problem(24, 16, 32, 4)

    def grads(f):
        ts = [t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.bias)]
        loss = f(ts[0], p.weight, *ts[1:])
        loss.backward()
        return [loss.detach()] + [t.grad for t in ts]

    torch.testing.assert_close(
        grads(torch.compile(step, fullgraph=True, backend=compiler)), grads(step), rtol=1e-5, atol=1e-6
    )


def test_optional_tensors_compile_into_one_graph():
    """All of them, with every gradient and the returned h's."""
    p = random_problem(24, 16, 32, 4)
    g = torch.Generator().manual_seed(2)
    shapes = dict(x_lora=(24, 32), h_in=(24, 4), gate=(24, 2), out_scale=(16,), grad_row_scale=(16,))
    optional = {name: torch.rand(*shape, generator=g) for name, shape in shapes.items()}

    def step(x, W, A, B, bias, x_lora, h_in, gate, out_scale):
        given = dict(x_lora=x_lora, h_in=h_in, gate=gate, out_scale=out_scale)
        fixed = dict(grad_row_scale=optional["grad_row_scale"], return_h=True)
        y, h = lora_linear(x, W, A, B, 1.5, bias=bias, **given, **fixed)
        return y.square().mean() + h.square().mean()

    def grads(f):
        given = (p.x, p.weight, p.lora_A, p.lora_B, p.bias, *list(optional.values())[:4])
        leaves = [t.clone().requires_grad_() for t in given]
        loss = f(*leaves)
        loss.backward()
        return [loss.detach()] + [t.grad for t in leaves]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads(compiled), grads(step), rtol=1e-5, atol=1e-6)


def test_compiled_dropout_is_the_same_in_forward_and_backward():
    """y is linear in x with the mask fixed, so <y, dy> = <x, dx> iff both draw one mask."""
    p = random_problem(24, 16, 32, 4, bias=False)
    f = torch.compile(
        lambda x: lora_linear(x, torch.zeros_like(p.weight), p.lora_A, p.lora_B, 1.0, dropout_p=0.5),
        fullgraph=True,
        backend="aot_eager",
    )
    x = p.x.clone().requires_grad_()
    y = f(x)
    y.backward(p.dy)
    torch.testing.assert_close((y * p.dy).sum(), (x * x.grad).sum(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(f(x), f(x))


def test_dynamic_token_counts_and_tensor_scaling_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(step, fullgraph=True, backend=counter)
    p = random_problem(64, 16, 32, 4)
    A = p.lora_A.requires_grad_()
    for M in (8, 16, 24, 40, 64):
        f(p.x[:M], p.weight, A, p.lora_B, p.bias).backward()
    assert counter.frame_count <= 2
    torch._dynamo.reset()
    counter.frame_count = 0
    for s in (0.5, 1.0, 2.0, 3.0):
        f(p.x, p.weight, A, p.lora_B, p.bias, torch.tensor(s)).backward()
    assert counter.frame_count == 1


def test_selective_checkpointing_sees_the_operator():
    """With MUST_SAVE on the op its forward runs once, otherwise again in the backward."""
    p = random_problem(8, 16, 32, 4)
    runs = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is FORWARD:
                runs.append(1)
            return func(*args, **(kwargs or {}))

    def policy(save, ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save and op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    for save, expected in ((True, 1), (False, 2)):
        runs.clear()
        x = p.x.clone().requires_grad_()
        with Count():
            contexts = partial(create_selective_checkpoint_contexts, partial(policy, save))
            checkpoint(
                step, x, p.weight, p.lora_A, p.lora_B, p.bias, use_reentrant=False, context_fn=contexts
            ).backward()
        assert len(runs) == expected


def test_fake_tensors_need_no_kernel():
    with torch._subclasses.FakeTensorMode():
        y = lora_linear(torch.empty(2, 5, 32), torch.empty(16, 32), torch.empty(4, 32), torch.empty(16, 4), 1.0)
    assert y.shape == (2, 5, 16)
