"""LoRALayer: what all layers with adapters have in common: adapters by name, which of them act, merging, saving."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora import bases
from fused_lora.config import LayerConfig, check_adapter_name, unknown_name
from fused_lora.nn.adapter_tensors import AdapterTensors, set_trainable
from fused_lora.nn.merged_weight import check_values, merged_weight, summed

ActiveAdapter = str | list[str] | None
Summand = tuple[Tensor, Tensor, float | Tensor, float]  # A, B, scaling, dropout_p


def one_or_list(names: list[str]) -> ActiveAdapter:
    """The value of active_adapter for these names: a list only for two and more."""
    return names if len(names) > 1 else next(iter(names), None)


class LoRALayer(nn.Module):
    """A frozen base layer with LoRA adapters by name, of which none, one or several act.

    A layer of this kind either has taken over the base's Parameters or holds the base as `base_layer`. While merged its
    `state_dict()` is the plain layer's (merged weight, no adapters), so that saving a merged model writes a plain one.
    """

    file_keys = ("lora_A.weight", "lora_B.weight")  # of A and B in PEFT's file, after the layer's name
    fan_in_fan_out = False  # whether the base weight lies transposed, [K, N]

    def _start_empty(self) -> None:
        """No adapters yet."""
        self.lora_A, self.lora_B = AdapterTensors(), AdapterTensors()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.init_lora_weights: dict[str, bool | str] = {}  # PEFT's word for how each started
        self.active_adapter: ActiveAdapter = None  # a list of two or more
        self.shows_plain = False  # inside `merged(model)`: state_dict() is the plain layer's, merged or not
        self._pristine: nn.Parameter | None = None  # the base weight while a merged one stands in its place

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
        Returns: the layer, in the training mode of `base`.
        Raises: ValueError naming the argument, what was expected and what was given.
        """
        cls.check_base(base)
        check_adapter_name(adapter_name)
        config = LayerConfig(r, lora_alpha, lora_dropout, use_rslora)
        cls.shapes_over(base, r)
        layer = cls._kind_for(base).__new__(cls._kind_for(base))
        nn.Module.__init__(layer)
        layer._adopt(base)
        layer._add(adapter_name, config, adapter_dtype)
        return layer.train(base.training)

    @staticmethod
    def check_base(base: Any) -> None:
        """Raises ValueError unless a layer of this class can have this base."""
        raise NotImplementedError

    @classmethod
    def _kind_for(cls, base: nn.Module) -> type["LoRALayer"]:
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

    def base(self) -> Any:
        """The module that has the base weight: the base layer where it is kept, else this one."""
        return self.base_layer if "base_layer" in self._modules else self

    def plain(self) -> nn.Module:
        """The layer without adapters, over the same Parameters."""
        return self.base()

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, in the shape of the base weight, the adapter adds to it, but for the scaling."""
        raise NotImplementedError

    def _check_known(self, name: str | None) -> None:
        if name is None or name not in self.lora_A:
            raise unknown_name("adapter_name", name, self.lora_A)

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
        self._check_addable()
        self.adapter_shapes(r)
        self._add(adapter_name, config, adapter_dtype)

    def _add(self, adapter_name: str, config: LayerConfig, adapter_dtype: torch.dtype | None) -> None:
        """Add a fresh adapter whose arguments are checked."""
        first = not self.lora_A
        device, dtype = adapter_place(self.base())
        for tensors, shape in zip((self.lora_A, self.lora_B), self.adapter_shapes(config.r), strict=True):
            empty = torch.empty(shape, device=device, dtype=adapter_dtype or dtype)
            tensors[adapter_name] = nn.Parameter(empty, requires_grad=False)
        self._set_config(adapter_name, config)
        self.reset_lora_parameters(adapter_name)
        self.init_lora_weights[adapter_name] = True
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
        """Remove an adapter; if it was active, it is so no more. Raises: ValueError if it is unknown or merged."""
        self._check_known(adapter_name)
        active = self.active_adapters
        if adapter_name in active:
            self.set_adapter([name for name in active if name != adapter_name])
        del self.lora_A[adapter_name], self.lora_B[adapter_name]
        for values in (
            self.r,
            self.lora_alpha,
            self.scaling,
            self.lora_dropout,
            self.use_rslora,
            self.init_lora_weights,
        ):
            del values[adapter_name]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, in the order in which they were set."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else list(active or ())

    def set_adapter(self, adapter_name: ActiveAdapter) -> None:
        """Make one adapter, or those of a list, active and the only trainable ones; None is the base layer alone.

        Raises: ValueError if an adapter is unknown, or others are merged into the weight.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name or ())
        for name in names:
            self._check_known(name)
        if self.merged and names != self.active_adapters:
            raise ValueError(
                f"adapter {self.active_adapter!r} is merged, unmerge() before switching; got {adapter_name!r}"
            )
        for name in self.lora_A:
            set_trainable(self.lora_A[name], name in names)
            set_trainable(self.lora_B[name], name in names)
        self.active_adapter = one_or_list(names)

    def _check_resettable(self, adapter_name: str) -> None:
        self._check_known(adapter_name)
        if self.merged and adapter_name in self.active_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged, unmerge() before resetting it")

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start an adapter afresh: A from U(-1/sqrt(K), 1/sqrt(K)) with K inputs to an element of h, B zero. Raises:
        ValueError if it is unknown or merged."""
        self._check_resettable(adapter_name)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name])

    def _acting(self) -> list[Summand]:
        """A, B, scaling and dropout of the active adapters."""
        summands: list[Summand] = []
        for name in self.active_adapters:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            if lora_A.is_meta:  # offloaded, or a model without values
                lora_A, lora_B = self.lora_A(name), self.lora_B(name)
            dropout_p = self.lora_dropout[name] if self.training else 0.0
            summands.append((lora_A, lora_B, self.scaling[name], dropout_p))
        return summands

    def _summands(self) -> list[Summand]:
        """`_acting`; several without dropout as one adapter, with A above A, B beside B and the scaling in B."""
        summands = self._acting()
        if len(summands) < 2 or any(dropout_p > 0.0 for *_, dropout_p in summands):
            return summands
        above, beside = ([lora_A for lora_A, *_ in summands], [lora_B * scaling for _, lora_B, scaling, _ in summands])
        return [(torch.cat(above), torch.cat(beside, dim=1), 1.0, 0.0)]

    @property
    def merged(self) -> bool:
        """Whether the base weight holds weight + scaling * B A of the active adapters."""
        return self._pristine is not None

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
        names, base = self.active_adapters, self.base()
        if not names or self.merged:
            raise ValueError(
                f"merge() needs an active adapter that is not merged yet; got {self.active_adapter!r}, "
                f"{'merged' if self.merged else 'none active'}"
            )
        quantised = bases.of(base)
        if quantised is None:
            check_values("weight", base.weight)
        for name in names:
            check_values("lora_A", self.lora_A[name])
            check_values("lora_B", self.lora_B[name])
        updates = [(*self._factors(name), float(self.scaling[name])) for name in names]
        if quantised is None:
            merged, pristine = (
                nn.Parameter(merged_weight(base.weight, updates, names), requires_grad=False),
                base.weight,
            )
        else:
            merged, pristine = quantised.merged(summed(updates)), quantised.aside()
        # Past Module.__setattr__, which would register a second parameter.
        object.__setattr__(self, "_pristine", pristine)
        self._put(merged)

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
                if key.startswith((f"{prefix}lora_A.", f"{prefix}lora_B.")):
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

    def _adapters_repr(self) -> str:
        adapters = ", ".join(
            f"{name}(r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, lora_dropout={self.lora_dropout[name]}"
            f"{', use_rslora=True' if self.use_rslora[name] else ''})"
            for name in self.lora_A
        )
        return f"adapters=[{adapters}], active_adapter={self.active_adapter!r}, merged={self.merged}"


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
