"""grouped_lora_update on the Triton kernels: bit for bit on integers, within the fp64 bound on others."""

import itertools

import pytest
import torch

import fused_lora.ops.grouped_schema  # noqa: F401  registers the operators
from fused_lora.backends import triton_grouped
from fused_lora.testing import assert_close, assert_exact
from fused_lora.triton_kernels.configs import grouped_wgrad_config


def problem(counts, N, K, ranks, dtype, adapter=None, *, indexed=True, exact=True, device="cpu", offsets=torch.int32):
    """The tensors of a call by name: rows in random order where indexed, three of them in no group."""
    g = torch.Generator().manual_seed(0)
    P = sum(counts)
    M = P + (3 if indexed else 0)

    def fill(*shape, scale=1.0, dtype=dtype):
        t = torch.randn(shape, generator=g) * scale
        if exact:  # sparse integers, whose sums every dtype holds
            t = torch.randint(-1, 2, shape, generator=g) * (torch.rand(shape, generator=g) < min(1.0, 4 / shape[-1]))
        return t.to(dtype).to(device)

    adapter = adapter or dtype
    return dict(
        y=fill(M, N),
        x=fill(M, K),
        lora_A=[fill(R, K, scale=K**-0.5, dtype=adapter) for R in ranks],
        lora_B=[fill(N, R, scale=R**-0.5, dtype=adapter) for R in ranks],
        scaling=torch.tensor([2.0 ** (g % 3 - 1) for g in range(len(ranks))], device=device),
        offsets=torch.tensor([0, *itertools.accumulate(counts)], dtype=offsets, device=device),
        rows=torch.randperm(M, generator=g)[:P].to(device) if indexed else None,
        dy=fill(M, N),
    )


def run(p, backend, *, ps=(), needs=None, wide=False):
    """y, h and the gradients of `needs` through the operators; in fp64 if wide."""
    convert = lambda t: t.double() if wide and t.is_floating_point() else t
    p = {k: [*map(convert, v)] if type(v) is list else v if v is None else convert(v) for k, v in p.items()}
    x, A, B, dy = p["x"], p["lora_A"], p["lora_B"], p["dy"]
    seed = torch.tensor([5], device=x.device) if ps else None
    needs, segments = needs or [True] * (1 + len(A) + len(B)), (p["scaling"], p["offsets"], p["rows"], list(ps), seed)
    y, h = torch.ops.fused_lora.grouped_update(p["y"], x, A, B, *segments, backend)
    grads = torch.ops.fused_lora.grouped_update_backward(dy, x, A, B, h, *segments, needs, backend)
    names = ["dx", *(f"dA{g}" for g in range(len(A))), *(f"dB{g}" for g in range(len(B)))]
    return {"y": y, "h": h} | dict(zip(itertools.compress(names, needs), grads))


def check_exact(p, **kwargs):
    assert_exact(run(p, "triton", **kwargs), run(p, "reference", wide=True, **kwargs))


@pytest.fixture
def short_items(monkeypatch):
    """Work items of 32 positions, so that groups have several."""
    small = lambda *sizes: grouped_wgrad_config(*sizes).__class__(16, 32, 16, 2, 4, 1, 32)
    monkeypatch.setattr(triton_grouped, "grouped_wgrad_config", small)


# Groups that are empty, of one row, of several tiles and several work items, that start anywhere; mixed ranks.
CASES = [
    dict(counts=(0,), N=6, K=10, ranks=(3,)),
    dict(counts=(1, 0, 17), N=24, K=32, ranks=(8, 4, 1)),
    dict(counts=(0, 13, 100, 0, 2, 33), N=33, K=47, ranks=(16, 3, 12, 5, 40, 16)),
    dict(counts=(20, 5), N=24, K=40, ranks=(24, 8)),
    dict(counts=(70, 32, 65), N=70, K=130, ranks=(8, 8, 8), indexed=False),
    dict(counts=(129,), N=16, K=24, ranks=(160,), indexed=False, offsets=torch.int64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["counts"])))
def test_integers(on_triton, poison, short_items, case):
    ps = [0.5, 0.0, 0.75, 0.5, 0.0, 0.5][: len(case["counts"])]
    check_exact(problem(**case, dtype=on_triton.dtypes[0], device=on_triton.device))
    check_exact(problem(**case, dtype=on_triton.dtypes[1], adapter=torch.float32, device=on_triton.device), ps=ps)


@pytest.mark.parametrize("shared", [(), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="+".join)
def test_stacks_and_shared_factors(on_triton, poison, short_items, shared):
    """One tensor for all factors, in any layout; the gradient of a shared one is a sum over the groups."""
    p = problem((5, 0, 70, 14), 20, 26, (6,) * 4, on_triton.dtypes[1], torch.float32, device=on_triton.device)
    for name in ("lora_A", "lora_B"):
        p[name] = [torch.stack(p[name], -1).movedim(-1, 0)[: 1 if name in shared else None]]  # groups are the fast axis
    check_exact(p)
    check_exact(p, ps=[0.5, 0.0, 0.75, 0.5])


def test_a_stack_beside_matrices(on_triton, poison):
    p = problem((5, 0, 70, 14), 20, 26, (6,) * 4, on_triton.dtypes[0], device=on_triton.device)
    for name in ("lora_A", "lora_B"):
        check_exact(p | {name: [torch.stack(p[name])]})


@pytest.mark.parametrize("case", CASES[1:4:2], ids=lambda case: "-".join(map(str, case["counts"])))
def test_the_bound(on_triton, poison, case):
    for dtype in on_triton.dtypes:
        p = problem(**case, dtype=dtype, adapter=torch.float32, exact=False, device=on_triton.device)
        for ps in ((), [0.25, 0.1, 0.5, 0.1, 0.25, 0.0][: len(case["counts"])]):
            exact, peer = (run(p, "reference", ps=ps, wide=wide) for wide in (True, False))
            assert_close(run(p, "triton", ps=ps), peer, exact)


def test_layouts(on_triton, poison):
    """Rows of wider matrices, transposed memory, factors that start on no 16 bytes."""
    p = problem((9, 20), 24, 40, (8, 4), on_triton.dtypes[1], device=on_triton.device)
    want = run(p, "reference", wide=True)
    for name in ("x", "y", "dy"):
        wide = torch.full((p[name].shape[0] + 1, p[name].shape[1] + 3), float("nan")).to(p[name])
        wide[1:, 1:-2] = p[name]
        p[name] = wide[1:, 1:-2]
    for name in ("lora_A", "lora_B"):
        first, second = p[name]
        apart = torch.zeros(second.numel() + 1).to(second)[1:].view(second.shape).copy_(second)
        p[name] = [first.t().contiguous().t(), apart]
    assert_exact(run(p, "triton"), want)


def test_one_gradient_at_a_time(on_triton, poison):
    p = problem((9, 0, 20), 24, 40, (8, 4, 8), on_triton.dtypes[0], device=on_triton.device)
    want = run(p, "reference", wide=True)
    for i in range(7):
        made = run(p, "triton", needs=[i == j for j in range(7)])
        assert len(made) == 3
        assert_exact(made, want)


def test_more_groups_than_rows(on_triton, poison):
    """Most of them empty, more than a power of two."""
    counts = [1 if g % 9 == 0 else 0 for g in range(70)]
    check_exact(problem(counts, 16, 24, [2 + g % 3 for g in range(70)], on_triton.dtypes[0], device=on_triton.device))


def test_the_same_bits_in_every_run(on_triton, short_items):
    p = problem((70, 3, 65), 40, 48, (8, 4, 8), on_triton.dtypes[0], exact=False, device=on_triton.device)
    runs = [run(p, "triton") for _ in range(3)]
    assert all(torch.equal(t, other[name]) for other in runs[1:] for name, t in runs[0].items())
