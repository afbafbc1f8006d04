"""A rank tile is wider than R: its padding's zeros must not meet an infinity of the real factors, which makes a NaN."""

import torch

from fused_lora.ops.dropout import dropout_mask
from fused_lora.testing import exact_problem, run, truth


def check_infinity(backend, shape, dtype, name, dropout_p=0.0, device="cpu"):
    """Ones with an infinity among them, in the tensor `name`: the truth's infinities, and no other NaN than its own."""
    p = exact_problem(*shape, dtype, device=device)
    for tensor in (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.dy):
        tensor.fill_(1.0)
    M, _, K, _ = shape
    seed = torch.tensor([1234567890123], device=device)
    masked = dict(dropout_p=dropout_p, seed=seed if dropout_p else None)
    row = min(3, M - 1)
    kept = dropout_mask(seed, M, K, dropout_p)[row].nonzero()[0] if name == "x" else 2
    getattr(p, name)[(kept,) if name == "bias" else (min(row, getattr(p, name).shape[0] - 1), kept)] = float("inf")
    exact = truth(p, **masked)
    for key, got in run(p, backend=backend, **masked).items():
        known = exact[key].isnan()
        assert torch.equal(got.isposinf() | known, exact[key].isposinf() | known), (name, key)
        assert not (got.isnan() & ~known).any(), f"{key} has a NaN of its own from the infinity in {name}"
