"""Is a candidate right at a case: exact integers, the bound against fp64, fresh memory that is NaN, and twice the same.

With dropout the masks are compared, too: the reference draws its mask from the same seed. The bound is that of the
tests, or of the benchmark where that is wider: a sum in another order than PyTorch's may be three times as far from
fp64, which is no fault, while one wrong tile is far beyond either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.bench import runner
from fused_lora.bench.cases import Case
from fused_lora.ops import internals
from fused_lora.testing import Problem, assert_close, exact_problem, random_problem, run, truth


class Wrong(AssertionError):
    """A candidate that is not right, and in which way."""

    def __init__(self, fault: str, why: str):
        super().__init__(why)
        self.fault, self.why = fault, why


@dataclass(frozen=True)
class Expected:
    """Two problems of a case and what is right for them: integers bit for bit, normal numbers within a bound."""

    integers: Problem
    exact: dict[str, Any]
    halves: dict[str, Any]  # dropout of the integers: a factor of 2, which keeps them integers
    normal: Problem
    same_dtype: dict[str, Any]
    fp64: dict[str, Any]
    dropped: dict[str, Any]


def expected(case: Case, device: str) -> Expected:
    """What every candidate is compared with; none of its code runs here."""
    sizes = (case.M, case.N, case.K, case.R, case.dtype, torch.float32)
    seed = torch.tensor([20240229], dtype=torch.int64, device=device) if case.dropout else None
    halves, dropped = (dict(dropout_p=p if case.dropout else 0.0, seed=seed) for p in (0.5, case.dropout))
    integers, normal = exact_problem(*sizes, device=device), random_problem(*sizes, device=device)
    return Expected(
        integers,
        run(integers.to(torch.float32), backend="reference", **halves),  # sums far below 2^24, exact in any order
        halves,
        normal,
        run(normal, backend="reference", **dropped),
        truth(normal, **dropped),
        dropped,
    )


def check(candidate: str, want: Expected) -> None:
    """Raises: Wrong if the candidate is not right; whatever its code raises."""
    with _poisoned_memory():
        got = run(want.integers, backend=candidate, **want.halves)
        first = run(want.normal, backend=candidate, **want.dropped)
    _check_written(got)
    _check_integers(got, want.exact)
    _check_written(first)
    _check_close(candidate, first, want)
    _check_repeats(candidate, want)


def _check_written(got: dict[str, Any]) -> None:
    for name, t in got.items():
        if not torch.isfinite(t).all():
            raise Wrong("NaN", f"{name}: {(~torch.isfinite(t)).sum()} of {t.numel()} elements are not finite")


def _check_integers(got: dict[str, Any], exact: dict[str, Any]) -> None:
    for name, t in got.items():
        right = exact[name].to(t.dtype)
        wrong = (t != right) & (right.double() == exact[name].double())  # what the dtype cannot hold proves nothing
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise Wrong("wrong", f"{name}: {wrong.sum()} of {t.numel()} integers are off, the first at {at}")


def _check_close(candidate: str, got: dict[str, Any], want: Expected) -> None:
    for name, t in got.items():
        try:
            assert_close({name: t}, want.same_dtype, want.fp64)
        except AssertionError as error:
            if t.shape != want.fp64[name].shape or t.dtype != want.same_dtype[name].dtype:
                raise Wrong("wrong", str(error)) from None
            try:
                runner.check(candidate, {name: t}, want.fp64, want.normal.x.dtype)
            except runner.WrongResult:
                raise Wrong("wrong", str(error)) from None


def _check_repeats(candidate: str, want: Expected) -> None:
    """In PyTorch's deterministic mode, in which every back end promises the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(want.normal, backend=candidate, **want.dropped) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    for name, t in first.items():
        if not torch.equal(t, second[name]):
            raise Wrong(
                "differs", f"{name}: {(t != second[name]).sum()} of {t.numel()} elements differ in a second run"
            )


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an element that nobody wrote shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    owners: tuple[tuple[Any, str], ...]
    owners = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
    owners += ((internals, "empty_on_cpu"), (internals, "empty_on_cuda"))
    before = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), make in zip(owners, before):
            setattr(owner, name, poisoned(make))
        yield
    finally:
        for (owner, name), make in zip(owners, before):
            setattr(owner, name, make)
