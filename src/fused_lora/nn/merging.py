"""MergeableLayer: adapters folded into a layer's base weight, and out of it again."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora import bases
from fused_lora.nn.by_name import AdaptersByName
from fused_lora.nn.merged_weight import MergedUpdate, check_values, merged_weight, summed


class MergeableLayer(AdaptersByName):
    """A layer whose active adapters can be part of its base weight for a while.

    While merged its `state_dict()` is the plain layer's (merged weight, no adapters), so that saving a merged model
    writes a plain one.
    """

    def base(self) -> Any:
        """The module that has the base weight: the base layer where it is kept, else this one."""
        return self.base_layer if "base_layer" in self._modules else self

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, in the shape of the base weight, the adapter adds to it, but for the scaling."""
        raise NotImplementedError

    def merge(self) -> None:
        """Fold the active adapters into the weight: the plain layer's cost per call and no LoRA gradients until
        `unmerge`. A bias of B becomes part of the base's.

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
        biases = self._merged_and_pristine_bias()
        # Past Module.__setattr__, which would register a second parameter.
        object.__setattr__(self, "_pristine", pristine)
        self._put(merged)
        if biases is not None:
            self.base().bias, pristine = biases
            object.__setattr__(self, "_pristine_bias", pristine)

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
            if name in self.lora_bias and self.base().bias is None:
                raise ValueError(f"adapter {name!r} has lora_bias, which only a base with a bias can take up; got none")
        if all(any(name in held for name in adapter_names) for held in (self.lora_bias, self.lora_magnitude_vector)):
            raise ValueError(f"lora_bias and DoRA exclude each other in one merge; got adapters {adapter_names}")
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

    @torch.no_grad()
    def _merged_and_pristine_bias(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The base bias with those of the active adapters in it, and as it is; None where they have none."""
        more = self.out_bias()
        if more is None:
            return None
        bias = self.base().bias
        merged = (bias + more).to(bias.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the bias merged with adapters {self.active_adapters} must be finite; got others")
        return nn.Parameter(merged, requires_grad=False), bias

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
        if self._pristine_bias is not None:
            self.base().bias, self._pristine_bias = self._pristine_bias, None

    def _put(self, weight: nn.Parameter) -> None:
        """Let a weight be the base's."""
        base = self.base()
        quantised = bases.of(base)
        if quantised is None:
            base.weight = weight
        else:
            quantised.put(weight)

    def _apply(self, fn, recurse=True):
        """Module.to(), .half() and the like reach what is kept aside too."""
        super()._apply(fn, recurse)
        for variant in self.variants.values():
            variant.forget()
        for name in ("_pristine", "_pristine_bias"):
            if getattr(self, name) is not None:
                aside: Any = nn.Module()
                aside.weight = getattr(self, name)
                object.__setattr__(self, name, aside._apply(fn).weight)
        return self

    def state_dict(self, *args, prefix="", **kwargs):
        """As Module.state_dict; while merged, that of the plain layer with the merged weight."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.merged or self.shows_plain:
            inner = f"{prefix}base_layer."
            for key in list(state):
                if key.startswith(tuple(f"{prefix}lora_{what}." for what in ("A", "B", "bias", "magnitude_vector"))):
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
        self._take_peft_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_peft_names(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Rename what the state dict of a model with PEFT's layers calls otherwise."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = re.sub(r"^(lora_\w+\.[^.]+)\.weight$", r"\1", key.removeprefix(prefix))
            name = re.sub(r"^lora_B\.([^.]+)\.bias$", r"lora_bias.\1", name)
            name = re.sub(r"^lora_embedding_([AB]\.)", r"lora_\1", name)
            if "base_layer" not in self._modules:
                name = name.removeprefix("base_layer.")
            if prefix + name != key:
                state_dict[prefix + name] = state_dict.pop(key)
