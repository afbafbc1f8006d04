"""The tensors of a layer's adapters, by the adapters' names."""

from torch import Tensor, nn


class AdapterTensors(nn.ParameterDict):
    """The A or the B of every adapter of a layer. Where something brings tensors from elsewhere when a module is
    called, as accelerate's offloading does, a call fetches one."""

    def __call__(self, adapter_name: str) -> nn.Parameter:
        return nn.Module.__call__(self, adapter_name)  # ParameterDict's own refuses

    def forward(self, adapter_name: str) -> nn.Parameter:
        return self[adapter_name]


def set_trainable(parameter: Tensor, trains: bool) -> None:
    """requires_grad_ where it changes something: the views that FSDP1 puts in place of a parameter refuse the call."""
    if parameter.requires_grad != trains:
        parameter.requires_grad_(trains)
