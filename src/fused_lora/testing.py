"""Inputs and comparisons shared by tests and benches: random and exact-integer problems, the fp64 truth, and a computed
tolerance."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import fused_lora.ops.schema  # noqa: F401  registers torch.ops.fused_lora
from fused_lora.ops.reference import PLAIN, Gradients, Variant

_NAMES = Gradients("dx", "dW", "dA", "dB", "dbias", "dx_lora", "dh_in", "dgate", "dout_scale")


@dataclass
class Problem:
    """One call of the op and the gradient that comes back to it; shapes as in `lora_linear`, x 2-D."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float
    bias: Tensor | None = None
    variant: Variant = PLAIN  # the optional tensors, 2-D
    dh: Tensor | None = None  # the gradient of the returned h, [M, R]

    def to(self, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> "Problem":
        """The same values in another dtype."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        adapter = {"lora_A": adapter_dtype or dtype, "lora_B": adapter_dtype or dtype}
        made: dict[str, Any] = {name: t.to(adapter.get(name, dtype)) for name, t in tensors.items()}
        wide = torch.promote_types(dtype, torch.float32)  # of gate, out_scale and grad_row_scale
        kinds = (dtype, dtype, wide, wide, wide)
        optional = Variant(*(t if t is None else t.to(kind) for t, kind in zip(self.variant, kinds)))
        return replace(self, **made, variant=PLAIN if self.variant is PLAIN else optional)

    def needs(self) -> Gradients:
        """Everything that has a gradient."""
        optional = [t is not None for t in self.variant[:4]]
        return Gradients(True, True, True, True, self.bias is not None, *optional)


def random_problem(M, N, K, R, dtype=torch.float32, adapter_dtype=None, *, bias=True, device="cpu", seed=0) -> Problem:
    """Normal inputs with W, A, B scaled so that y and every gradient are of order one, up to sums over M.

    Args:
        M, N, K, R: sizes.
        dtype: of x, weight, bias, dy.
        adapter_dtype: of lora_A, lora_B; dtype where None.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    adapter = adapter_dtype or dtype
    return Problem(
        x=normal(M, K),
        weight=normal(N, K, scale=K**-0.5),
        lora_A=normal(R, K, scale=K**-0.5, dtype=adapter),
        lora_B=normal(N, R, scale=R**-0.5, dtype=adapter),
        dy=normal(M, N),
        scaling=1.5,
        bias=normal(N) if bias else None,
    )


def exact_problem(M, N, K, R, dtype=torch.float32, adapter_dtype=None, *, bias=True, device="cpu", seed=0) -> Problem:
    """Inputs in {-1, 0, 1}, sparse enough that every sum of y, h, dh and the gradients is an integer that `dtype` holds
    exactly.

    So a right kernel gives the truth bit for bit, and any wrong index, mask or tail shows in `torch.equal`. Arguments
    as in `random_problem`.
    """
    g = torch.Generator().manual_seed(seed)

    def sparse(rows, cols, per_row, dtype=dtype):
        t = torch.zeros(rows, cols)
        if rows:
            where = torch.rand(rows, cols, generator=g).argsort(1)[:, :per_row]
            t.scatter_(1, where, torch.randint(0, 2, where.shape, generator=g).float() * 2 - 1)
        return t.to(dtype).to(device)

    adapter = adapter_dtype or dtype
    return Problem(
        x=sparse(M, K, 8),
        weight=sparse(N, K, 4),
        lora_A=sparse(R, K, 4, adapter),
        lora_B=sparse(N, R, 2, adapter),
        dy=sparse(M, N, 4),
        scaling=2.0,
        bias=sparse(1, N, max(N // 2, 1))[0] if bias else None,
    )


def with_optional(p: Problem, names, *, exact: bool, gates: int = 0, seed=1) -> Problem:
    """The problem with some optional tensors.

    Args:
        p: of `random_problem`, or of `exact_problem` where exact: then h_in, x_lora and dh are in {-1, 0, 1}, gates 0
            or 1, scales powers of two, and all sums are exact as there.
        names: of `Variant`, and "dh".
        gates: a row's; R where 0.
    """
    (M, K), (N, R), g = p.x.shape, p.lora_B.shape, torch.Generator().manual_seed(seed)

    def rows(width, per_row):
        if not exact:
            return torch.randn(M, width, generator=g).to(p.x.dtype)
        where = torch.rand(M, width, generator=g).argsort(1) < per_row
        return (where * (torch.randint(0, 2, (M, width), generator=g) * 2 - 1)).to(p.x.dtype)

    def columns(values):
        return values[torch.randint(len(values), (N,), generator=g)] if exact else torch.rand(N, generator=g) + 0.5

    k = gates or R
    made = dict(
        x_lora=rows(K, 8),
        h_in=rows(R, 1),
        gate=torch.randint(0, 2, (M, k), generator=g).float() if exact else torch.randn(M, k, generator=g),
        out_scale=columns(torch.tensor([-1.0, 0.5, 1.0, 2.0])),
        grad_row_scale=columns(torch.tensor([0.5, 1.0, 2.0])),
        dh=rows(R, 1),
    )
    given = {name: made[name].to(p.x.device) for name in names if name != "dh"}
    return replace(p, variant=Variant(**given), dh=made["dh"].to(p.x.device) if "dh" in names else None)


def run(p: Problem, *, backend: str, dropout_p=0.0, seed=None, needs=(True,) * 4) -> dict[str, Any]:
    """y, h and the gradients dx, dA, dB, dbias of `needs`, through the operators (not through autograd).

    Args:
        p: the problem.
        backend: a back end's name, as in `lora_linear`.
        dropout_p, seed: dropout and its int64 [1] seed, or 0.0 and None.
        needs: which of dx, dA, dB, dbias, dbias only where p has a bias; or a `Gradients`, for those of the weight and
            of optional tensors: dW, dx_lora, dh_in, dgate, dout_scale.
    """
    y, h = torch.ops.fused_lora.forward(
        p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, dropout_p, seed, *p.variant, backend
    )
    if isinstance(needs, Gradients):
        mask = needs
    else:
        need_bias = needs[3] and p.bias is not None
        mask = Gradients(needs[0], False, needs[1], needs[2], need_bias, False, False, False, False)
    kept = (y, p.bias) if mask.out_scale else (None, None)
    grads = iter(
        torch.ops.fused_lora.backward(
            *(p.dy, p.dh, p.x, p.weight, p.lora_A, p.lora_B, h, *kept),
            *(p.scaling, dropout_p, seed, *p.variant, list(mask), backend),
        )
    )
    found = {name: next(grads) for name, need in zip(_NAMES, mask) if need}
    return {"y": y, "h": h} | dict.fromkeys(("dx", "dA", "dB", "dbias")) | found


def truth(p: Problem, *, dropout_p=0.0, seed=None, needs=(True,) * 4) -> dict[str, Any]:
    """What `run` computes, in fp64 from the same (rounded) inputs."""
    return run(p.to(torch.float64), backend="reference", dropout_p=dropout_p, seed=seed, needs=needs)


# `factor` for gradients and steps of whole models, where one layer's rounding grows through all the others: two orders
# of sums differ by up to 7.7 times there (1400 tensors of five tiny models from eight starts, median 1.08), and what is
# wrong differs by thousands.
WHOLE_MODEL = 10.0


def tolerance(same_dtype: Tensor, exact: Tensor, dtype: torch.dtype | None = None, factor: float = 2.0) -> float:
    """factor * max|same-dtype PyTorch - fp64| plus a floor of two units in the last place of the largest element.

    Args:
        same_dtype: PyTorch's result.
        exact: the truth.
        dtype: the one with these places, where the result is in a finer one than what it was computed from: dA in fp32
            is a product with dh in x's dtype.
        factor: how many times PyTorch's error is allowed.
    """
    if exact.numel() == 0:
        return 0.0
    floor = 2 * torch.finfo(dtype or same_dtype.dtype).eps * exact.abs().max().item()
    return factor * (same_dtype.double() - exact).abs().max().item() + floor


def assert_close(out: dict, same_dtype: dict, exact: dict, factor: float = 2.0) -> None:
    """Every tensor of `out` is as near to the fp64 truth as PyTorch's composition in the same dtype, up to the factor
    of `tolerance`: 2, or WHOLE_MODEL.

    The measure is a maximum over elements, so one bad tile cannot hide in an average.
    Raises: AssertionError naming the tensor, its error and the limit.
    """
    dtypes = {t.dtype for t in same_dtype.values() if t is not None}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    for name, got in out.items():
        if got is None:
            continue
        want, peer = exact[name], same_dtype[name]
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
        assert got.dtype == peer.dtype, f"{name}: dtype {got.dtype}, expected {peer.dtype}"
        assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} elements are not finite"
        error = (got.double() - want).abs().max().item() if got.numel() else 0.0
        limit = tolerance(peer, want, coarsest, factor)
        assert error <= limit, f"{name}: max error {error:.3e} over the limit {limit:.3e}"


def assert_exact(out: dict, exact: dict) -> None:
    """Every tensor of `out` equals the truth bit for bit; for problems of `exact_problem`."""
    for name, got in out.items():
        if got is not None:
            wrong = got.double() != exact[name]
            assert not wrong.any(), (
                f"{name}: {wrong.sum()} of {got.numel()} elements differ, the first at {wrong.nonzero()[0].tolist()}"
            )
