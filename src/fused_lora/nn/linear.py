"""LoRALinear: a stand-in for a linear layer that holds LoRA adapters by name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora.config import check_adapter_name
from fused_lora.layer_config import LayerConfig, check_adapter_dtype
from fused_lora.nn.base_linear import absorbable, check_linear, check_weight, is_conv1d, linear_sizes
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.magnitudes import WithMagnitudes
from fused_lora.ops.internals import layer_tensors, own_parameter
from fused_lora.ops.linear import lora_linear
from fused_lora.ops.update import lora_update
from fused_lora.variants import LayerVariant, Update


def summed_bias(bias: Tensor | None, more: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of two biases [N], in the dtype of the first, or in x's."""
    if bias is None or more is None:
        return bias if more is None else more.to(dtype)
    return (bias + more).to(bias.dtype)


class LoRALinear(WithMagnitudes):
    """A frozen linear layer with LoRA adapters by name.

    Equivalent to, with the active adapter's A, B and scaling::

        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, lora_dropout, training), A), B)

    to as many such updates as adapters are active, and to ``F.linear(x, weight, bias)`` without an active adapter or
    while merged. A starts as U(-1/sqrt(K), 1/sqrt(K)), B as zeros, so a fresh adapter changes nothing but, where a
    kernel of ours computes the base product, the order of its sums. `state_dict()` holds weight, bias and lora_A,
    lora_B by adapter; while merged it is the plain linear layer's (merged weight, bias, no adapters), so that saving a
    merged model writes a plain one.

    Args:
        in_features, out_features: K and N.
        r: rank R of the first adapter; 0 with use_dora trains the magnitudes alone.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the low-rank path's input while training, in [0, 1).
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        bias: whether the base layer has a bias [N].
        adapter_name: the first adapter's name.
        device, dtype: of the base weight [N, K].
        adapter_dtype: of A [R, K] and B [N, R]; None takes float32, over a float64 base float64.
        use_dora: DoRA: the rows of weight + scaling * B A have the lengths m [N], fp32, which train and start as they
            are; `lora_magnitude_vector` by adapter.
        dora_exact: let the gradient run through the rows' norms, too, which PEFT takes for constants.
        allora_eta: ALLoRA with this eta: lora_alpha is r, no dropout, and in the gradients of A and B row n of dL/d(BA)
            counts 1 / sqrt(|(BA)_n| + 1 / eta^2) times.
        allora_mode: "gradient" is that, and the paper's; "update", which is ours and not the paper's, leaves gradients
            alone and has row n of what each step of a torch.optim.Optimizer does to B count
            1 / sqrt(1 + eta^2 |(BA)_n|) times, see `fused_lora.variants.allora.ScaledSteps`.
        lora_bias: whether B has a bias [N], zero at the start: scaling times it is added to y.
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Hu et al., arXiv 2106.09685; initialisation as in loralib and Hugging Face PEFT; rsLoRA: arXiv 2312.03732;
        DoRA: arXiv 2402.09353; ALLoRA: arXiv 2410.09692.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        adapter_name: str = "default",
        device=None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        dora_exact: bool = False,
        allora_eta: float | None = None,
        allora_mode: str = "gradient",
        lora_bias: bool = False,
    ):
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value!r}")
        check_adapter_name(adapter_name)
        check_adapter_dtype(adapter_dtype)
        variant: Any = use_dora, dora_exact, allora_eta, allora_mode, lora_bias
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora, *variant)
        super().__init__()
        self._adopt(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        self._add(adapter_name, config, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
        **variant: Any,
    ) -> "LoRALinear":
        """A LoRALinear for an existing layer, which it freezes: nothing is copied and tied weights stay tied.

        It takes over the very Parameters of an nn.Linear and of transformers' Conv1D. Any other linear layer (a
        subclass with a forward of its own, one with hooks or with a quantised or sharded weight) is kept as
        `base_layer` and called.

        Args: linear; the rest, also use_dora, dora_exact, allora_eta, allora_mode and lora_bias, as in the
            class.
        Returns: the layer, in the training mode of `linear`.
        Raises: ValueError naming the argument, what was expected and what was given.
        """
        return cls.over(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_name, adapter_dtype, **variant)

    @staticmethod
    def check_base(base: Any) -> None:
        """Raises ValueError unless it is a linear layer that can be called or taken over."""
        check_linear(base)

    @classmethod
    def kind_for(cls, base: nn.Module) -> type[LoRALayer]:
        from fused_lora.nn.around import LoRALinearAround  # which is one of these

        return LoRALinearAround if not absorbable(base) else _LoRAConv1D if is_conv1d(base) else cls

    def _adopt(self, linear: Any) -> None:
        """Take over the base layer's Parameters, frozen, and start without adapters."""
        self._sizes_of(linear)
        self.weight = linear.weight  # [N, K]
        self.register_parameter("bias", linear.bias)  # [N]
        self._start_empty()

    def _sizes_of(self, linear: nn.Module) -> None:
        self.in_features, self.out_features = linear_sizes(linear)
        linear.requires_grad_(False)

    @staticmethod
    def shapes_over(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A [R, K] and B [N, R]."""
        K, N = linear_sizes(base)
        return (r, K), (N, r)

    def plain(self) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return self._over_parameters(linear)

    def _over_parameters(self, plain: nn.Module) -> nn.Module:
        """The plain layer with this one's Parameters."""
        plain.register_parameter("weight", self._parameters["weight"])
        plain.register_parameter("bias", self._parameters["bias"])
        return plain.train(self.training)

    def forward(self, x: Tensor):
        """y [..., N] of x [..., K]."""
        name = self.active_adapter
        if name is None or self._pristine is not None:
            return self._plain(x)
        if self.variants or self.link is not None:
            variant = self._variant()
            if variant is not None:
                return self._varied(x, variant)
        if type(name) is not str:
            return self._several(x)
        weight, bias, lora_A, lora_B = layer_tensors(self, name)
        if lora_A.is_meta:  # offloaded, or a model without values
            lora_A, lora_B = self.lora_A(name), self.lora_B(name)
        dropout_p = self.lora_dropout[name]
        if dropout_p and not self._modules["lora_dropout_switch"].training:  # type: ignore[union-attr]
            dropout_p = 0.0
        return lora_linear(x, weight, lora_A, lora_B, self.scaling[name], bias=bias, dropout_p=dropout_p)

    def _plain(self, x: Tensor) -> Tensor:
        """The base layer alone."""
        return F.linear(x, self.weight, self.bias)

    def _varied(self, x: Tensor, variant: LayerVariant) -> Tensor:
        """The layer with a variant's update."""
        update = variant.update(self, x)
        bias = own_parameter(self, "bias")
        if update.bias is not None:
            bias = summed_bias(bias, update.bias, x.dtype)
        y = self._updated(x, bias, update)
        return y if update.more is None else y + self._updated(x, None, update.more)

    def _updated(self, x: Tensor, bias: Tensor | None, update: Update) -> Tensor:
        """The op on what a variant hands over."""
        lora_A, lora_B, scaling, dropout_p, optional, take_h, other_x, _, _ = update
        returned: Any = lora_linear(
            x if other_x is None else other_x,
            self.matrix(),
            lora_A,
            lora_B,
            scaling,
            bias=bias,
            dropout_p=dropout_p,
            return_h=take_h is not None,
            **optional,
        )
        if take_h is None:
            return returned
        y, h = returned
        take_h(h)
        return y

    def _several(self, x: Tensor) -> Tensor:
        """The base layer and the updates of the active adapters."""
        if self._dora_acts():
            return self._in_turn(x, self._plain(x), lambda x: F.linear(x, self.matrix()))
        (lora_A, lora_B, scaling, dropout_p), *others = self._summands()
        bias = summed_bias(self.bias, self.out_bias(), x.dtype)
        y: Any = lora_linear(x, self.matrix(), lora_A, lora_B, scaling, bias=bias, dropout_p=dropout_p)
        for lora_A, lora_B, scaling, dropout_p in others:
            y = lora_update(y, x, lora_A, lora_B, scaling, dropout_p=dropout_p)
        return y

    @classmethod
    def check_variant(cls, base: Any, config: LayerConfig) -> None:
        """Any adapter can be any."""

    def matrix(self) -> Tensor:
        """The weight as [N, K]."""
        return own_parameter(self, "weight")

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_B[adapter_name], self.lora_A[adapter_name]

    def _check_addable(self) -> None:
        check_weight(self.weight, (self.out_features, self.in_features))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._adapters_repr()}"
        )


class _LoRAConv1D(LoRALinear):
    """A LoRALinear whose weight lies transposed, [K, N], as transformers' Conv1D has it."""

    fan_in_fan_out = True

    def plain(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return self._over_parameters(Conv1D(self.out_features, self.in_features))

    def forward(self, x: Tensor):
        if self.active_adapter is None or self.merged:
            return self._plain(x)
        variant = self._variant()
        return self._several(x) if variant is None else self._varied(x, variant)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)

    def matrix(self) -> Tensor:
        return self.weight.t()

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].t(), self.lora_B[adapter_name].t()

    def _check_addable(self) -> None:
        check_weight(self.weight, (self.in_features, self.out_features))
