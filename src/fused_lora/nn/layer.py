"""LoRALayer: what all layers with adapters have in common: a base under the adapters, merging, saving."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora import bases
from fused_lora.config import check_adapter_name
from fused_lora.layer_config import LayerConfig
from fused_lora.nn.by_name import AdaptersByName
from fused_lora.nn.merged_weight import MergedUpdate, check_values, merged_weight, summed


class LoRALayer(AdaptersByName):
    """A frozen base layer with LoRA adapters by name, of which none, one or several act.

    A layer of this kind either has taken over the base's Parameters or holds the base as `base_layer`. While merged its
    `state_dict()` is the plain layer's (merged weight, no adapters), so that saving a merged model writes a plain one.
    """

    fan_in_fan_out = False  # whether the base weight lies transposed, [K, N]

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
            variant: use_dora, dora_exact, allora_eta, allora_mode, as in `LoRALinear`; others have plain LoRA only.
        Returns: the layer, in the training mode of `base`.
        Raises: ValueError naming the argument, what was expected and what was given.
        """
        cls.check_base(base)
        check_adapter_name(adapter_name)
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
        for name in ("use_dora", "allora_eta"):
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
        return named | ({"lora_magnitude_vector": shapes[1][:1]} if config.use_dora else {})

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """`named_tensors` as PEFT's file has them: not copies, unless they lie otherwise here."""
        return {key: tensor.detach() for key, tensor in self.named_tensors(adapter_name).items()}

    def base(self) -> Any:
        """The module that has the base weight: the base layer where it is kept, else this one."""
        return self.base_layer if "base_layer" in self._modules else self

    def plain(self) -> nn.Module:
        """The layer without adapters, over the same Parameters."""
        return self.base()

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, in the shape of the base weight, the adapter adds to it, but for the scaling."""
        raise NotImplementedError

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
        if config.use_dora:
            m = torch.empty(shapes[1][0], device=device, dtype=dtype)
            self.lora_magnitude_vector[adapter_name] = nn.Parameter(m, requires_grad=False)
        self._set_config(adapter_name, config)
        self.reset_lora_parameters(adapter_name)
        self.init_lora_weights[adapter_name], self.trains_bias[adapter_name] = True, "none"
        if first:
            self.set_adapter(adapter_name)

    def merge(self) -> None:
        """Fold the active adapters into the weight: the plain layer's cost per call and no LoRA gradients until
        `unmerge`.

        Equivalent to ``weight = (weight.float() + scaling * B.float() @ A.float()).to(weight.dtype)``, in a new
        Parameter: the base weight is kept aside, so `unmerge` restores it bit for bit and a tied twin never sees the
        merged one. Costs a second weight meanwhile. A quantised weight is dequantised, merged and quantised again.

        Raises: ValueError if no adapter is active, one is merged already, the tensors are not plain or not here
            (quantised by a library that `bases` does not know or cannot quantise with, sharded, offloaded, on the meta
            device), or the merged weight is not finite; nothing changes then.
        """
        if not self.active_adapters or self.merged:
            raise ValueError(
                f"merge() needs an active adapter that is not merged yet; got {self.active_adapter!r}, "
                f"{'merged' if self.merged else 'none active'}"
            )
        self.check_mergeable(self.active_adapters)
        merged, pristine = self._merged_and_pristine()
        # Past Module.__setattr__, which would register a second parameter.
        object.__setattr__(self, "_pristine", pristine)
        self._put(merged)

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError if `merge` would refuse these adapters, whatever values the tensors have."""
        if not adapter_names:
            return
        quantised = bases.of(self.base())
        if quantised is None:
            check_values("weight", self.base().weight)
        else:
            quantised.check_mergeable()
        for name in adapter_names:
            for key, tensor in self.named_tensors(name).items():
                check_values(key.partition(".")[0], tensor)
            self._factors(name)
        if self.link is not None:
            self.link.merged_updates(self)

    def _merged_and_pristine(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The base weight with the active adapters in it, and as it is."""
        names, base = self.active_adapters, self.base()
        updates = self._updates(names)
        quantised = bases.of(base)
        if quantised is not None:
            return quantised.merged(summed(quantised, updates)), quantised.aside()
        return nn.Parameter(merged_weight(base.weight, updates, names), requires_grad=False), base.weight

    def _updates(self, adapter_names: list[str]) -> list[MergedUpdate]:
        """What merging these adapters does to the base weight. Raises: ValueError if the link cannot be merged."""
        if self.link is not None:
            return [MergedUpdate(*update, None) for update in self.link.merged_updates(self)]
        return [
            MergedUpdate(*self._factors(name), float(self.scaling[name]), self._merged_rows(name))
            for name in adapter_names
        ]

    def _merged_rows(self, adapter_name: str) -> Tensor | None:
        """What an adapter multiplies the rows of the merged weight by, so that it broadcasts, if anything."""
        return None

    def unmerge(self) -> None:
        """Put the base weight back, the very Parameter that `merge` set aside. Raises: ValueError if nothing is
        merged."""
        if self._pristine is None:
            raise ValueError("unmerge() needs a merged adapter; got none")
        self._put(self._pristine)
        self._pristine = None

    def _put(self, weight: nn.Parameter) -> None:
        """Let a weight be the base's."""
        base = self.base()
        quantised = bases.of(base)
        if quantised is None:
            base.weight = weight
        else:
            quantised.put(weight)

    def _apply(self, fn, recurse=True):
        """Module.to(), .half() and the like reach the weight kept aside too."""
        super()._apply(fn, recurse)
        for variant in self.variants.values():
            variant.forget()
        if self.merged:
            aside: Any = nn.Module()
            aside.weight = self._pristine
            object.__setattr__(self, "_pristine", aside._apply(fn).weight)
        return self

    def state_dict(self, *args, prefix="", **kwargs):
        """As Module.state_dict; while merged, that of the plain layer with the merged weight."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.merged or self.shows_plain:
            inner = f"{prefix}base_layer."
            for key in list(state):
                if key.startswith(tuple(f"{prefix}lora_{what}." for what in ("A", "B", "magnitude_vector"))):
                    del state[key]
                elif key.startswith(inner):
                    state[prefix + key.removeprefix(inner)] = state.pop(key)
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
