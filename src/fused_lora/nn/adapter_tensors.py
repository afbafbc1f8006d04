"""The tensors and the dropout of a layer's adapters, by the adapters' names."""

from torch import Tensor, nn


class AdapterTensors(nn.ParameterDict):
    """The A or the B of every adapter of a layer. Where something brings tensors from elsewhere when a module is
    called, as accelerate's offloading does, a call fetches one; DeepSpeed's ZeRO-3, when an item of `_parameters` is
    taken."""

    def __getitem__(self, adapter_name: str) -> nn.Parameter:
        try:  # past ParameterDict's own, which costs a small layer a microsecond
            return self._parameters[adapter_name]  # type: ignore[return-value]
        except KeyError:  # FSDP1 or pruning has put something else in a parameter's place, pruning's hook before a call
            return self(adapter_name)

    def __call__(self, adapter_name: str) -> nn.Parameter:
        return nn.Module.__call__(self, adapter_name)  # ParameterDict's own refuses

    def forward(self, adapter_name: str) -> nn.Parameter:
        return super().__getitem__(adapter_name)


class AdapterDropout(nn.Dropout):
    """The switch of a layer's dropout, which acts in its training mode. What changes dropout in a whole model by
    setting `p` of every nn.Dropout, as TRL's DPO turns it off, so changes that of all adapters of the layer.

    Args:
        rates: the layer's own dropout by adapter.
    """

    def __init__(self, rates: dict[str, float]):
        nn.Module.__init__(self)
        self.rates, self.inplace = rates, False

    @property
    def p(self) -> float:
        return max(self.rates.values(), default=0.0)

    @p.setter
    def p(self, rate: float) -> None:
        self.rates.update(dict.fromkeys(self.rates, rate))


def set_trainable(parameter: Tensor, trains: bool) -> None:
    """requires_grad_ where it changes something: the views that FSDP1 puts in place of a parameter refuse the call."""
    if parameter.requires_grad != trains:
        parameter.requires_grad_(trains)
