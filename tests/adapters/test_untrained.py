"""The warning of adapters that no gradient reached: by name, once, after the first optimizer step, and no other."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from fused_lora.adapters import apply_lora, set_adapter
from fused_lora.adapters.untrained import _hooks, _watched

WORDS = "no gradient reached the adapters of"


class Two(nn.Module):
    """Calls its second layer only where asked."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, second=False):
        y = self.first(x)
        return self.second(y) if second else y


def train(model, optimizer, *batches):
    for second in batches:
        model(torch.ones(2, 4), second=second).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


@pytest.fixture(autouse=True)
def silent():
    """Any warning that a test does not expect fails it; models of earlier tests are gone."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WORDS)
        yield


def test_once_and_by_name():
    model = apply_lora(Two())
    optimizer = sgd(model)
    assert model in _watched and _hooks
    with pytest.warns(UserWarning, match=f"{WORDS} second before the first optimizer step"):
        train(model, optimizer, False, False)
    assert model not in _watched
    train(model, optimizer, False)


def test_hooks_of_others_on_all_optimizers_run_after_it():
    _watched.clear()
    model, stepped = apply_lora(Two()), []
    handle = optimizers.register_optimizer_step_post_hook(lambda optimizer, *args: stepped.append(optimizer))
    optimizer = sgd(model)
    try:
        train(model, optimizer, True)
        train(model, optimizer, True)
    finally:
        handle.remove()
    assert not _watched and stepped == [optimizer] * 2


def test_one_microbatch_of_several_is_enough():
    model = apply_lora(Two())
    train(model, sgd(model), False, True, False)


def test_frozen_and_inactive_adapters_are_not_meant():
    model = apply_lora(apply_lora(Two()), target_modules=["first"], adapter_name="other")
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], 0.1)
    train(model, optimizer, False)
    model = apply_lora(Two())
    optimizer = sgd(model)
    model.second.lora_B["default"].requires_grad_(False)
    train(model, optimizer, False)


def test_a_switch_before_the_first_step_counts():
    model = apply_lora(apply_lora(Two()), adapter_name="other")
    set_adapter(model, "default")
    with pytest.warns(UserWarning, match=f"{WORDS} second before"):
        train(model, sgd(model), False)


def test_other_models_optimizers_change_nothing():
    model, other = apply_lora(Two()), Two()
    optimizer = torch.optim.Adam(other.parameters())
    train(other, optimizer, True)
    train(other, optimizer, True)
    assert model in _watched
    twin = copy.deepcopy(model)
    train(twin, sgd(twin), False)  # a copy is another model
    with pytest.warns(UserWarning, match=WORDS):
        train(model, sgd(model), False)


def test_many_names_are_counted():
    model = apply_lora(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))))
    optimizer = sgd(model)
    model[0](torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=f"{WORDS} 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"):
        optimizer.step()
