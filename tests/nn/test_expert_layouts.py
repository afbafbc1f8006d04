"""PEFT's matrices of experts' factors, stacked ones, and those with one factor for all experts."""

import pytest
import torch

from fused_lora.nn.expert_layouts import shared, stacked, unstacked

E, R, K, N = 4, 3, 5, 7


def peft_s():
    """A [E R, K], by expert, and B [N, R E], by rank."""
    return torch.randn(E * R, K), torch.randn(N, R * E)


def updates(lora_A, lora_B):
    """B A of each expert, [E, N, K]."""
    return lora_B @ lora_A


def test_stacked_is_by_expert_and_back_is_bit_for_bit():
    lora_A, lora_B = peft_s()
    A, B = stacked(lora_A, lora_B, R)
    for e in range(E):
        assert torch.equal(A[e], lora_A[e * R : (e + 1) * R]) and torch.equal(B[e], lora_B[:, e::E])
    assert all(torch.equal(t, want) for t, want in zip(unstacked(A, B), (lora_A, lora_B), strict=True))
    assert A.data_ptr() == lora_A.data_ptr() and B.data_ptr() == lora_B.data_ptr()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_shared_factor_is_every_expert_s(factor):
    A, B = stacked(*peft_s(), R)
    one = (A[:1], B) if factor == "lora_A" else (A, B[:1])
    written = unstacked(*one)
    assert written[0].shape == (E * R, K) and written[1].shape == (N, R * E)
    torch.testing.assert_close(updates(*stacked(*written, R)), updates(*one))
    again = shared(*stacked(*written, R), factor)
    assert all(torch.equal(t, want) for t, want in zip(again, one, strict=True))
    with pytest.raises(ValueError, match=f"{factor} must be alike for all experts, or the adapter fresh"):
        shared(A, B, factor)
    fresh = (A, torch.zeros_like(B)) if factor == "lora_A" else (torch.zeros_like(A), B)
    assert not updates(*shared(*fresh, factor)).any()


def test_the_factor_has_a_name():
    with pytest.raises(ValueError, match="factor must be 'lora_A' or 'lora_B'; got 'lora_C'"):
        shared(*stacked(*peft_s(), R), "lora_C")
