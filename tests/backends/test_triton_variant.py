"""The op's optional tensors on the Triton kernels: each alone and all at once, forward and backward, bit for bit on
integers and within the fp64 bound on others."""

import itertools

import pytest
import torch

from fused_lora import lora_linear, lora_update
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem
from fused_lora.triton_kernels import scale_gradient

OPTIONS = ("x_lora", "h_in", "gate", "out_scale", "grad_row_scale")
ALONE = [(name,) for name in OPTIONS]


def optional(p, names, gates, generate):
    """The named optional tensors of a problem, by generate(shape)."""
    (M, K), (N, R) = p.x.shape, p.lora_B.shape
    shapes = dict(x_lora=(M, K), h_in=(M, R), gate=(M, gates), out_scale=(N,), grad_row_scale=(N,))
    single = ("gate", "out_scale", "grad_row_scale")
    made = {name: generate(shapes[name]) for name in names}
    return {name: t.to(p.x.device, torch.float32 if name in single else p.x.dtype) for name, t in made.items()}


def exact_optional(p, names, gates):
    """Sparse integers for what is multiplied with, one or two for the scales."""
    g = torch.Generator().manual_seed(1)

    def generate(shape):
        if len(shape) == 1:
            return torch.randint(1, 3, shape, generator=g).float()
        return (torch.rand(shape, generator=g) < 0.3).float() * (torch.randint(0, 2, shape, generator=g) * 2 - 1)

    return optional(p, names, gates, generate)


def random_optional(p, names, gates):
    g = torch.Generator().manual_seed(1)
    return optional(p, names, gates, lambda shape: torch.randn(shape, generator=g) * 0.3 + (len(shape) == 1))


def run(p, given, backend, *, dropout_p=0.0, return_h=False, trains=True, wide=False):
    """y, h and the gradient of everything that has one, or of the one that `trains` names, through autograd; in fp64 if
    wide."""
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    t = {name: getattr(p, name) for name in names if getattr(p, name) is not None} | given
    t = {name: value.double() if wide else value for name, value in t.items()}
    t = {
        name: value.clone().requires_grad_(name != "grad_row_scale" and trains in (True, name))
        for name, value in t.items()
    }
    factors = (t[name] for name in names[:4])
    torch.manual_seed(5)  # dropout's
    made = lora_linear(
        *(*factors, p.scaling),
        bias=t.get("bias"),
        dropout_p=dropout_p,
        backend=backend,
        return_h=return_h,
        **{name: t[name] for name in given},
    )
    y, h = made if return_h else (made, None)
    if trains:
        loss = (y * p.dy).sum()
        (loss if h is None else loss + h[:, ::2].sum()).backward()
    grads = {f"d{name}": value.grad for name, value in t.items()}
    return {"y": y.detach(), "h": None if h is None else h.detach()} | grads


def check_exact(p, given, **kwargs):
    assert_exact(run(p, given, "triton", **kwargs), run(p, given, "reference", wide=True, **kwargs))


def check_close(p, given, **kwargs):
    exact, peer = (run(p, given, "reference", wide=wide, **kwargs) for wide in (True, False))
    assert_close(run(p, given, "triton", **kwargs), peer, exact)


@pytest.mark.parametrize("names", [*ALONE, OPTIONS], ids="+".join)
def test_integers(on_triton, poison, names):
    """Tails in every direction, one row, a gate for each rank and one for several, the returned h's gradient."""
    adapters = (on_triton.dtypes[0], None), (on_triton.dtypes[1], torch.float32)
    for shape, (dtype, adapter) in itertools.product(((37, 70, 43, 12), (1, 5, 8, 4)), adapters):
        p = exact_problem(*shape, dtype, adapter, device=on_triton.device)
        for gates, return_h in ((shape[3], False), (2, True)):
            check_exact(p, exact_optional(p, names, gates), return_h=return_h)


@pytest.mark.parametrize("R, gates", [(40, 5), (160, 1), (160, 160)])
def test_ranks_of_several_blocks(on_triton, poison, R, gates):
    """Above 128 the backward's shrink has several programs a row block; one of them writes what has no ranks."""
    p = exact_problem(35, 72, 40, R, on_triton.dtypes[1], device=on_triton.device)
    check_exact(p, exact_optional(p, OPTIONS, gates))


@pytest.mark.parametrize("names", [(), *ALONE, OPTIONS], ids=lambda names: "+".join(names) or "h alone")
def test_dropout(on_triton, poison, names):
    p = exact_problem(33, 40, 72, 8, on_triton.dtypes[1], torch.float32, bias=False, device=on_triton.device)
    check_exact(p, exact_optional(p, names, 4), dropout_p=0.5, return_h="h_in" not in names)


@pytest.mark.parametrize("names", [*ALONE, OPTIONS], ids="+".join)
def test_the_bound(on_triton, poison, names):
    for dtype in on_triton.dtypes:
        p = random_problem(65, 72, 104, 12, dtype, torch.float32, device=on_triton.device)
        check_close(p, random_optional(p, names, 3))


def test_without_gradients_and_without_rows(on_triton, poison):
    p = exact_problem(33, 40, 72, 8, on_triton.dtypes[0], device=on_triton.device)
    check_exact(p, exact_optional(p, OPTIONS, 2), trains=False)
    p = exact_problem(0, 40, 72, 8, on_triton.dtypes[0], device=on_triton.device)
    check_exact(p, exact_optional(p, OPTIONS, 2))


@pytest.mark.parametrize("names", [OPTIONS, OPTIONS[1:]], ids=["x_lora", "x"])
def test_one_gradient_at_a_time(on_triton, poison, names):
    """What is not asked for is not computed, and what is does not depend on it."""
    p = exact_problem(33, 40, 72, 8, on_triton.dtypes[0], device=on_triton.device)
    given = exact_optional(p, names, 2)
    exact = run(p, given, "reference", wide=True)
    for wanted in ("x", "weight", "lora_A", "lora_B", "bias", *(name for name in names if name != "grad_row_scale")):
        made = run(p, given, "triton", trains=wanted)
        assert [name for name, t in made.items() if t is not None] == ["y", f"d{wanted}"]
        assert_exact(made, exact)


def test_scales_and_biases_that_leave_nothing_of_z(on_triton, poison, monkeypatch):
    """Such columns are computed again, in several splits of the rows; the others come from y."""
    monkeypatch.setattr(scale_gradient, "ROWS_PER_SPLIT", 16)
    for dtype in on_triton.dtypes:
        p = random_problem(70, 200, 40, 20, dtype, device=on_triton.device)
        given = random_optional(p, ("h_in", "out_scale"), 1)
        given["out_scale"][:64:3], given["out_scale"][1] = 0.0, 1e-30
        p.bias[::7] = 300.0
        check_close(p, given)
        p.bias = None
        check_close(p, given)


def test_columns_are_computed_again_only_where_they_must_be(on_triton, monkeypatch):
    """With plain scales and no bias the gradient is the sums' alone: nothing else is read."""
    p = exact_problem(33, 40, 72, 8, on_triton.dtypes[0], bias=False, device=on_triton.device)
    given = exact_optional(p, ("out_scale",), 1)
    want = run(p, given, "reference", wide=True)["dout_scale"]
    told = want != 0  # a column whose y is zero everywhere is lost, and its gradient zero
    real, seen = scale_gradient.launch, []

    def spy(kernel, grid, args, choices):
        if kernel is scale_gradient.columns_kernel:
            seen.append(args[5].clone())
        real(kernel, grid, args, choices)

    monkeypatch.setattr(scale_gradient, "launch", spy)
    run(p, given, "triton")
    assert len(seen) == 1 and told.any() and not (seen[0].bool() & told).any()


def test_the_same_bits_in_every_run(on_triton):
    p = random_problem(83, 72, 104, 12, on_triton.dtypes[0], device=on_triton.device)
    given = random_optional(p, OPTIONS, 3)
    runs = [run(p, given, "triton") for _ in range(3)]
    for other in runs[1:]:
        assert all(t is None or torch.equal(t, other[name]) for name, t in runs[0].items())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_update(on_triton, poison, dropout_p):
    """lora_update: the low-rank half over another's y, and its gradients, with tails and ranks of several blocks."""
    for (M, N, K, R), (dtype, adapter) in itertools.product(
        ((37, 70, 43, 12), (1, 130, 8, 72), (0, 5, 8, 4)),
        ((on_triton.dtypes[0], None), (on_triton.dtypes[1], torch.float32)),
    ):
        p = exact_problem(M, N, K, R, dtype, adapter, device=on_triton.device)
        made = {}
        for backend, q in (("triton", p), ("reference", p.to(torch.float64))):
            t = {name: getattr(q, name).clone().requires_grad_() for name in ("x", "lora_A", "lora_B")}
            y = q.dy.flip(0).clone().requires_grad_()
            torch.manual_seed(5)
            out = lora_update(y, *t.values(), q.scaling, dropout_p=dropout_p, backend=backend)
            out.backward(q.dy)
            made[backend] = {"out": out.detach(), "dy": y.grad} | {name: value.grad for name, value in t.items()}
        assert_exact(made["triton"], made["reference"])
