"""Models of diffusers with PEFT's adapters: fused they compute what they compute without, whatever scales and switches
them; adapters of this library, which these switches would pass by, are refused."""

import copy

import pytest
import torch
from peft import LoraConfig

from fused_lora import apply_lora
from fused_lora.peft import fuse
from fused_lora.testing import WHOLE_MODEL, assert_close

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def adapted(names=("default",), **lora):
    model = unet()
    for name in names:
        config = LoraConfig(**dict(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False) | lora)
        model.add_adapter(config, adapter_name=name)
    return model


def step(model, dtype=torch.float32, scale=None):
    """The sample and every gradient."""
    g = torch.Generator().manual_seed(1)
    model = model.to(dtype)
    sample, text = (torch.randn(*shape, generator=g).to(dtype) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    given = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    model.zero_grad()
    y = model(sample, torch.tensor([3, 7]), encoder_hidden_states=text, **given).sample
    if y.requires_grad:
        y.square().mean().backward()
    return {"sample": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def switched_off(model):
    model.disable_lora()


def weighted(model):
    model.set_adapters(["a", "b"], [0.7, {"down": 0.5, "mid": 0.2, "up": 0.9}])


CASES = {
    "plain": (dict(), None, None),
    "a scale": (dict(), None, 0.5),
    "no scale": (dict(), None, 0.0),
    "DoRA": (dict(use_dora=True), None, 0.5),
    "convolutions, too": (dict(target_modules=[*TARGETS, "conv1", "proj_in"]), None, 0.5),
    "two, weighted": (dict(names=("a", "b")), weighted, None),
    "switched off": (dict(), switched_off, None),
    "checkpointing": (dict(), lambda model: model.enable_gradient_checkpointing(), None),
    "merged": (dict(), lambda model: model.fuse_lora(), None),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_as_without(case):
    lora, change, scale = CASES[case]
    stock = adapted(**lora).train()
    twin = copy.deepcopy(stock)
    ways = {row.way for row in fuse(twin)}
    assert "fused" in ways
    for model in (stock, twin):
        if change is not None:
            change(model)
    got, peer, exact = step(twin, scale=scale), step(stock, scale=scale), step(stock, torch.float64, scale)
    assert len(got) > 1 or case in ("switched off", "merged")
    assert_close(got, peer, exact, WHOLE_MODEL)


def test_adapters_of_ours_are_refused():
    """Also in a model around it."""
    model = unet()
    for each in (model, torch.nn.ModuleDict({"unet": model})):
        with pytest.raises(ValueError, match=r"must leave out models of diffusers.*got .* in a UNet2DCond"):
            apply_lora(each, r=4, target_modules=TARGETS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    both = torch.nn.ModuleDict({"unet": model, "text": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})})
    assert apply_lora(both, r=2, target_modules=["q_proj"])["text"]["q_proj"].r == {"default": 2}
