"""The named sets of cases: what is timed where."""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One layer call: x [M, K], W [N, K], rank R, dropout p, dtype of x and W."""

    M: int
    K: int
    N: int
    R: int
    dropout: float
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{str(self.dtype)[6:]:8s} M={self.M:<5d} {self.K:>5d}->{self.N:<5d} R={self.R:<3d} p={self.dropout:g}"

    def facts(self) -> dict:
        """The fields as a row of figures holds them."""
        return vars(self) | dict(dtype=str(self.dtype)[6:])

    @property
    def floor(self) -> float:
        """What the arithmetic alone asks for, over frozen: six low-rank products beside two of the base."""
        return 1 + 1.5 * self.R * (1 / self.K + 1 / self.N)

    def flops(self) -> int:
        """Of forward and backward together: two base products and six low-rank ones."""
        return 4 * self.M * self.N * self.K + 6 * self.M * self.R * (self.K + self.N)


def _grid(Ms, KNs, Rs, ps, dtypes) -> list[Case]:
    return [Case(M, K, N, R, p, d) for d, (K, N), M, R, p in itertools.product(dtypes, KNs, Ms, Rs, ps)]


_F32, _BF16 = torch.float32, torch.bfloat16
_SQUARES = [(k, n) for k in (1024, 4096) for n in (1024, 4096)]
_LLAMA = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (8192, 8192), (2048, 2048)]


def preset(name: str, device: str) -> list[Case]:
    """The cases of a preset.

    Args:
        name: quick (about a minute on a CPU), readme (the published table), full (every size and rank),
            variants (no case: a training step with LoRA's variants), latency (no case: a forward of a model).
        device: cpu or cuda.
    Raises: ValueError for an unknown preset.
    """
    if device == "cpu":
        # PyTorch's bf16 product dy W runs at 0.8 GFLOP/s on CPUs without AVX-512: there "readme" takes hours, so
        # "quick" is fp32 alone.
        sets = {
            "quick": lambda: _grid([512], [(1024, 1024), (1024, 4096)], [16], [0.0, 0.1], [_F32]),
            "readme": lambda: (
                _grid([512, 2048], _SQUARES, [16], [0.0], [_F32])
                + _grid([512], _SQUARES, [16], [0.1], [_F32])
                + _grid([512, 2048], _SQUARES, [16], [0.0], [_BF16])
                + _grid([512], _SQUARES[:3], [16], [0.1], [_BF16])
                + _grid([512], _SQUARES[:3], [64], [0.0], [_BF16])
            ),
            "full": lambda: _grid([16, 512, 2048], _SQUARES, [8, 16, 64, 256], [0.0, 0.1], [_F32]),
        }
    else:
        sets = {
            "quick": lambda: _grid([2048, 8192], [(4096, 4096), (4096, 1024)], [16], [0.0, 0.1], [_BF16]),
            "readme": lambda: (
                _grid([8192, 2048], _LLAMA[:4], [16], [0.0, 0.1], [_BF16])
                + _grid([8192], _LLAMA[:1], [64, 256], [0.0], [_BF16])
                + _grid([16, 512, 16384], _LLAMA[:1], [16], [0.0], [_BF16])
                + _grid([4096], [(3072, 3072), (3072, 12288)], [16, 128], [0.0], [_BF16])
            ),
            "full": lambda: _grid([16, 512, 2048, 8192, 16384], _LLAMA, [8, 16, 64, 256], [0.0, 0.1], [_BF16]),
        }
    sets["variants"] = sets["latency"] = list
    if name not in sets:
        raise ValueError(f"preset must be one of {', '.join(sets)}; got {name!r}")
    return sets[name]()
