"""LayerConfig: what an adapter is in one layer, and the checks of its numbers."""

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_LARGEST_RANK = 2**31 - 1
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALLORA_MODES = ("gradient", "update")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; 0 where there is no rank."""
    return 0.0 if r == 0 else lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def finite_numbers(name: str, values: Any, count: int) -> list[float]:
    """The values as floats. Raises: ValueError unless they are so many finite numbers."""
    try:
        numbers = [as_number(value) for value in values]
    except TypeError:  # nothing that can be gone through
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be {count} finite numbers, one for each adapter; got {values!r}")
    return numbers


def as_number(value: Any) -> float:
    """A number, or a tensor of one element, as a float; NaN for anything else."""
    one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if one else math.nan


def check_adapter_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError unless A and B can have it; None is the usual one."""
    if dtype is not None and dtype not in _ADAPTER_DTYPES:
        names = ", ".join(str(known) for known in _ADAPTER_DTYPES)
        raise ValueError(f"adapter_dtype must be one of {names}, or None; got {dtype!r}")


@dataclass(frozen=True)
class LayerConfig:
    """What an adapter is in one layer. Raises ValueError naming the value that no LoRA layer can have."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    dora_exact: bool = False
    allora_eta: float | None = None
    allora_mode: str = "gradient"
    lora_bias: bool = False

    def __post_init__(self):
        self._check_plain()
        for name in ("use_dora", "dora_exact", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool; got {getattr(self, name)!r}")
        if self.dora_exact and not self.use_dora:
            raise ValueError("dora_exact must be False without use_dora; got True")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora exclude each other; got both")
        if self.allora_mode not in _ALLORA_MODES:
            raise ValueError(f"allora_mode must be one of {_ALLORA_MODES}; got {self.allora_mode!r}")
        if self.allora_eta is not None:
            self._check_allora(self.allora_eta)
        elif self.allora_mode != "gradient":
            raise ValueError(f"allora_mode must be 'gradient' without allora_eta; got {self.allora_mode!r}")

    def _check_plain(self) -> None:
        r, alpha, dropout = self.r, self.lora_alpha, self.lora_dropout
        least = 0 if self.use_dora is True else 1  # DoRA's magnitudes train alone, too
        if not isinstance(r, int) or isinstance(r, bool) or r < least:
            raise ValueError(f"r must be an int >= {least}; got {r!r}")
        if r > _LARGEST_RANK:
            raise ValueError(f"r must be at most {_LARGEST_RANK}; got a number of {r.bit_length()} bits")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
            got = repr(alpha) if not isinstance(alpha, int) else f"a number of {alpha.bit_length()} bits"
            raise ValueError(f"lora_alpha must be a finite number; got {got}")
        if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"lora_dropout must be a number in [0, 1); got {dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be a bool; got {self.use_rslora!r}")

    def _check_allora(self, eta) -> None:
        """ALLoRA is defined for a scaling of 1 and without dropout; the usual lora_alpha, 8, stands for r."""
        if not isinstance(eta, int | float) or isinstance(eta, bool) or not 0 < eta <= sys.float_info.max:
            raise ValueError(f"allora_eta must be a finite number > 0 or None; got {eta!r}")
        if self.lora_alpha == LayerConfig.lora_alpha:
            object.__setattr__(self, "lora_alpha", self.r)
        for name, value, want in (
            ("lora_alpha", self.lora_alpha, self.r),
            ("lora_dropout", self.lora_dropout, 0),
            ("use_rslora", self.use_rslora, False),
            ("use_dora", self.use_dora, False),
            ("lora_bias", self.lora_bias, False),
        ):
            if value != want:
                what = f"r, {want}, for a scaling of 1" if name == "lora_alpha" else repr(want)
                raise ValueError(f"{name} must be {what} with allora_eta={eta!r}; got {value!r}")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)
