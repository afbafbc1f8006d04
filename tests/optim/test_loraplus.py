"""LoRA+: who is in which group, what a ratio does, and the invariance that it moves along."""

import pytest
import torch
from mixed_layers import Mixed, ours_mixed, peft_mixed
from pair_problems import Net, train
from peft.optimizers import create_loraplus_optimizer as pefts
from peft_twins import Root, peft_layer
from torch import nn

from fused_lora import LoRALinear
from fused_lora.optim import LoRARite, create_loraplus_optimizer, lora_param_groups


def by_name(model, groups):
    """Learning rate and weight decay of each parameter that trains, which is in one group alone."""
    held = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(i for i, *_ in held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {i: rest for i, *rest in held}
    return {name: tuple(rates[id(p)]) for name, p in model.named_parameters() if id(p) in rates}


@pytest.mark.parametrize("make", [ours_mixed, peft_mixed])
def test_all_that_trains_is_in_one_group_with_its_rate(make):
    model = make()
    for name, p in model.named_parameters():
        if name.endswith(("linear.bias", "linear.base_layer.bias")):
            p.requires_grad_(True)
    groups = lora_param_groups(model, 1e-3, 16, weight_decay=0.1, lr_embedding=1e-5)
    for name, got in by_name(model, groups).items():
        want = (1e-3, 0.1)
        if "embed" in name:
            want = (1e-5, 0.1)
        elif "lora_B" in name:
            want = (16e-3, 0.1)
        elif name.endswith("bias"):
            want = (16e-3, 0.0)
        assert got == want, name
    assert all(group["initial_lr"] == group["lr"] for group in groups)


@pytest.mark.parametrize(
    "make, targets", [(ours_mixed, ["linear"]), (peft_mixed, ["linear", "embed"]), (None, ["conv"])]
)
def test_doras_magnitudes_learn_as_A_and_do_not_decay(make, targets):
    """Of convolutions they have three dimensions."""
    model = make(use_dora=True, target_modules=targets) if make else peft_layer(Root(nn.Conv1d(4, 6, 3)), use_dora=True)
    rates = by_name(model, lora_param_groups(model, 1e-3, 16, weight_decay=0.1))
    names = [name for name in rates if "magnitude" in name]
    assert len(names) == len(targets) and all(rates[name] == (1e-3, 0.0) for name in names)
    rates = by_name(model, LoRARite(model, lr=1e-3, weight_decay=0.1).param_groups)
    assert all(rates[name] == (1e-3, 0.0) for name in names)


def test_the_groups_of_peft_but_for_weight_decay_and_magnitudes():
    model = peft_mixed()
    theirs = pefts(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1)
    ours = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, weight_decay=0.1)
    assert by_name(model, ours.param_groups) == by_name(model, theirs.param_groups)


def test_a_ratio_of_one_is_the_plain_optimizer_bit_for_bit():
    model, twin = Net(), Net()
    train(model, create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=1, betas=(0.8, 0.9)), 6)
    trainable = [p for p in twin.parameters() if p.requires_grad]
    train(twin, torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.9)), 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_weight_decay_acts_on_matrices():
    model = Net()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2, weight_decay=0.5)
    nn.init.ones_(model.first.lora_B["default"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1.0
        if p.requires_grad and p.dim() > 1:
            kept = 0.9 if "lora_B" in name else 0.95
        assert torch.allclose(p, kept * before[name]), name


def test_the_losses_do_not_change_along_the_invariance():
    """Adam without eps: alpha / (p q), A's start and rate times p, B's rate times q."""

    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def losses(p, q, lora_alpha):
        torch.manual_seed(0)
        layer = LoRALinear(8, 6, r=2, lora_alpha=lora_alpha, dtype=torch.float64)
        with torch.no_grad():
            layer.lora_A["default"].mul_(p)
        rates = dict(lr=1e-2 * p, loraplus_lr_ratio=q / p)
        optimizer = create_loraplus_optimizer(layer, torch.optim.Adam, eps=1e-300, **rates)  # 0 / 1e-300 is 0
        found = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = (layer(x) - x[:, :6].cos()).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    reference = losses(1, 1, 4)
    assert reference[-1] < 0.9 * reference[0]
    for p, q in ((4.0, 1.0), (1.0, 16.0), (0.5, 8.0)):
        assert torch.allclose(losses(p, q, 4 / (p * q)), reference, rtol=1e-6, atol=0)
        assert not torch.allclose(losses(p, q, 4), reference, rtol=1e-3, atol=0)


def test_a_schedule_may_start_in_the_middle():
    """`last_epoch` needs each group's initial_lr."""
    optimizer = create_loraplus_optimizer(Net(), torch.optim.AdamW, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1), last_epoch=2)
    assert schedule.get_last_lr() == pytest.approx([1e-2 / 4, 16e-2 / 4, 16e-2 / 4])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": -1.0}, "lr must be >= 0; got -1.0"),
        ({"loraplus_lr_ratio": 0.0}, "ratio must be > 0; got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"lr_embedding": -1.0}, "lr_embedding must be >= 0"),
    ],
)
def test_bad_input(change, says):
    with pytest.raises(ValueError, match=says):
        create_loraplus_optimizer(Net(), torch.optim.AdamW, **{"lr": 1e-2, **change})


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="model must have LoRA adapters that train; got none"):
        lora_param_groups(Mixed(), 1e-3)


def test_peft_s_names_serve_too():
    model, AdamW = ours_mixed(), torch.optim.AdamW
    theirs = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5)
    ours = create_loraplus_optimizer(model, AdamW, lr=1e-3, weight_decay=0.1, lr_embedding=1e-5)
    found = by_name(model, theirs.param_groups)
    assert found == by_name(model, ours.param_groups) and (1e-5, 0.1) in found.values()
