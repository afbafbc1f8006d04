"""DoRA: the layer against its formula in fp64, in both modes of the backward; what is kept once a step; merging."""

import copy
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from quantised_layers import quantised
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRALinear, lora_linear
from fused_lora.backends import cpu_norm
from fused_lora.ops.internals import marks
from fused_lora.variants import dora
from fused_lora.variants.once import OncePerStep

K, N, R, S = 24, 40, 4, 2.0


def trained(linear=None, dtype=torch.float64, **adapter) -> LoRALinear:
    """A DoRA layer with an adapter that is far from its start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype) if linear is None else linear
    layer = LoRALinear.from_linear(linear, **dict(r=R, lora_alpha=R * S, use_dora=True) | adapter)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in layer.own_tensors(layer.active_adapter):
            t.add_(0.3 * torch.randn(t.shape, generator=g, dtype=torch.float64))
    return layer


def inputs(*lead: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def formula(layer, x, factors, exact=False, dropped=None):
    """The layer's contract on fp64 tensors A, B and m, or m alone, with the matrix W + s B A formed."""
    W = layer.matrix().detach().double()
    A, B, m = factors if len(factors) == 3 else (W.new_zeros(1, K), W.new_zeros(N, 1), *factors)
    V = W + S * B @ A
    n = torch.linalg.vector_norm(V, dim=1)
    g = m / (n if exact else n.detach())
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    if dropped is None:
        return g * (x @ V.T) + bias
    return x @ W.T + (g - 1) * (dropped @ W.T) + g * S * (dropped @ A.T @ B.T) + bias


def gradients(y, dy, tensors):
    return torch.autograd.grad(y, tensors, dy)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("exact, r", [(False, R), (True, R), (False, 0)])
def test_y_and_every_gradient(exact, r, p):
    layer, x = trained(dora_exact=exact, lora_dropout=p, r=r), inputs(3, 5).requires_grad_()
    own = layer.own_tensors("default")
    twins = [t.detach().double().requires_grad_() for t in own]
    dropped = None
    if p:
        torch.manual_seed(7)
        dropped = F.dropout(x, p)
    want = formula(layer, x, twins, exact, dropped)
    torch.manual_seed(7)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(want)
    for a, b in zip(gradients(got, dy, [x, *own]), gradients(want, dy, [x, *twins]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_derivatives(dtype, exact, grad):
    """The norms are constants to them, too, but for dora_exact; also where they have been kept."""
    layer, x = trained(dtype=dtype, adapter_dtype=dtype, dora_exact=exact), inputs(5, dtype=dtype)
    layer(x)
    names = [f"{kind}.default" for kind in ("lora_A", "lora_B", "lora_magnitude_vector")]
    at = [t.detach() for t in (x, *layer.own_tensors("default"))]
    along = [torch.randn_like(t) for t in at]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        x, *own = map(forward_ad.make_dual, at, along)
        y = torch.func.functional_call(layer, dict(zip(names, own, strict=True)), (x,))
        got = forward_ad.unpack_dual(y).tangent.double()
    wide = tuple(t.double() for t in at), tuple(t.double() for t in along)
    want = torch.func.jvp(lambda x, *factors: formula(layer, x, factors, exact), *wide)[1]
    torch.testing.assert_close(got, want, rtol=1e-3 if dtype is torch.float32 else 1e-9, atol=1e-4)


def test_magnitudes_alone_train():
    """A rank of 0 leaves nothing else to an optimizer, and among several adapters it scales those before it."""
    layer, x = trained(r=0), inputs(9)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_magnitude_vector.default"]
    layer.add_adapter("plain", R, R * S)
    nn.init.normal_(layer.lora_B["plain"])
    layer.set_adapter(["plain", "default"])
    own = [t.detach() for name in ("plain", "default") for t in layer.own_tensors(name)]
    g = own[2] / torch.linalg.vector_norm(layer.weight, dim=1)
    want = g * (x @ (layer.weight + S * own[1] @ own[0]).T) + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("around", [False, True])
def test_a_fresh_adapter_changes_not_one_bit(bias, p, around):
    """Of the base layer, or of the base product by the kernel that has the update inside."""
    linear = nn.Linear(K, N, bias=bias)
    if around:
        linear.register_forward_hook(lambda *args: None)
    layer = LoRALinear.from_linear(copy.deepcopy(linear), R, lora_dropout=p, use_dora=True)
    x = inputs(9, dtype=torch.float32)
    want = linear(x) if around else LoRALinear.from_linear(copy.deepcopy(linear), R)(x)
    assert torch.equal(layer(x), want)
    torch.testing.assert_close(want, linear(x), rtol=0, atol=1e-5)
    assert layer.lora_magnitude_vector["default"].dtype is torch.float32


@pytest.mark.parametrize("exact", [False, True])
def test_a_fresh_adapter_s_scale_is_one(exact):
    """m and n come from the same operators, with gradients and without."""
    layer = LoRALinear(576, 1536, 16, use_dora=True, dora_exact=exact)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            g = layer.variants["default"].scale(layer, layer.lora_A["default"], layer.lora_B["default"])
        assert torch.equal(g, torch.ones(1536))


def test_magnitudes_are_fp32_over_a_bf16_base():
    layer = LoRALinear(K, N, R, bias=False, dtype=torch.bfloat16, use_dora=True, adapter_dtype=torch.bfloat16)
    m, x = layer.lora_magnitude_vector["default"], inputs(9, dtype=torch.bfloat16)
    assert m.dtype is torch.float32 and layer.lora_A["default"].dtype is torch.bfloat16
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("r", [R, 0])
def test_on_each_back_end(backend, r):
    """y, dx, dA, dB and dm of the op with DoRA's g, against fp64; without a rank y, dx and dm."""
    layer, x = trained(dtype=torch.float32, r=r).to(backend.device), inputs(33, dtype=torch.float32).to(backend.device)
    own, x = layer.own_tensors("default"), x.requires_grad_()
    lora_A, lora_B, scaling, _, optional, *_ = layer.variants["default"].update(layer, x)
    if backend.name == "cuda":
        pytest.skip("the compiled CUDA kernels take plain LoRA only")
    got = lora_linear(x, layer.weight, lora_A, lora_B, scaling, bias=layer.bias, backend=backend.name, **optional)
    twins = [t.detach().double().requires_grad_() for t in (x, *own)]
    want = formula(layer, twins[0], twins[1:])
    dy = torch.randn_like(got)
    pairs = [(got, want), *zip(gradients(got, dy, [x, *own]), gradients(want, dy.double(), twins), strict=True)]
    for a, b in pairs:
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_norms_of_rows():
    """Without B A: of a weight that needs several blocks, and of rows that are zero."""
    torch.manual_seed(0)
    weight, A, B = torch.randn(1200, 1000).bfloat16(), torch.randn(R, 1000), torch.randn(1200, R)
    weight[:3] = 0
    B[:2] = 0
    assert len(dora._blocks(weight, torch.float32)) > 1
    n, empty = dora.row_norm(weight, dora.row_squares(weight), A, B, S)
    want = torch.linalg.vector_norm(weight.double() + S * B.double() @ A.double(), dim=1)
    assert empty.nonzero().flatten().tolist() == [0, 1] and n.dtype is torch.float32
    torch.testing.assert_close((n - empty).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (100, 385, 7), (391, 40, 33), (25, 800, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_s_norms_of_rows(shape, dtype):
    """Exactly, of integers; of a W in a wider matrix, whose rows and ranks make several blocks or no whole one."""
    N, K, R = shape
    g = torch.Generator().manual_seed(N)
    wide, A, B = (torch.randint(-2, 3, s, generator=g).float() for s in ((N + 1, K + 3), (R, K), (N, R)))
    weight = wide.to(dtype)[1:, 2:-1]
    assert cpu_norm.serves(A, B, weight)
    n, empty = cpu_norm.row_norm(weight, A, B, 0.5)
    want = (weight.double() + 0.5 * B.double() @ A.double()).square().sum(1)
    assert torch.equal(n, want.where(want > 0, torch.ones_like(want)).sqrt().float())
    assert torch.equal(torch.zeros(N) if empty is None else empty, (want == 0).float())
    want = (B.double() @ A.double()).square().sum(1).sqrt()
    assert torch.equal(cpu_norm.product_norms(A, B), want.float())


def test_the_kernel_s_norms_of_products_that_cancel():
    """Rounding makes some squares negative, and there is no W to take a row from."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        row = torch.randn(1024, generator=g)
        A = torch.stack([row, row * (1 + 1e-7 * torch.randn(1024, generator=g))])
        norms = cpu_norm.product_norms(A, torch.tensor([[1.0, -1.0]] * 4))
        assert (norms >= 0).all() and (norms < 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_rows_that_the_adapter_nearly_takes_away(by_kernel, dtype):
    """n by sums that cancel would be wrong by 10 % at a thousandth of |W|, and 1 for a row that it takes for empty."""
    torch.manual_seed(0)
    A, B = torch.randn(R, 500), torch.randn(40, R)
    weight = (-S * B @ A).to(dtype)
    kept = torch.tensor([1.0, 0.3, 0.1, 1e-2, 1e-3, 3e-4]).repeat(7)[:40, None]
    B *= 1.0 - kept
    want = torch.linalg.vector_norm(weight.double() + S * B.double() @ A.double(), dim=1)
    with torch.no_grad():
        given = (weight, A, B, S) if by_kernel else (weight, dora.row_squares(weight), A, B, S)
        n, empty = (cpu_norm if by_kernel else dora).row_norm(*given)
    assert empty is None if by_kernel else not empty.any()
    torch.testing.assert_close(n.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32])
def test_norms_by_the_kernel_where_it_serves(monkeypatch, adapter_dtype):
    """Not in fp64, with the gradient through the norms, or where torch.func looks."""
    calls, real = [], cpu_norm.row_norm
    monkeypatch.setattr(cpu_norm, "row_norm", lambda *given: calls.append(None) or real(*given))
    for exact in (False, True):
        layer = trained(dtype=adapter_dtype, adapter_dtype=adapter_dtype, dora_exact=exact)
        calls.clear()
        layer(inputs(9, dtype=adapter_dtype))
        assert len(calls) == (adapter_dtype is torch.float32 and not exact)
        calls.clear()
        torch.func.vmap(layer)(inputs(2, 9, dtype=adapter_dtype))
        assert calls == []


def test_vmap_over_exact_norms_where_pytorch_does_not_tell(monkeypatch):
    """As with FUSED_LORA_INTERNALS=0."""
    monkeypatch.setattr(dora, "transforms_active", lambda: False)
    layer, x = trained(dora_exact=True), inputs(2, 9)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_rows_of_zeros_train():
    """m and n are 0 there, and g is 1: B gets the gradient that LoRA's gets."""
    linear = nn.Linear(K, N, bias=False)
    nn.init.zeros_(linear.weight[:2].data)
    layer = LoRALinear.from_linear(linear, R, use_dora=True)
    assert torch.equal(layer.lora_magnitude_vector["default"][:2], torch.zeros(2))
    layer(inputs(9, dtype=torch.float32)).sum().backward()
    plain = LoRALinear.from_linear(copy.deepcopy(linear), R)
    plain.lora_A["default"].data.copy_(layer.lora_A["default"])
    plain(inputs(9, dtype=torch.float32)).sum().backward()
    torch.testing.assert_close(layer.lora_B["default"].grad, plain.lora_B["default"].grad)
    assert all(t.grad.isfinite().all() for t in layer.own_tensors("default"))


def test_the_balance_of_a_and_b_does_not_matter():
    layer, x = trained(), inputs(9)
    y = layer(x)
    with torch.no_grad():
        layer.lora_A["default"].mul_(8.0)
        layer.lora_B["default"].div_(8.0)
    torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-13)


class PastAutograd(torch.optim.Optimizer):
    """An optimizer that writes where autograd does not count."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.mul_(1.5)


def _step(layer):
    layer(inputs(5)).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()


def _double(layer, adapter="lora_B"):
    with torch.no_grad():
        getattr(layer, adapter)["default"].mul_(2.0)


def _replace(layer):
    layer.lora_B["default"].data = layer.lora_B["default"].data * 2.0


def _replace_twice(layer):
    """The second memory is the one that the first has left: the address is as before."""
    A = layer.lora_A["default"]
    where, values = A.data_ptr(), A.detach().clone()
    for _ in range(1000):
        A.data = values.clone()
        A.data = values * 2.0
        if A.data_ptr() == where:
            break


def _average(layer):
    layer.lora_A["default"].data.mul_(2.0)
    layer.eval()


def _load(layer, assign):
    layer.load_state_dict({key: t * 1.5 for key, t in layer.state_dict().items()}, assign=assign)


WRITES = {
    "an optimizer": _step,
    "an optimizer past autograd": lambda layer: PastAutograd(layer.own_tensors("default")).step(),
    "in place": _double,
    "A in place": lambda layer: _double(layer, "lora_A"),
    "m in place": lambda layer: _double(layer, "lora_magnitude_vector"),
    "the base": lambda layer: layer.weight.mul_(2),
    "another memory": _replace,
    "another memory, twice": _replace_twice,
    "averages for an evaluation": _average,
    "past autograd's count": lambda layer: layer.lora_B["default"].data.mul_(2.0),
    "the base past autograd's count": lambda layer: layer.weight.data.mul_(2.0),
    "load_state_dict": lambda layer: _load(layer, False),
    "load_state_dict, assigned": lambda layer: _load(layer, True),
    "to and fro": lambda layer: layer.to(torch.bfloat16).to(torch.float64),
    "the scaling": lambda layer: layer.set_hyperparameters("default", R * S * 3, 0.0, False),
}


def test_memory_that_is_gone_is_not_read():
    t = torch.ones(64)
    before = marks(t)
    t.untyped_storage().resize_(0)
    assert marks(t) != before


@pytest.mark.parametrize("at", [0, 333, 666, 999])
def test_a_word_of_four_tells(at):
    t = torch.zeros(1000, dtype=torch.float64)
    before = marks(t)
    t.data[at] = 1.0
    assert marks(t) != before


def test_exact_norms_twice_differentiated_by_torch_func():
    layer, x = trained(dora_exact=True), inputs(3)
    A = layer.lora_A["default"].detach()

    def loss(A):
        return torch.func.functional_call(layer, {"lora_A.default": A}, (x,)).square().sum()

    factors = [t.detach() for t in layer.own_tensors("default")[1:]]
    want = torch.func.hessian(lambda A: formula(layer, x, (A, *factors), exact=True).square().sum())(A)
    torch.testing.assert_close(torch.func.hessian(loss)(A), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", WRITES)
def test_norms_follow_every_write(how):
    """A layer that is made anew of the same tensors computes the same."""
    layer, x = trained(), inputs(9)
    layer(x)
    WRITES[how](layer)
    fresh = LoRALinear.from_linear(nn.Linear(K, N, dtype=torch.float64), R, layer.lora_alpha["default"], use_dora=True)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), fresh(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_norms_of_their_own(how):
    layer, x = trained(), inputs(9)
    y = layer(x)
    twin = how(layer)
    assert torch.equal(twin(x), y)
    _double(twin)
    _double(layer, "lora_A")
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-12, atol=1e-12)  # A doubled is B doubled
    assert not torch.allclose(twin(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_once_a_step(monkeypatch, dtype):
    """Micro-batches, checkpointing, evaluation and inference mode share them; where no kernel serves, in fp64, |W|^2 is
    computed once for good."""
    counts = dict(row_norm=0, row_squares=0)

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    layer, x = trained(dtype=dtype, adapter_dtype=dtype), inputs(9, dtype=dtype)
    for module, name in ((cpu_norm if dtype is torch.float32 else dora, "row_norm"), (dora, "row_squares")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        with torch.inference_mode():
            layer(x)
        for _ in range(2):
            checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
        with torch.no_grad():
            layer(x)
        optimizer.step()
    assert counts == dict(row_norm=2, row_squares=0)  # the layer has computed them at its start


def test_nothing_of_an_offloaded_layer_is_kept():
    """Its weight is here for one forward."""
    layer, x = trained(), inputs(9)
    y, weight = layer(x).detach(), weakref.ref(layer.weight)
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    assert weight() is None
    assert torch.equal(layer(x), y)


@pytest.fixture
def swapping():
    """Module.to and load_state_dict swap what the parameters hold, which is refused for one with a weak reference."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("how", ["load_state_dict", "to and fro"])
def test_norms_follow_swapped_parameters(how, swapping):
    test_norms_follow_every_write(how)


def test_a_layer_over_a_base_of_torchaos_can_be_moved():
    """Module.to swaps its weight."""
    layer, x = LoRALinear.from_linear(quantised("int8", torch.float32), R, use_dora=True), torch.randn(9, 64)
    y = layer(x)
    assert torch.equal(layer.to("cpu", torch.float32)(x), y)
    layer.to("meta")


def test_another_parameter_of_the_same_memory_is_another():
    """Though it has the first one's id, and its count of writes begins anew."""
    once = OncePerStep()
    weight = nn.Parameter(torch.zeros(1000), requires_grad=False)
    for n in range(1, 100):
        known, data = id(weight), weight.data
        once(weight.sum, weight)
        weight[500] = n  # not one of the words that are looked at
        del weight
        weight = nn.Parameter(data, requires_grad=False)
        assert once(weight.sum, weight) == n
        if id(weight) == known:
            return
    pytest.skip("no Parameter took another's id")


def test_what_is_kept_is_found_without_comparing_tensors():
    """`in` asks each for equality, which costs 15 us a tensor in every layer."""
    once, tensors, seen = OncePerStep(), [torch.zeros(3) for _ in range(4)], []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    kept = once(object, *tensors)
    with Listener():
        assert once(object, *tensors) is kept
    assert "data_ptr" in seen and not {"__eq__", "eq", "equal"} & set(seen)


def test_nothing_is_kept_while_a_cuda_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    once, tensor, calls = OncePerStep(), SimpleNamespace(is_cuda=True), []
    for n in range(2):
        once(lambda: calls.append(n), tensor)
    assert calls == [0, 1]


@pytest.mark.parametrize("r", [R, 0])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
def test_merge_and_unmerge(kind, r):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N)
    if kind == "hooked":
        linear.register_forward_hook(lambda *args: None)
    layer, x = trained(linear, r=r), inputs(9, dtype=torch.float32)
    y, weight = layer(x), layer.base().weight
    want = formula(layer, x.double(), [t.double() for t in layer.own_tensors("default")])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert layer.state_dict().keys() == {"weight", "bias"}
    layer.unmerge()
    assert layer.base().weight is weight and torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8", "float8"])
def test_over_a_quantised_base(kind):
    """y and the gradients for the dequantised W, one bit of which a fresh adapter does not change; merged as near as
    the quantisation allows."""
    base = quantised(kind, torch.float32)
    layer, x = LoRALinear.from_linear(base, R, R * S, use_dora=True), torch.randn(9, 64)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    with torch.no_grad():
        for t in layer.own_tensors("default"):
            t.add_(0.3 * torch.randn(t.shape))
    own = layer.own_tensors("default")
    twins = [t.detach().double().requires_grad_() for t in own]
    got, want = layer(x), formula(layer, x.double(), twins)
    dy = torch.randn_like(got)
    pairs = zip(gradients(got, dy, own), gradients(want, dy.double(), twins), strict=True)
    for a, b in [(got, want), *pairs]:
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
    layer.merge()
    dense = layer.matrix()
    A, B, m = (t.detach() for t in own)
    layer.unmerge()
    V = layer.matrix() + S * B @ A
    folded = m[:, None] * V / V.norm(dim=1, keepdim=True)
    assert (dense - folded).norm() <= 0.12 * folded.norm()


def test_a_scaling_that_is_a_tensor():
    layer, x = trained(), inputs(9)
    y = layer(x)
    layer.scaling["default"] = torch.tensor(S, dtype=torch.float64)
    torch.testing.assert_close(layer(x), y)
    layer.scaling["default"].mul_(2)
    assert not torch.allclose(layer(x), y)


@pytest.mark.parametrize("exact", [False, True])
def test_compiled(exact):
    layer, x = trained(dtype=torch.float32, dora_exact=exact), inputs(9, dtype=torch.float32)
    own = layer.own_tensors("default")
    want = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got.sum(), None, own), gradients(want.sum(), None, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    _double(layer)
    torch.testing.assert_close(compiled(x), layer(x))


REFUSED = {
    "use_dora must be a bool; got 1": dict(use_dora=1),
    "dora_exact must be False without use_dora; got True": dict(dora_exact=True),
    r"use_dora must be False with allora_eta=2.0; got True": dict(use_dora=True, allora_eta=2.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(K, N, **REFUSED[message])
