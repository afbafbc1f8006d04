"""A PEFT model and its fused twin, and how far they may differ."""

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import TOKENS, llama, randomise
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fused_lora.peft import fuse
from fused_lora.testing import WHOLE_MODEL

K, N = 32, 24  # of `Root`


def gpt2(dtype=torch.float32) -> GPT2LMHeadModel:
    """A tiny model of Conv1D layers, all with biases."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def peft_model(base=llama, dtype=torch.float32, autocast_adapter_dtype=True, **lora) -> nn.Module:
    """The base with an adapter that looks trained."""
    config = LoraConfig(**dict(r=4, lora_alpha=8, target_modules="all-linear") | lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return randomise(model).eval()


def fused_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    fuse(twin)
    return twin


def step(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    """The logits and every gradient."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach()} | grads


def assert_like_peft(got: dict, peer: dict, exact: dict | None = None, dtype=torch.float32) -> None:
    """Each tensor is as near to the truth as PEFT's own, up to a factor of 2 and the rounding of `dtype`, or of
    WHOLE_MODEL for a `step`.

    Without `exact` PEFT's is the truth, and 50 roundings are allowed, for a `step` 1000 (of fp32 up to 270 were seen).
    """
    factor, roundings = (WHOLE_MODEL, 1000) if "logits" in got else (2.0, 50)
    eps = torch.finfo(dtype).eps
    assert got.keys() == peer.keys()
    for name, t in got.items():
        assert t.dtype == peer[name].dtype and t.shape == peer[name].shape, name
        want = peer[name].double() if exact is None else exact[name].double()
        largest = want.abs().max().item()
        limit = roundings * eps * largest
        if exact is not None:
            limit = factor * (peer[name].double() - want).abs().max().item() + 2 * eps * largest
        error = (t.double() - want).abs().max().item()
        assert error <= limit, f"{name}: {error:.2e} over {limit:.2e}"


def assert_trains_like_peft(model: nn.Module, stock: nn.Module) -> None:
    """The same outputs and gradients after two steps of an optimizer."""
    for each in (model, stock):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            step(each)
            optimizer.step()
    assert_like_peft(step(model), step(stock))


class Root(nn.Module):
    """A model of one linear layer, `proj`."""

    def __init__(self, proj=None, bias=True):
        super().__init__()
        self.proj = nn.Linear(K, N, bias) if proj is None else proj

    def forward(self, x):
        return self.proj(x)


def peft_layer(root=None, **lora):
    """The root with an adapter that looks trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["proj"]) | lora)
        model = get_peft_model(Root() if root is None else root, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def layer_of(model):
    return model.base_model.model.proj


def outcome(model, dtype=torch.float32):
    """y, dx and every gradient of a call, or the error's type and words."""
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    model.zero_grad()
    try:
        y = model(x)
    except RuntimeError as error:
        return str(error)
    if y.requires_grad:
        y.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | ({} if x.grad is None else {"dx": x.grad}) | grads
