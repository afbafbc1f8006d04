"""LoRALinear: a stand-in for nn.Linear that holds LoRA adapters by name."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora.config import LayerConfig, check_adapter_name, unknown_name
from fused_lora.nn.adapter_tensors import AdapterTensors, set_trainable
from fused_lora.nn.base_linear import check_linear, check_weight
from fused_lora.nn.merged_weight import merged_weight
from fused_lora.ops.internals import layer_tensors
from fused_lora.ops.linear import lora_linear


class LoRALinear(nn.Module):
    """A frozen linear layer with LoRA adapters by name, one of them active at a time.

    Equivalent to, with the active adapter's A, B and scaling::

        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, lora_dropout, training), A), B)

    and to ``F.linear(x, weight, bias)`` without an active adapter or while merged. A starts as U(-1/sqrt(K),
    1/sqrt(K)), B as zeros, so a fresh adapter changes nothing but, where a kernel of ours computes the base product,
    the order of its sums. `state_dict()` holds weight, bias and lora_A, lora_B by adapter; while merged it is the plain
    linear layer's (merged weight, bias, no adapters), so that saving a merged model writes a plain one.

    Args:
        in_features, out_features: K and N.
        r: rank R of the first adapter.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the low-rank path's input while training, in [0, 1).
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        bias: whether the base layer has a bias [N].
        adapter_name: the first adapter's name.
        device, dtype: of the base weight [N, K].
        adapter_dtype: of A [R, K] and B [N, R]; None takes float32 for a bf16 or fp16 base and the base's dtype
            otherwise.
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Hu et al., arXiv 2106.09685; initialisation as in loralib and Hugging Face PEFT; rsLoRA: arXiv 2312.03732.
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
    ):
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value!r}")
        check_adapter_name(adapter_name)
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora)
        super().__init__()
        self._adopt(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        self._add(adapter_name, config, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """A LoRALinear over the very Parameters of `linear`, which it freezes: nothing is copied and tied weights stay
        tied.

        Args: linear, exactly an nn.Linear without hooks; the rest as in the class.
        Returns: the layer, in the training mode of `linear`.
        Raises: ValueError naming the argument, what was expected and what was given.
        """
        check_linear(linear)
        check_adapter_name(adapter_name)
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear)
        layer._add(adapter_name, config, adapter_dtype)
        return layer.train(linear.training)

    def _adopt(self, linear: nn.Linear) -> None:
        """Take over the base layer's Parameters, frozen, and start without adapters."""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        linear.requires_grad_(False)
        self.weight = linear.weight  # [N, K]
        self.register_parameter("bias", linear.bias)  # [N]
        self.lora_A, self.lora_B = AdapterTensors(), AdapterTensors()  # [R, K], [N, R]
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.active_adapter: str | None = None
        self._pristine: nn.Parameter | None = None  # the base weight while self.weight is a merged one

    def forward(self, x: Tensor):
        """y [..., N] of x [..., K]."""
        name = self.active_adapter
        if name is None or self._pristine is not None:
            return F.linear(x, self.weight, self.bias)
        weight, bias, lora_A, lora_B = layer_tensors(self, name)
        if lora_A.is_meta:  # offloaded, or a model without values
            lora_A, lora_B = self.lora_A(name), self.lora_B(name)
        dropout_p = self.lora_dropout[name] if self.training else 0.0
        return lora_linear(x, weight, lora_A, lora_B, self.scaling[name], bias=bias, dropout_p=dropout_p)

    def _check_known(self, name: str | None) -> None:
        if name is None or name not in self.lora_A:
            raise unknown_name("adapter_name", name, self.lora_A)

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Add a fresh adapter; the first one becomes active, a later one waits frozen for `set_adapter`.

        Args: as in the class.
        Raises: ValueError if the name is taken or an argument is out of range.
        """
        check_adapter_name(adapter_name)
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora)
        if adapter_name in self.lora_A:
            raise ValueError(
                f"adapter_name must be new to the layer, which has {sorted(self.lora_A)}; got {adapter_name!r}"
            )
        check_weight(self.weight, (self.out_features, self.in_features))
        self._add(adapter_name, config, adapter_dtype)

    def _add(self, adapter_name: str, config: LayerConfig, adapter_dtype: torch.dtype | None) -> None:
        """Add a fresh adapter whose arguments are checked."""
        first, base = not self.lora_A, self.weight
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if base.dtype in (torch.bfloat16, torch.float16) else base.dtype
        lora_A = torch.empty(config.r, self.in_features, device=base.device, dtype=adapter_dtype)
        lora_B = torch.empty(self.out_features, config.r, device=base.device, dtype=adapter_dtype)
        self.lora_A[adapter_name] = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B[adapter_name] = nn.Parameter(lora_B, requires_grad=False)
        self._set_config(adapter_name, config)
        self.reset_lora_parameters(adapter_name)
        if first:
            self.set_adapter(adapter_name)

    def set_hyperparameters(self, adapter_name: str, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """Set an adapter's lora_alpha, lora_dropout and use_rslora, and with them its scaling; its rank is that of its
        tensors.

        Raises: ValueError for an unknown adapter or a value out of range.
        """
        self._check_known(adapter_name)
        self._set_config(adapter_name, LayerConfig(self.r[adapter_name], lora_alpha, lora_dropout, use_rslora))

    def _set_config(self, adapter_name: str, config: LayerConfig) -> None:
        self.r[adapter_name], self.lora_alpha[adapter_name] = config.r, config.lora_alpha
        self.lora_dropout[adapter_name] = float(config.lora_dropout)
        self.use_rslora[adapter_name], self.scaling[adapter_name] = config.use_rslora, config.scaling

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, no adapter is. Raises: ValueError if it is unknown or merged."""
        self._check_known(adapter_name)
        if adapter_name == self.active_adapter:
            self.set_adapter(None)
        del self.lora_A[adapter_name], self.lora_B[adapter_name]
        for values in (self.r, self.lora_alpha, self.scaling, self.lora_dropout, self.use_rslora):
            del values[adapter_name]

    def set_adapter(self, adapter_name: str | None) -> None:
        """Make one adapter active and the only trainable one; None is the base layer alone.

        Raises: ValueError if the adapter is unknown, or another one is merged into the weight.
        """
        if adapter_name is not None:
            self._check_known(adapter_name)
        if self.merged and adapter_name != self.active_adapter:
            raise ValueError(
                f"adapter {self.active_adapter!r} is merged, unmerge() before switching; got {adapter_name!r}"
            )
        for name in self.lora_A:
            set_trainable(self.lora_A[name], name == adapter_name)
            set_trainable(self.lora_B[name], name == adapter_name)
        self.active_adapter = adapter_name

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start an adapter afresh: A from U(-1/sqrt(K), 1/sqrt(K)), B zero. Raises: ValueError if it is unknown or
        merged."""
        self._check_known(adapter_name)
        if self.merged and adapter_name == self.active_adapter:
            raise ValueError(f"adapter {adapter_name!r} is merged, unmerge() before resetting it")
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name])

    @property
    def merged(self) -> bool:
        """Whether `weight` holds weight + scaling * B A of the active adapter."""
        return self._pristine is not None

    def merge(self) -> None:
        """Fold the active adapter into the weight: one GEMM per call and no LoRA gradients until `unmerge`.

        Equivalent to ``weight = (weight.float() + scaling * B.float() @ A.float()).to(weight.dtype)``, in a new
        Parameter: the base weight is kept aside, so `unmerge` restores it bit for bit and a tied twin never sees the
        merged one. Costs a second [N, K] meanwhile.

        Raises: ValueError if no adapter is active, one is merged already, the tensors are not here (sharded, offloaded,
            on the meta device), or the merged weight is not finite; nothing changes then.
        """
        name = self.active_adapter
        if name is None or self.merged:
            raise ValueError(
                f"merge() needs an active adapter that is not merged yet; got {name!r}, "
                f"{'merged' if self.merged else 'none active'}"
            )
        tensors = self.weight, self.lora_A[name], self.lora_B[name]
        weight = merged_weight(*tensors, float(self.scaling[name]), name)  # [N, K]
        # Past Module.__setattr__, which would register a second parameter.
        object.__setattr__(self, "_pristine", self.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base weight back, the very Parameter that `merge` set aside. Raises: ValueError if nothing is
        merged."""
        if self._pristine is None:
            raise ValueError("unmerge() needs a merged adapter; got none")
        self.weight = self._pristine
        self._pristine = None

    def _apply(self, fn, recurse=True):
        """Module.to(), .half() and the like reach the weight kept aside too."""
        super()._apply(fn, recurse)
        if self.merged:
            aside: Any = nn.Module()
            aside.weight = self._pristine
            object.__setattr__(self, "_pristine", aside._apply(fn).weight)
        return self

    def state_dict(self, *args, prefix="", **kwargs):
        """As Module.state_dict; while merged, that of the plain linear layer with the merged weight."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.merged:
            for key in [key for key in state if key.startswith((f"{prefix}lora_A.", f"{prefix}lora_B."))]:
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.merged:
            raise ValueError(
                f"{prefix or 'the layer '}must be unmerged before load_state_dict; got adapter {self.active_adapter!r} "
                "merged"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """transformers' save_pretrained writes a tensor of these names once, where a layer is reached by two names."""
        return {name: name for name, _ in self.named_parameters()}

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}(r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, lora_dropout={self.lora_dropout[name]}"
            f"{', use_rslora=True' if self.use_rslora[name] else ''})"
            for name in self.lora_A
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters=[{adapters}], active_adapter={self.active_adapter!r}, merged={self.merged}"
        )
