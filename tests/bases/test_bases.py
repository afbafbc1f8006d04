"""Quantised bases: the dense view, the layer around it, what is kept of it, and whose product serves."""

import gc
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from quantised_layers import KINDS, K, N, dense_layer, quantised

from fused_lora import bases, lora_update
from fused_lora.bases import around
from fused_lora.testing import assert_close

M, R, SCALING = 40, 8, 1.5


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def updates(monkeypatch):
    """How many rows each call of `lora_update` had, which is called where the library's own product serves."""
    seen, update = [], around.lora_update

    def counted(y, x, *args, **kwargs):
        seen.append(x.numel() // x.shape[-1])
        return update(y, x, *args, **kwargs)

    monkeypatch.setattr(around, "lora_update", counted)
    return seen


def factors(dtype=torch.float32, K=K):
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(R, K, generator=g) * K**-0.5, torch.randn(N, R, generator=g) * R**-0.5
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def inputs(*lead, dtype=torch.bfloat16, K=K):
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def gradients(y, x, A, B):
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *torch.autograd.grad(y, (x, A, B), torch.ones_like(y)))))


def composed(W, bias, x, A, B, dtype):
    """The layer over a dense weight in PyTorch's operators, all of it in one dtype."""
    x, A, B = (t.detach().to(dtype).requires_grad_() for t in (x, A, B))
    y = F.linear(x, W.to(dtype), bias.to(dtype)) + SCALING * F.linear(F.linear(x, A), B)
    return gradients(y, x, A, B)


def assert_right(got, W, bias, x, A, B):
    """As near to the truth over W as PyTorch in bf16."""
    same = composed(W, bias, x, A, B, torch.bfloat16)
    assert_close(
        got, {name: t.to(got[name].dtype) for name, t in same.items()}, composed(W, bias, x, A, B, torch.float64)
    )


def test_the_dense_view_is_what_the_library_multiplies_by(kind):
    linear = quantised(kind, bias=False)
    W = bases.of(linear).dense(torch.bfloat16)
    assert W.shape == (N, K) and W.dtype is torch.bfloat16 and not W.requires_grad
    torch.testing.assert_close(W, linear(torch.eye(K, dtype=torch.bfloat16)).t(), rtol=0.01, atol=0)
    assert 0 < (W - dense_layer(bias=False).weight).abs().max() < 0.03
    torch.testing.assert_close(bases.of(linear).dense(torch.float32).bfloat16(), W, rtol=0.01, atol=0)


@pytest.mark.parametrize("lead", [(M,), (2, 20), (1, 1)])
def test_y_and_gradients(kind, lead, updates):
    linear, x, (A, B) = quantised(kind), inputs(*lead), factors()
    W = bases.of(linear).dense(torch.bfloat16)
    y = bases.lora_around(linear, x, A, B, SCALING)
    assert y.shape == (*lead, N) and y.dtype is torch.bfloat16 and updates == []
    assert_right(gradients(y, x, A, B), W, linear.bias, x, A, B)


def test_every_subset_of_gradients(kind):
    linear = quantised(kind)
    for bits in range(16):
        x, (A, B), bias = inputs(M), factors(), linear.bias
        given = [x, A, B, bias]
        for i, t in enumerate(given):
            t.requires_grad_(bool(bits >> i & 1))
        y = bases.lora_around(linear, x, A, B, SCALING)
        wanted = [t for t in given if t.requires_grad]
        W = bases.of(linear).dense(torch.bfloat16).float()
        want = F.linear(x.float(), W, bias.float()) + SCALING * F.linear(F.linear(x.float(), A), B)
        torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
        if wanted:
            dy = torch.randn(M, N, generator=torch.Generator().manual_seed(3)).bfloat16()
            got, expected = torch.autograd.grad(y, wanted, dy), torch.autograd.grad(want, wanted, dy.float())
            for mine, theirs in zip(got, expected):
                assert (mine.float() - theirs.float()).abs().max() <= 0.03 * theirs.abs().max()
    linear.bias.requires_grad_(False)


def dense_copies() -> int:
    """How many floating tensors of W's size are alive."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum(t.is_floating_point() and t.numel() == N * K for t in alive)


def test_no_dense_weight_outlives_its_product(kind):
    """Neither for the backward (torchao's own product keeps W dense there) nor in the module."""
    linear, x, (A, B) = quantised(kind), inputs(M), factors()
    before, kept = dense_copies(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bases.lora_around(linear, x, A, B, SCALING)
    assert all(t.numel() != N * K for t in kept) and dense_copies() == before
    y.sum().backward()
    assert dense_copies() == before


def test_few_rows_without_a_gradient_take_the_library_product(kind, updates):
    linear, (A, B) = quantised(kind), factors()
    few = bases.of(linear).few_rows
    x = inputs(few + 1).detach()
    linear.eval()
    with torch.no_grad():
        many = bases.lora_around(linear, x, A, B, SCALING)
        assert updates == []
        one_by_one = torch.cat([bases.lora_around(linear, rows, A, B, SCALING) for rows in x.split(max(few, 1))])
    assert updates == ([few, 1] if few else [])
    assert (many.float() - one_by_one.float()).abs().max() <= 0.04 * many.float().abs().max()


@pytest.mark.parametrize("kind", ["nf4", "nf4 flat"])
def test_training_after_generating(kind, updates):
    """bitsandbytes packs a 4-bit weight in eval mode on some CPUs; its dequantisation of that form is wrong, and it has
    no gradient. Several blocks a row."""
    linear, x, (A, B) = quantised(kind, K=192), inputs(M, K=192), factors(K=192)
    W = bases.of(linear).dense(torch.bfloat16)
    with torch.no_grad():
        bases.lora_around(linear.eval(), x[:1].detach(), A, B, SCALING)
        packed = bases.of(linear).product_serves(M)
        bases.lora_around(linear, x, A, B, SCALING)
    assert updates == ([1, M] if packed else [1])
    y = bases.lora_around(linear.train(), x, A, B, SCALING)
    assert not bases.of(linear).product_serves(M)
    again = bases.of(linear).dense(torch.bfloat16)
    assert (again - W).abs().max() <= 0.02 * W.abs().max()  # the packed form's scales are bf16
    assert_right(gradients(y, x, A, B), again, linear.bias, x, A, B)
    with torch.no_grad():
        for unpack in (lambda: bases.of(linear).dense(torch.bfloat16), linear.state_dict):
            unpack()
            bases.lora_around(linear.eval(), x[:1].detach(), A, B, SCALING)
    assert (bases.of(linear).dense(torch.bfloat16) - W).abs().max() <= 0.02 * W.abs().max()


def test_a_4_bit_weight_that_sharding_made_anew():
    """FSDP's parameters are plain tensors with the packed values; the layer keeps the scales."""
    linear, x, (A, B) = quantised("nf4"), inputs(M), factors()
    W = bases.of(linear).dense(torch.bfloat16)
    linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
    y = bases.lora_around(linear, x, A, B, SCALING)
    assert_right(gradients(y, x, A, B), W, linear.bias, x, A, B)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dropout_has_one_mask_in_forward_and_backward(kind):
    """With W and bias taken away y is linear in x, so <y, dy> = <x, dx> iff both draw one mask."""
    linear, x, (A, B) = quantised(kind, torch.float32, bias=False), inputs(M, dtype=torch.float32), factors()
    dropped = lambda: bases.lora_around(linear, x, A, B, SCALING, dropout_p=0.5)
    low, dy = dropped() - F.linear(x, bases.of(linear).dense(torch.float32)), torch.randn(M, N)
    (dx,) = torch.autograd.grad(low, x, dy)
    torch.testing.assert_close((low * dy).sum(), (x * dx).sum(), rtol=1e-3, atol=1e-2)
    assert not torch.equal(dropped(), dropped())
    still = [bases.lora_around(linear, x, A, B, SCALING, dropout_p=0.5, training=False) for _ in range(2)]
    assert torch.equal(*still)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    linear, x, (A, B) = quantised("nf4"), inputs(M), factors()

    def run(x):
        return bases.lora_around(linear, x, A, B, SCALING, dropout_p=0.5)

    def grads(f):
        torch.manual_seed(7)
        y = f(x)
        y.sum().backward()
        found = [y.detach(), x.grad, A.grad, B.grad]
        x.grad = A.grad = B.grad = None
        return found

    for mine, theirs in zip(grads(lambda x: checkpoint(run, x, use_reentrant=reentrant)), grads(run)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_4_bit_layer_computes_in_its_own_dtype_and_returns_that_of_x(adapter):
    linear, (A, B) = quantised("nf4"), factors(adapter)
    x = inputs(M, dtype=torch.float32)
    y = bases.lora_around(linear, x, A, B, SCALING)
    W = bases.of(linear).dense(torch.bfloat16)
    low = F.linear(F.linear(x.bfloat16().float(), A.float()), B.float())
    want = F.linear(x.bfloat16().float(), W.float(), linear.bias.float()) + SCALING * low
    assert y.dtype is torch.float32
    assert (y - want).abs().max() <= 0.01 * want.abs().max()
    dx, dA, dB = torch.autograd.grad(y.sum(), (x, A, B))
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.float32, adapter, adapter)


def test_adapters_in_a_third_dtype(kind, updates):
    """PEFT computes the update in the adapter's dtype; so it is here, over the library's product."""
    linear, x, (A, B) = quantised(kind), inputs(M), factors(torch.float16)
    y = bases.lora_around(linear, x, A, B, SCALING)
    assert y.dtype is torch.bfloat16 and updates == [M]
    W = bases.of(linear).dense(torch.bfloat16).float()
    want = F.linear(x.float(), W, linear.bias.float()) + SCALING * F.linear(F.linear(x.float(), A.float()), B.float())
    assert (y.float() - want).abs().max() <= 0.02 * want.abs().max()
    y.sum().backward()
    assert x.grad.isfinite().all() and A.grad.any()


def test_autocast(kind):
    linear, x, (A, B) = quantised(kind), inputs(M, dtype=torch.float32), factors()
    with torch.autocast("cpu", torch.bfloat16):
        y = bases.lora_around(linear, x, A, B, SCALING)
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype) == (torch.float32, torch.float32)
    same = bases.lora_around(linear, x.bfloat16(), A, B, SCALING)
    assert torch.equal(y, same.to(y.dtype))


def test_autocast_rules_over_the_dtype_of_a_4_bit_layer():
    """As in the library's own product; models in fp32 have such layers, and nobody means to multiply in fp32 there."""
    linear, x, (A, B) = quantised("nf4", torch.float32), inputs(M, dtype=torch.float32), factors()
    with torch.autocast("cpu", torch.bfloat16):
        y = bases.lora_around(linear, x, A, B, SCALING)
    linear.compute_dtype = torch.bfloat16
    assert y.dtype is torch.float32 and torch.equal(y, bases.lora_around(linear, x, A, B, SCALING))


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_a_hooked_layer_is_called(kind, updates):
    linear, x, (A, B), calls = quantised(kind), inputs(M), factors(), []
    want = bases.lora_around(linear, x, A, B, SCALING)
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    y = bases.lora_around(linear, x, A, B, SCALING)
    handle.remove()
    assert calls == [1] and updates == [M]
    assert (y - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_a_subclass_with_a_forward_of_its_own_is_called(kind):
    linear, x, (A, B) = quantised(kind), inputs(M), factors()

    class Doubled(type(linear)):
        def forward(self, x):
            return 2 * super().forward(x)

    linear.__class__ = Doubled
    y = bases.lora_around(linear, x, A, B, SCALING)
    assert torch.equal(y, lora_update(linear(x), x, A, B, SCALING))


def test_hooks_on_all_modules_see_the_layer():
    linear, x, (A, B), seen = quantised("nf4"), inputs(M), factors(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    bases.lora_around(linear, x, A, B, SCALING)
    handle.remove()
    assert seen == [linear]


def test_plain_and_unknown_layers_are_called(updates):
    linear, x, (A, B) = dense_layer(torch.float32), inputs(M, dtype=torch.float32), factors()
    assert bases.of(linear) is None and not bases.quantised(linear)
    y = bases.lora_around(linear, x, A, B, SCALING)
    torch.testing.assert_close(y, linear(x) + SCALING * F.linear(F.linear(x, A), B))
    assert updates == [M]


def test_weights_whose_input_is_quantised_too_are_called():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = dense_layer()
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    assert bases.of(linear) is None


def test_a_layer_that_is_not_quantised_yet_is_named():
    import bitsandbytes as bnb

    x, (A, B) = inputs(M), factors()
    with pytest.raises(ValueError, match="linear must be quantised, .* got a Linear4bit that is not"):
        bases.lora_around(bnb.nn.Linear4bit(K, N), x, A, B, SCALING)
    with pytest.raises(ValueError, match="linear must be quantised, .* got a Linear8bitLt that is not"):
        bases.lora_around(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False), x, A, B, SCALING)
    assert bases.of(bnb.nn.Linear8bitLt(K, N)) is None  # which quantises a trained weight in each call


def test_wrong_factors_are_named(kind):
    linear, x, (A, B) = quantised(kind), inputs(M), factors()
    with pytest.raises(ValueError, match=rf"lora_A must have shape \[R, {K}\]"):
        bases.lora_around(linear, x, A[:, 1:], B, SCALING)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transforms_and_batched_gradients(kind):
    linear, x, (A, B) = quantised(kind, torch.float32), inputs(4, dtype=torch.float32), factors()
    W = bases.of(linear).dense(torch.float32)
    ours = lambda x, A: bases.lora_around(linear, x, A, B, SCALING)
    theirs = lambda x, A: F.linear(x, W, linear.bias) + SCALING * F.linear(F.linear(x, A), B)
    per_sample = [
        torch.vmap(torch.func.grad(lambda A, x: f(x, A).pow(2).sum()), (None, 0))(A, x) for f in (ours, theirs)
    ]
    torch.testing.assert_close(*per_sample, rtol=1e-4, atol=1e-4)
    jacobians = [torch.autograd.functional.jacobian(f, (x, A), vectorize=True) for f in (ours, theirs)]
    torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-4)
    twice = []
    for f in (ours, theirs):
        (dx,) = torch.autograd.grad(f(x, A).pow(2).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(dx.pow(2).sum(), (x, A)))
    torch.testing.assert_close(*twice, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiles_into_one_graph(kind):
    linear, x, (A, B) = quantised(kind), inputs(M), factors()
    f = lambda x, A, B: bases.lora_around(linear, x, A, B, SCALING)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, A, B)
    assert_right(gradients(y, x, A, B), bases.of(linear).dense(torch.bfloat16), linear.bias, x, A, B)


def test_layers_in_two_threads_do_not_share_memory():
    """Each makes its own dense view, and gets what it gets alone."""
    layers, (A, B), x = [quantised(kind) for kind in ("nf4", "fp4")], factors(), inputs(M)
    want = [gradients(bases.lora_around(layer, x, A, B, SCALING), x, A, B) for layer in layers]
    wrong = []

    def work(layer, expected):
        for _ in range(30):
            got = gradients(bases.lora_around(layer, x, A, B, SCALING), x, A, B)
            wrong.extend(name for name in got if not torch.equal(got[name], expected[name]))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
