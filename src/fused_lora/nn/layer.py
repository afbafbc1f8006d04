"""LoRALayer: what all layers with adapters have in common: the base layer, adding adapters, and what is saved."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.config import check_adapter_name
from fused_lora.layer_config import LayerConfig, check_adapter_dtype
from fused_lora.nn.merging import MergeableLayer


class LoRALayer(MergeableLayer):
    """A frozen base layer with LoRA adapters by name, of which none, one or several act.

    A layer of this kind either has taken over the base's Parameters or holds the base as `base_layer`. While merged its
    `state_dict()` is the plain layer's (merged weight, no adapters), so that saving a merged model writes a plain one.
    """

    fan_in_fan_out = False  # whether the base weight lies transposed, [K, N]
    linear_only: tuple[str, ...] = ("use_dora", "allora_eta", "lora_bias")  # what an adapter of a layer cannot be

    @classmethod
    def over(
        cls,
        base: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
        **variant: Any,
    ) -> Any:
        """A layer with a first adapter for an existing layer, which it freezes: nothing is copied and tied weights stay
        tied.

        Args:
            base: the layer, of a kind that this class is for.
            r: rank R of the adapter.
            lora_alpha: the update is scaled by lora_alpha / r.
            lora_dropout: dropout on the low-rank path's input while training, in [0, 1).
            use_rslora: scale by lora_alpha / sqrt(r) instead.
            adapter_name: the adapter's name.
            adapter_dtype: of A and B; None takes float32, over a float64 base float64.
            variant: use_dora, dora_exact, allora_eta, allora_mode and lora_bias, as in `LoRALinear`; convolutions have
                the last alone, others none.
        Returns: the layer, in the training mode of `base`.
        Raises: ValueError naming the argument, what was expected and what was given.
        """
        if isinstance(base, LoRALayer):
            raise ValueError(
                f"base must be a layer without adapters, add_adapter gives it another one; got a {type(base).__name__} "
                f"with {sorted(base.lora_A)}"
            )
        cls.check_base(base)
        check_adapter_name(adapter_name)
        check_adapter_dtype(adapter_dtype)
        config, kind = LayerConfig(r, lora_alpha, lora_dropout, use_rslora, **variant), cls.kind_for(base)
        kind.check_variant(base, config)
        cls.shapes_over(base, r)
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer._adopt(base)
        layer._add(adapter_name, config, adapter_dtype)
        return layer.train(base.training)

    @staticmethod
    def check_base(base: Any) -> None:
        """Raises ValueError unless a layer of this class can have this base."""
        raise NotImplementedError

    @classmethod
    def check_variant(cls, base: Any, config: LayerConfig) -> None:
        """Raises ValueError unless an adapter over this base can be what the configuration says."""
        for name in cls.linear_only:
            if (value := getattr(config, name)) not in (False, None):
                raise ValueError(f"{name} needs a linear layer; got {value!r} for a {type(base).__name__}")

    @classmethod
    def kind_for(cls, base: nn.Module) -> type["LoRALayer"]:
        """The subclass for a base."""
        return cls

    def _adopt(self, base: Any) -> None:
        """Keep the base, frozen, and start without adapters."""
        self.base_layer = base.requires_grad_(False)
        self._start_empty()

    def __getattr__(self, name: str):
        """What the base shows in public, for code around it that reads its weight or sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    @staticmethod
    def shapes_over(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of rank r over a base, plain or in a layer of this kind. Raises: ValueError if the rank
        cannot be."""
        raise NotImplementedError

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of rank r in this layer."""
        return self.shapes_over(self, r)

    @classmethod
    def file_shapes(cls, shapes: tuple[tuple[int, ...], tuple[int, ...]], config: LayerConfig) -> dict[str, Any]:
        """The shapes of an adapter's `file_tensors`, of those of A and B."""
        named: dict[str, Any] = dict(zip(cls.file_keys, shapes)) if config.r else {}
        for key, has in (("lora_B.bias", config.lora_bias), ("lora_magnitude_vector", config.use_dora)):
            named |= {key: shapes[1][:1]} if has else {}
        return named

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """`named_tensors` as PEFT's file has them: not copies, unless they lie otherwise here."""
        return {key: tensor.detach() for key, tensor in self.named_tensors(adapter_name).items()}

    def plain(self) -> nn.Module:
        """The layer without adapters, over the same Parameters."""
        return self.base()

    def _check_addable(self) -> None:
        """Raises ValueError if the base is not in a state to get an adapter."""
        self.check_base(self.base())

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **variant: Any,
    ) -> None:
        """Add a fresh adapter; the first one becomes active, a later one waits frozen for `set_adapter`.

        Args: as in `over`.
        Raises: ValueError if the name is taken or an argument is out of range.
        """
        check_adapter_name(adapter_name)
        check_adapter_dtype(adapter_dtype)
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora, **variant)
        if adapter_name in self.lora_A:
            raise ValueError(
                f"adapter_name must be new to the layer, which has {sorted(self.lora_A)}; got {adapter_name!r}"
            )
        self._check_addable()
        self.check_variant(self.base(), config)
        self.adapter_shapes(r)
        self._add(adapter_name, config, adapter_dtype)

    def _add(self, adapter_name: str, config: LayerConfig, adapter_dtype: torch.dtype | None) -> None:
        """Add a fresh adapter whose arguments are checked."""
        first = not self.lora_A
        device, dtype = adapter_place(self.base())
        shapes = self.adapter_shapes(config.r)
        empty = [torch.empty(shape, device=device, dtype=adapter_dtype or dtype) for shape in shapes]
        for tensors, values in zip((self.lora_A, self.lora_B), empty, strict=True):
            tensors[adapter_name] = nn.Parameter(values, requires_grad=False)
        if config.lora_bias:
            bias = torch.empty(shapes[1][0], device=device, dtype=adapter_dtype or dtype)
            self.lora_bias[adapter_name] = nn.Parameter(bias, requires_grad=False)
        if config.use_dora:
            m = torch.empty(shapes[1][0], device=device, dtype=dtype)
            self.lora_magnitude_vector[adapter_name] = nn.Parameter(m, requires_grad=False)
        self._set_config(adapter_name, config)
        self.reset_lora_parameters(adapter_name)
        self.init_lora_weights[adapter_name], self.trains_bias[adapter_name] = True, "none"
        if first:
            self.set_adapter(adapter_name)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """transformers' save_pretrained writes a tensor of these names once, where a layer is reached by two names."""
        return {name: name for name, _ in self.named_parameters()}


def adapter_place(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a fresh adapter of a base lies, and in which dtype: where the base computes; in fp32, or fp64 over an fp64
    base."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
    device = weight.device
    if device.type == "meta":  # accelerate's hook brings the weight when the base is called
        device = torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", None) or device)
    return device, torch.float64 if weight.dtype is torch.float64 else torch.float32
