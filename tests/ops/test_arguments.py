"""What lora_linear() refuses, and that every way of asking gives the same verdict."""

import random

import pytest
import torch
from bad_arguments import with_change

from fused_lora import backends, grouped_lora_update, lora_linear, lora_update
from fused_lora.ops import linear
from fused_lora.testing import random_problem

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
    (dict(gate=(4, 0)), r"gate must have shape \[4, 'k'\] with k dividing R = 8; got \[4, 0\]"),
    (dict(x=(32,), gate=()), r"gate must have shape \['k'\] with k dividing R = 8; got \[\]"),
    (dict(gate=(4, 2), dtype_gate=torch.int64), r"gate must have a floating dtype; got torch.int64"),
    (dict(backend="cpu:"), r"backend must be one of auto, cuda, triton, cpu, reference; got 'cpu:'"),
    (dict(h_in=(4, 7)), r"h_in must have shape \[4, 8\]"),
    (dict(out_scale=(23,)), r"out_scale must have shape \[24\] and dtype float32; got \[23\]"),
    (dict(x_lora=(3, 32)), r"x_lora must have x's shape \[4, 32\]"),
    (dict(scaling=None), r"scaling must be a number or a 0-d tensor; got None"),
    (dict(scaling=torch.ones(2)), r"scaling must be a number or a 0-d tensor; got a tensor of shape \[2\]"),
]


SHAPES = GOOD | dict(x_lora=(4, 32), h_in=(4, 8), gate=(4, 2), out_scale=(24,), grad_row_scale=(24,), y=(4, 24))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["no tensor", "sparse"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_no_dense_tensor_is_named(name, kind, autocast):
    """By every op that takes it."""
    given = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    given[name] = (given[name],) if kind == "no tensor" else given[name].to_sparse()
    y, x, weight, A, B = (given.pop(n) for n in ("y", "x", "weight", "lora_A", "lora_B"))
    calls = [] if name == "y" else [lambda: lora_linear(x, weight, A, B, 1.0, **given)]
    if name in ("y", "x", "lora_A", "lora_B"):
        calls.append(lambda: lora_update(y, x, A, B, 1.0))
        calls.append(lambda: grouped_lora_update(y, x, [A], [B], 1.0, torch.tensor([0, 4])))
    for call in calls:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(
                ValueError, match=rf"{name} must (be a torch.Tensor|be a dense tensor|hold (dense )?tensors).*; got"
            ),
        ):
            call()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["x", "weight", "lora_A"])
def test_autocast_makes_no_dtype_right(name, dtype):
    """It casts what is floating, but for fp64, as in torch.nn.Linear."""
    given = {n: torch.ones(SHAPES[n], dtype=dtype if n == name else torch.float32) for n in GOOD}
    x, weight, A, B, bias = given.values()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=f"must .*{dtype}"):
        lora_linear(x, weight, A, B, 1.0, bias=bias)


@pytest.mark.parametrize("change, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_named(change, message):
    t, other = with_change(GOOD, change)
    scaling = other.pop("scaling", 1.0)
    with pytest.raises(ValueError, match=message):
        lora_linear(t.pop("x"), t.pop("weight"), t.pop("lora_A"), t.pop("lora_B"), scaling, **t, **other)


def test_named_back_end_refuses_and_says_what_it_supports():
    p = random_problem(4, 24, 32, 8)
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
    checked each time. Random arguments, good and bad, in random order: both say the same, the first time and again. A
    good lora_A stays the same tensor: it is what a verdict is found by."""
    g = random.Random(0)
    N, K, R = 6, 10, 3
    shapes = dict(x=(4, K), weight=(N, K), lora_A=(R, K), lora_B=(N, R), bias=(N,))
    ran, lora_A = 0, torch.zeros(R, K)
    for _ in range(400):
        drawn = {}
        for name, shape in shapes.items():
            wrong = g.random() < 0.12
            others = [(), shape[:-1], (*shape[:-1], shape[-1] + 1), (0,) * len(shape), (1, *shape)]
            size = g.choice(others) if wrong else shape
            dtype = g.choice([torch.float16, torch.int32, torch.float64]) if g.random() < 0.08 else torch.float32
            device = "meta" if g.random() < 0.03 else "cpu"
            drawn[name] = torch.zeros(size, dtype=dtype, device=device)
        given = drawn["lora_A"]
        if (given.shape, given.dtype, given.device) == (lora_A.shape, lora_A.dtype, lora_A.device):
            drawn["lora_A"] = lora_A
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


DATA = {
    "x": (lambda p: p.x.bfloat16(), r"weight must have x's dtype"),
    "weight": (lambda p: p.weight[:-1], r"lora_B must have shape \[23, 8\]"),
    "lora_A": (lambda p: p.lora_A[:, 1:], r"lora_A must have shape \[R, 32\]"),
    "lora_B": (lambda p: p.lora_B.half(), r"lora_B must have x's dtype"),
    "bias": (lambda p: p.bias[1:], r"bias must have shape \[24\]"),
}


@pytest.mark.parametrize("name", DATA)
def test_new_data_of_a_remembered_tensor_is_checked(name):
    p = random_problem(4, 24, 32, 8)
    make, message = DATA[name]
    tensor, before, changed = getattr(p, name), getattr(p, name).data, make(p)

    def call():
        return lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0, bias=p.bias)

    y = call()
    tensor.data = changed
    with pytest.raises(ValueError, match=message):
        call()
    tensor.data = before
    assert torch.equal(call(), y)


def test_a_remembered_weight_is_read_as_it_lies():
    """After a call with the weight in one piece, `weight.data` is a transposed one of the same shape."""
    p = random_problem(64, 32, 32, 8)
    y = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0)
    p.weight.data = p.weight.t().contiguous().t()
    torch.testing.assert_close(lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0), y)


def test_a_verdict_knows_every_number_of_rows(monkeypatch):
    """Calls that differ in nothing but the number of rows ask once for each; ever new ones don't fill the memory."""
    asked = []

    def pick(backend, request):
        asked.append(request.M)
        return backends.pick(backend, request)

    monkeypatch.setattr(linear, "pick", pick)
    p = random_problem(300, 24, 32, 8)
    for rows in (300, 2, 300, 0, 2, 257):
        lora_linear(p.x[:rows], p.weight, p.lora_A, p.lora_B, p.scaling)
    assert asked == [512, 2, 0, 512]
    for rows in range(300):
        lora_linear(p.x[:rows], p.weight, p.lora_A, p.lora_B, p.scaling)
    assert 0 < len(linear._VERDICTS[id(p.lora_A)].servings) < 200
