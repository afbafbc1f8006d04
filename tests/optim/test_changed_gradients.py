"""Riemannian preconditioning and LoRA-FA, against formulas and PEFT."""

import copy

import pytest
import torch
from pair_problems import Net, train
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer as pefts_lorafa
from peft.optimizers import create_riemannian_optimizer as pefts_riemannian
from peft_twins import Root, peft_layer
from torch import nn

from fused_lora import apply_lora
from fused_lora.optim import create_lorafa_optimizer, create_riemannian_optimizer


def losses(model, optimizer, steps=8):
    found = []
    for i in range(steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :24].cos()).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_is_pefts(cls):
    model = peft_layer()
    twin = copy.deepcopy(model)
    ours = losses(model, create_riemannian_optimizer(model, cls, lr=1e-2))
    theirs = losses(twin, pefts_riemannian(twin, cls, lr=1e-2))
    assert torch.allclose(ours, theirs, rtol=1e-4)
    assert not torch.allclose(ours, losses(peft_layer(), cls(peft_layer().parameters(), lr=1e-2)), rtol=1e-2)


def test_riemannian_gradients_are_the_formula():
    model = Net()
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.0, reg=0.3)
    nn.init.normal_(model.first.lora_B["default"])
    A, B = model.first.lora_A["default"], model.first.lora_B["default"]
    model(torch.randn(5, 8)).square().sum().backward()
    g_A, g_B, head = A.grad.clone(), B.grad.clone(), model.head.weight.grad.clone()
    optimizer.step()
    eye = 0.3 * torch.eye(3)
    assert torch.allclose(A.grad, torch.linalg.inv(B.T @ B + eye) @ g_A, rtol=1e-4, atol=1e-5)
    assert torch.allclose(B.grad, g_B @ torch.linalg.inv(A @ A.T + eye), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.head.weight.grad, head)


def test_lora_fa_freezes_A_and_takes_the_nearest_step_of_B():
    """With B alone moving, s B.grad A is the full gradient's projection on the rows of A."""
    model = Net(torch.float64, torch.float64)
    A, B, s = (getattr(model.first, name)["default"] for name in ("lora_A", "lora_B", "scaling"))
    optimizer = create_lorafa_optimizer(model, lr=1e-3)
    assert not A.requires_grad and B.requires_grad and model.head.weight.requires_grad
    G = torch.randn(10, 8, dtype=torch.float64)
    B.grad = s * G @ A.T
    optimizer.step()
    assert torch.allclose(s * B.grad @ A, G @ torch.linalg.pinv(A) @ A)


def test_lora_fa_is_pefts():
    """PEFT's projection is rounded to bf16, and its eps stands beside an uncorrected root, which counts for nothing
    here."""
    model = peft_layer()
    twin = copy.deepcopy(model)
    ours = losses(model, create_lorafa_optimizer(model, lr=1e-2))
    theirs = losses(twin, pefts_lorafa(twin, r=4, lora_alpha=6, lr=1e-2))
    assert torch.allclose(ours, theirs, rtol=2e-2)
    assert ours[-1] < 0.9 * ours[0]


def test_lora_fa_resumes_with_A_frozen_before():
    model = Net()
    create_lorafa_optimizer(model, lr=1e-2)
    train(model, create_lorafa_optimizer(model, lr=1e-2), 2)
    assert model.first.lora_B["default"].abs().max() > 0


def test_a_closure_is_refused():
    model = Net()
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="step\\(\\) must have no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="step\\(\\) must have no closure"):
        optimizer.step(closure=lambda: 0.0)
    optimizer.step(None)


def test_bad_input():
    with pytest.raises(ValueError, match="reg must be > 0; got 0.0"):
        create_riemannian_optimizer(Net(), torch.optim.SGD, lr=0.1, reg=0.0)
    for create in (lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=0.1), create_lorafa_optimizer):
        with pytest.raises(ValueError, match="model must have LoRA pairs"):
            create(Root())
    model = get_peft_model(Root(), PeftConfig(r=4, lora_alpha=0, target_modules=["proj"]))
    with pytest.raises(ValueError, match="proj: scaling must not be 0"):
        create_lorafa_optimizer(model)
    assert model.base_model.model.proj.lora_A["default"].weight.requires_grad
    model, given = Net(), dict(lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    lora_A = [p for name, p in model.named_parameters() if "lora_A" in name]
    for p in lora_A:
        p.grad = torch.ones_like(p)
    for name, value in dict(lr=-1.0, betas=(1.0, 0.9), eps=-1.0, weight_decay=-1.0).items():
        with pytest.raises(ValueError, match="[Ii]nvalid"):
            create_lorafa_optimizer(model, **given | {name: value})
        assert lora_A and all(p.requires_grad and p.grad is not None for p in lora_A)


def test_lora_fa_leaves_embeddings_to_adamw():
    """Their A begins at zero: frozen, nothing would ever train there, as nothing does in PEFT's but for that."""
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6)), 2, target_modules=["0", "1"])
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    embedding, linear = model[0], model[1]
    assert embedding.lora_A["default"].requires_grad and not linear.lora_A["default"].requires_grad
    before = [t.detach().clone() for t in (embedding.lora_A["default"], embedding.lora_B["default"])]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(embedding.lora_A["default"], before[0])
    assert not torch.equal(embedding.lora_B["default"], before[1])
    alone = apply_lora(nn.Sequential(nn.Embedding(9, 6)), 2, target_modules=["0"])
    with pytest.raises(ValueError, match="model must have LoRA pairs whose B trains; got none"):
        create_lorafa_optimizer(alone)
