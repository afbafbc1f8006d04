"""The judge of candidates: each kind of fault is found and named; what is right passes."""

import sys

import broken_backends  # noqa: F401  registers them
import pytest
import torch

from fused_lora.bench.cases import Case
from fused_lora.ops import internals, reference
from fused_lora.tuning.check import Wrong, _check_close, _check_integers, check, expected
from fused_lora.tuning.job import candidates_for

CASES = [
    Case(33, 40, 24, 4, dropout, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for dropout in (0.0, 0.1)
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def test_what_is_right_passes(case):
    want = expected(case, "cpu")
    names = candidates_for(case, torch.device("cpu"))
    assert "reference" in names and any(name.startswith("cpu:") for name in names)
    for name in names:
        check(name, want)


@pytest.mark.parametrize(
    "name, fault, words",
    [
        ("wrong", "wrong", "y: 1 of 792 integers are off, the first at [32, 23]"),
        ("wrong_gradient", "wrong", "dA: 1 of 160 integers are off, the first at [0, 0]"),
        ("unwritten", "NaN", "y: 1 of 792 elements are not finite"),
        ("fickle", "differs", "y: 1 of 792 elements differ in a second run"),
    ],
)
def test_each_fault_is_named(name, fault, words):
    with pytest.raises(Wrong) as found:
        check(name, expected(Case(33, 40, 24, 4, 0.0, torch.float32), "cpu"))
    assert (found.value.fault, found.value.why) == (fault, words)


def test_a_small_error_that_integers_do_not_show(monkeypatch):
    """The bound against fp64 finds it."""

    def rounded(*given):
        y, h = reference.forward(*given)
        return y - 1e-4 * y.frac(), h

    monkeypatch.setattr(sys.modules["fused_lora.backends.wrong"], "forward", rounded)
    with pytest.raises(Wrong, match="y: max error .* over the limit") as found:
        check("wrong", expected(Case(33, 40, 24, 4, 0.0, torch.float32), "cpu"))
    assert found.value.fault == "wrong"


def test_another_mask_is_wrong_and_without_dropout_it_does_not_show():
    check("wrong_mask", expected(Case(33, 40, 24, 4, 0.0, torch.float32), "cpu"))
    with pytest.raises(Wrong, match="integers are off"):
        check("wrong_mask", expected(Case(33, 40, 24, 4, 0.1, torch.float32), "cpu"))


def test_memory_is_poisoned_for_the_candidate_alone():
    before = torch.empty, torch.Tensor.new_empty, internals.empty_on_cpu
    with pytest.raises(Wrong):
        check("unwritten", expected(Case(33, 40, 24, 4, 0.0, torch.float32), "cpu"))
    assert before == (torch.empty, torch.Tensor.new_empty, internals.empty_on_cpu)


def test_what_a_dtype_cannot_hold_proves_nothing():
    """Of integers beyond 256, bf16 has each second one."""
    exact = {"dbias": torch.tensor([257.0, 258.0, 3.0])}
    _check_integers({"dbias": torch.tensor([256.0, 258.0, 3.0], dtype=torch.bfloat16)}, exact)
    with pytest.raises(Wrong, match=r"dbias: 1 of 3 integers are off, the first at \[1\]"):
        _check_integers({"dbias": torch.tensor([258.0, 256.0, 3.0], dtype=torch.bfloat16)}, exact)


def test_a_sum_in_another_order_is_no_fault():
    """Sums over many rows, one after the other, are further from fp64 than PyTorch's, which pairs them."""
    want = expected(Case(4096, 40, 24, 4, 0.0, torch.float32), "cpu")
    got = dict(want.same_dtype)
    got["dbias"] = want.normal.dy.cumsum(0, dtype=torch.float32)[-1]
    _check_close("one by one", got, want)
    got["dbias"] = got["dbias"] + 1e-4 * got["dbias"].abs().max()
    with pytest.raises(Wrong, match="dbias: max error"):
        _check_close("off", got, want)
