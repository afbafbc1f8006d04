"""LoRAConv: a convolution with LoRA adapters by name."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.nn.layer import LoRALayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoRAConv(LoRALayer):
    """A frozen nn.Conv1d, Conv2d or Conv3d, kept as `base_layer`, with LoRA adapters by name.

    Equivalent to, with the active adapter's A [R, C_in, kernel...], B [C_out, R / groups, 1...] and scaling::

        y = base_layer(x) + scaling * conv(conv(dropout(x), A, stride, padding, dilation), B, groups=groups)

    so A pads with zeros whatever the base does, and sees all channels whatever the base's groups. A starts as
    U(-1/sqrt(n), 1/sqrt(n)) with n inputs to an element, B as zeros.

    Source: PEFT's layers for convolutions.
    """

    @staticmethod
    def check_base(base: Any) -> None:
        """Raises ValueError unless it is one of PyTorch's convolutions."""
        if not isinstance(base, CONVOLUTIONS):
            raise ValueError(f"convolution must be torch.nn's Conv1d, Conv2d or Conv3d; got {type(base).__qualname__}")

    @staticmethod
    def shapes_over(base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A [R, C_in, kernel...] and B [C_out, R / groups, 1...]. Raises: ValueError if the groups do not divide R."""
        if r % base.groups:
            raise ValueError(f"r must be a multiple of the convolution's {base.groups} groups; got {r}")
        ones = (1,) * len(base.kernel_size)
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)

    def forward(self, x: Tensor, *args, **kwargs):
        """What the base returns, with the updates of x [..., C_in, size...] added to it."""
        base: Any = self.base_layer
        y = base(x, *args, **kwargs)
        if self.active_adapter is None or self.merged:
            return y
        result = y
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]
        for lora_A, lora_B, scaling, dropout_p in self._acting():
            given = F.dropout(x.to(lora_A.device, lora_A.dtype), dropout_p)
            low = conv(given, lora_A, None, base.stride, base.padding, base.dilation)
            result = result + conv(low, lora_B, groups=base.groups) * scaling
        return result.to(y.dtype)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        base = self.base()
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError(
                "convolution must have one group and pad with zeros for a merge; got "
                f"groups={base.groups}, padding_mode={base.padding_mode!r}"
            )
        return self.lora_B[adapter_name].flatten(1), self.lora_A[adapter_name].flatten(1)

    def extra_repr(self) -> str:
        return self._adapters_repr()
