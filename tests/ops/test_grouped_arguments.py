"""What grouped_lora_update() refuses, in which words."""

import pytest
import torch

from fused_lora import grouped_lora_update
from fused_lora.backends import GROUPED, Request, only_plain

GOOD = dict(
    y=torch.zeros(8, 6),
    x=torch.zeros(8, 10),
    lora_A=[torch.zeros(3, 10), torch.zeros(2, 10)],
    lora_B=[torch.zeros(6, 3), torch.zeros(6, 2)],
    scaling=[1.0, 2.0],
    offsets=torch.tensor([0, 2, 5]),
    rows=torch.tensor([7, 0, 3, 1, 5]),
)
BAD = [
    (dict(offsets=torch.tensor([0, 3, 2])), r"offsets must ascend from 0 to 5 to cover rows; got \[0, 3, 2\]"),
    (dict(offsets=torch.tensor([0, 2, 4])), r"offsets must ascend from 0 to 5 to cover rows; got \[0, 2, 4\]"),
    (dict(rows=None), r"offsets must ascend from 0 to 8 to cover the rows of x; got \[0, 2, 5\]"),
    (dict(rows=torch.tensor([0, 1, 2, 3, 8])), r"rows must be in \[0, 8\), the rows of x; got 8"),
    (dict(rows=torch.tensor([0, 1, -2, 3, 4])), r"rows must be in \[0, 8\), the rows of x; got -2"),
    (dict(rows=torch.tensor([0, 1, 1, 3, 4])), r"rows must name each row once at most; got 5 with repetitions"),
    (dict(rows=torch.zeros(5)), r"rows must be int64 or int32 of shape \[M'\]; got torch.float32 \[5\]"),
    (dict(offsets=torch.tensor([0])), r"offsets must have shape \[G \+ 1\] with G >= 1; got \[1\]"),
    (dict(offsets=[0, 2, 5]), r"offsets must be a torch.Tensor; got list"),
    (
        dict(lora_A=GOOD["lora_A"][:1]),
        r"lora_A must be 2 tensors \[R, K\] to match offsets \[3\], .*; got \[\[3, 10\]\]",
    ),
    (dict(lora_B=torch.zeros(3, 6, 2)), r"lora_B must be 2 tensors \[N, R\] .* or \[1, N, R\]; got \[3, 6, 2\]"),
    (
        dict(lora_B=[torch.zeros(6, 3), torch.zeros(6, 3)]),
        r"lora_B must have lora_A's rank .* ranks 3 and 2 of group 1",
    ),
    (dict(lora_A=[torch.zeros(3, 10), torch.zeros(2, 9)]), r"lora_A must have the same K in all groups; got 10 and"),
    (dict(lora_B=[torch.zeros(6, 3), torch.zeros(5, 2)]), r"lora_B must have the same N in all groups; got 6 and"),
    (dict(lora_A=3), r"lora_A must be a tensor or a sequence of tensors; got int"),
    (dict(lora_A=[3, 4]), r"lora_A must hold tensors; got a int"),
    (
        dict(lora_B=[torch.zeros(6, 3), torch.zeros(6, 2).half()]),
        r"lora_B must have x's dtype torch.float32 or float32",
    ),
    (dict(x=torch.zeros(8, 9)), r"x must have shape \[..., 10\] to match lora_A; got \[8, 9\]"),
    (dict(y=torch.zeros(8, 7)), r"y must have shape \[8, 6\] to match x \[8, 10\] and lora_B; got \[8, 7\]"),
    (dict(scaling=[1.0]), r"scaling must have 2 numbers to match offsets \[3\]; got 1"),
    (dict(scaling=torch.ones(3)), r"scaling must have shape \[2\] to match offsets \[3\]; got \[3\]"),
    (dict(scaling=torch.ones(2, requires_grad=True)), r"scaling must not require gradients"),
    (dict(scaling="big"), r"scaling must be a number, 2 numbers or a tensor \[2\]; got 'big'"),
    (dict(dropout_p=[0.1]), r"dropout_p must be a number or 2 numbers to match offsets \[3\]; got 1"),
    (dict(dropout_p=[0.1, 1.0]), r"dropout_p must be in \[0, 1\); got 1.0"),
    (dict(backend="gpu"), r"backend must be one of auto, .*; got 'gpu'"),
    (dict(offsets=GOOD["offsets"].to("meta")), r"offsets must be on x's device cpu; got meta"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_lora_update(**GOOD | change)


def test_a_back_end_without_it_says_so():
    """The compiled CUDA kernels have none; the others have."""
    request = Request(torch.device("cuda"), torch.float16, torch.float16, 8, 6, 10, 3, True, GROUPED)
    assert "got grouped_lora_update" in only_plain(request)
