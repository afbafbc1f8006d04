"""AdaptersByName: the adapters of a layer and which of them act."""

import math
from typing import Any

from torch import Tensor, nn

from fused_lora.config import unknown_name
from fused_lora.layer_config import LayerConfig
from fused_lora.nn.adapter_tensors import AdapterDropout, AdapterTensors, set_trainable
from fused_lora.ops.update import joined
from fused_lora.variants import AdapterVariant, LayerLink, LayerVariant
from fused_lora.variants.allora import ALLoRA, ScaledSteps
from fused_lora.variants.bias_of_b import BiasOfB
from fused_lora.variants.dora import DoRA

ActiveAdapter = str | list[str] | None
Summand = tuple[Tensor, Tensor, float | Tensor, float]  # A, B, scaling, dropout_p


def one_or_list(names: list[str]) -> ActiveAdapter:
    """The value of active_adapter for these names: a list only for two and more."""
    return names if len(names) > 1 else next(iter(names), None)


def as_list(active: ActiveAdapter) -> list[str]:
    """The names in a value of active_adapter."""
    return [active] if isinstance(active, str) else list(active or ())


class AdaptersByName(nn.Module):
    """A module with A, B and settings of LoRA adapters by name, of which none, one or several act."""

    file_keys = ("lora_A.weight", "lora_B.weight")  # of A and B in PEFT's file, after the layer's name

    def _start_empty(self) -> None:
        """No adapters yet."""
        self.lora_A, self.lora_B = AdapterTensors(), AdapterTensors()
        self.lora_magnitude_vector = AdapterTensors()  # [N], of DoRA adapters
        self.lora_bias = AdapterTensors()  # [N], of adapters whose B has a bias
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self.lora_dropout: dict[str, float] = {}
        self.lora_dropout_switch = AdapterDropout(self.lora_dropout)
        self.use_rslora: dict[str, bool] = {}
        self.dora_exact: dict[str, bool] = {}
        self.allora_eta: dict[str, float | None] = {}
        self.allora_mode: dict[str, str] = {}
        self.init_lora_weights: dict[str, bool | str] = {}  # PEFT's word for how each started
        self.trains_bias: dict[str, str] = {}  # PEFT's word for which biases of the model's train with each
        self.active_adapter: ActiveAdapter = None  # a list of two or more
        self.variants: dict[str, AdapterVariant] = {}  # of adapters that are no plain LoRA
        self.link: LayerLink | None = None  # what acts instead of the active adapter
        self.shows_plain = False  # inside `merged(model)`: state_dict() is the plain layer's, merged or not
        self._pristine: nn.Parameter | None = None  # the base weight while a merged one stands in its place
        self._pristine_bias: nn.Parameter | None = None  # the base bias, where that is merged, too

    def _variant(self) -> LayerVariant | None:
        """The variant that acts, if any."""
        if self.link is not None or not self.variants:
            return self.link
        return self.variants.get(self.active_adapter) if isinstance(self.active_adapter, str) else None

    @property
    def merged(self) -> bool:
        """Whether the base weight holds weight + scaling * B A of the active adapters."""
        return self._pristine is not None

    def _check_known(self, name: str | None) -> None:
        if name is None or name not in self.lora_A:
            raise unknown_name("adapter_name", name, self.lora_A)

    def set_hyperparameters(
        self,
        adapter_name: str,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        dora_exact: bool = False,
        allora_eta: float | None = None,
        allora_mode: str = "gradient",
    ) -> None:
        """Set what an adapter is but for its rank and whether it is DoRA, which its tensors say.

        Raises: ValueError for an unknown adapter or a value out of range.
        """
        self._check_known(adapter_name)
        use_dora, lora_bias = adapter_name in self.lora_magnitude_vector, adapter_name in self.lora_bias
        given = lora_alpha, lora_dropout, use_rslora, use_dora, dora_exact, allora_eta, allora_mode, lora_bias
        self._set_config(adapter_name, LayerConfig(self.r[adapter_name], *given))

    def _set_config(self, adapter_name: str, config: LayerConfig) -> None:
        self.r[adapter_name], self.lora_alpha[adapter_name] = config.r, config.lora_alpha
        self.lora_dropout[adapter_name] = float(config.lora_dropout)
        self.use_rslora[adapter_name], self.scaling[adapter_name] = config.use_rslora, config.scaling
        self.dora_exact[adapter_name] = config.dora_exact
        self.allora_eta[adapter_name], self.allora_mode[adapter_name] = config.allora_eta, config.allora_mode
        self.variants.pop(adapter_name, None)
        if config.use_dora:
            self.variants[adapter_name] = DoRA(adapter_name, config.dora_exact)
        elif config.allora_eta is not None and config.allora_mode == "update":
            self.variants[adapter_name] = ScaledSteps(adapter_name, config.allora_eta, self.lora_A, self.lora_B)
        elif config.allora_eta is not None:
            self.variants[adapter_name] = ALLoRA(adapter_name, config.allora_eta)
        elif config.lora_bias:
            self.variants[adapter_name] = BiasOfB(adapter_name)

    def config(self, adapter_name: str) -> LayerConfig:
        """What an adapter is in this layer."""
        name = adapter_name
        plain = self.r[name], self.lora_alpha[name], self.lora_dropout[name], self.use_rslora[name]
        use_dora, lora_bias = name in self.lora_magnitude_vector, name in self.lora_bias
        allora = self.allora_eta[name], self.allora_mode[name]
        return LayerConfig(*plain, use_dora, self.dora_exact[name], *allora, lora_bias)

    def named_tensors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's A and B, if it has a rank, the bias of B and DoRA's m, as far as it has them, by their keys in
        PEFT's file after the layer's name."""
        keys = (*self.file_keys, "lora_B.bias", "lora_magnitude_vector")
        held = dict(zip(keys, (self.lora_A, self.lora_B, self.lora_bias, self.lora_magnitude_vector), strict=True))
        ranked = self.r[adapter_name] > 0
        return {
            key: tensors[adapter_name]
            for key, tensors in held.items()
            if adapter_name in tensors and (ranked or key == "lora_magnitude_vector")
        }

    def own_tensors(self, adapter_name: str) -> list[nn.Parameter]:
        """An adapter's A, B, bias of B and m, as far as it has them."""
        return list(self.named_tensors(adapter_name).values())

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """An adapter's A and B for a forward, brought here where they are offloaded; zeros of rank 1 where its rank is
        0, since the op wants a rank."""
        modules: Any = self._modules  # past Module.__getattr__
        lora_A, lora_B = modules["lora_A"][adapter_name], modules["lora_B"][adapter_name]
        if lora_A.is_meta:  # offloaded, or a model without values
            lora_A, lora_B = self.lora_A(adapter_name), self.lora_B(adapter_name)
        if lora_A.shape[0] == 0:
            return lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], 1)
        return lora_A, lora_B

    def magnitude(self, adapter_name: str) -> Tensor:
        """A DoRA adapter's m [N] for a forward, brought here where it is offloaded."""
        magnitudes: Any = self._modules["lora_magnitude_vector"]
        m = magnitudes[adapter_name]
        return self.lora_magnitude_vector(adapter_name) if m.is_meta else m

    def out_bias(self) -> Tensor | None:
        """What the biases of B of the active adapters add, [N], brought here where they are offloaded; None for
        nothing."""
        total: Tensor | None = None
        for name in self.active_adapters:
            if name in self.lora_bias:
                own = self.lora_bias[name]
                term = (self.lora_bias(name) if own.is_meta else own) * self.scaling[name]
                total = term if total is None else total + term
        return total

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, it is so no more. Raises: ValueError if it is unknown or merged."""
        self._check_known(adapter_name)
        active = self.active_adapters
        if adapter_name in active:
            self.set_adapter([name for name in active if name != adapter_name])
        for tensors in (self.lora_A, self.lora_B, self.lora_bias, self.lora_magnitude_vector):
            if adapter_name in tensors:
                del tensors[adapter_name]
        for values in (
            self.r,
            self.lora_alpha,
            self.scaling,
            self.lora_dropout,
            self.use_rslora,
            self.dora_exact,
            self.allora_eta,
            self.allora_mode,
            self.init_lora_weights,
            self.trains_bias,
        ):
            values.pop(adapter_name, None)  # one that is only half made has not all
        self.variants.pop(adapter_name, None)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, in the order in which they were set."""
        return as_list(self.active_adapter)

    def set_adapter(self, adapter_name: ActiveAdapter) -> None:
        """Make one adapter, or those of a list, active and the only trainable ones; None is the base layer alone. One
        that is named twice counts twice.

        Raises: ValueError if an adapter is unknown or ALLoRA among several, or others are merged into the weight.
        """
        self.check_settable(adapter_name)
        names = as_list(adapter_name)
        for name in self.lora_A:
            for tensor in self.own_tensors(name):
                set_trainable(tensor, name in names)
        self.active_adapter = one_or_list(names)

    def check_settable(self, adapter_name: ActiveAdapter) -> None:
        """Raises ValueError if `set_adapter` would refuse these adapters."""
        names = as_list(adapter_name)
        for name in names:
            self._check_known(name)
            if len(names) > 1 and self.allora_eta[name] is not None:
                raise ValueError(f"ALLoRA adapter {name!r} must act alone; got {names}")
        if self.merged and names != self.active_adapters:
            raise ValueError(
                f"adapter {self.active_adapter!r} is merged, unmerge() before switching; got {adapter_name!r}"
            )

    def _check_resettable(self, adapter_name: str) -> None:
        self._check_known(adapter_name)
        if self.merged and adapter_name in self.active_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged, unmerge() before resetting it")

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start an adapter afresh: A from U(-1/sqrt(K), 1/sqrt(K)) with K inputs to an element of h, B zero. Raises:
        ValueError if it is unknown or merged."""
        self._check_resettable(adapter_name)
        if self.r[adapter_name] == 0:
            return
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name])
        if adapter_name in self.lora_bias:
            nn.init.zeros_(self.lora_bias[adapter_name])

    def acting_dropout(self, adapter_name: str) -> float:
        """An adapter's dropout now: 0 unless the layer's nn.Dropout, `lora_dropout_switch`, is in training mode."""
        dropout_p, modules = self.lora_dropout[adapter_name], self._modules
        return dropout_p if dropout_p and modules["lora_dropout_switch"].training else 0.0  # type: ignore[union-attr]

    def _acting(self) -> list[Summand]:
        """A, B, scaling and dropout of the active adapters."""
        summands: list[Summand] = []
        for name in self.active_adapters:
            summands.append((*self.factors(name), self.scaling[name], self.acting_dropout(name)))
        return summands

    def _summands(self) -> list[Summand]:
        """`_acting`; several without dropout as one adapter."""
        summands = self._acting()
        if len(summands) < 2 or any(dropout_p > 0.0 for *_, dropout_p in summands):
            return summands
        lora_As, lora_Bs, scalings, _ = zip(*summands)
        return [(*joined(lora_As, lora_Bs, scalings), 1.0, 0.0)]

    def _adapters_repr(self) -> str:
        adapters = ", ".join(f"{name}({self._adapter_repr(name)})" for name in self.lora_A)
        return f"adapters=[{adapters}], active_adapter={self.active_adapter!r}, merged={self.merged}"

    def _adapter_repr(self, name: str) -> str:
        said = f"r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, lora_dropout={self.lora_dropout[name]}"
        said += ", use_rslora=True" if self.use_rslora[name] else ""
        said += ", use_dora=True" if name in self.lora_magnitude_vector else ""
        said += ", lora_bias=True" if name in self.lora_bias else ""
        said += ", dora_exact=True" if self.dora_exact[name] else ""
        said += "" if self.allora_eta[name] is None else f", allora_eta={self.allora_eta[name]}"
        return f"{said}, allora_mode='update'" if self.allora_mode[name] == "update" else said
