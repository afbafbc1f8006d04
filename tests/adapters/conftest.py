"""What a refused call may not change, shared by the tests of adapters."""

import pytest
import torch
from torch import nn


def _state(model: nn.Module) -> dict:
    """Everything that a refused call may not change."""
    tensors = {
        name: (t.data_ptr(), t.detach().clone().view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {
        "tensors": tensors,
        "flags": flags,
        "modules": [(name, id(m), repr(m)) for name, m in model.named_modules()],
    }


class Refuses:
    """`with refuses(model, message)`: the block raises ValueError with the message and leaves the model as it was."""

    def __init__(self, model: nn.Module, message: str, kind=ValueError):
        self.model, self.before, self.context = model, _state(model), pytest.raises(kind, match=message)

    def __enter__(self):
        return self.context.__enter__()

    def __exit__(self, *error):
        raised = self.context.__exit__(*error)
        assert _state(self.model) == self.before
        return raised


@pytest.fixture
def state():
    """Everything of a model that a refused call may not change."""
    return _state


@pytest.fixture
def refuses():
    """`with refuses(model, message)`: see Refuses."""
    return Refuses
