"""A model with a layer of every kind that adapters sit in, under our adapters or PEFT's."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import apply_lora


class Mixed(nn.Module):
    """A layer of every kind that adapters sit in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens):  # [B, T]
        x = self.linear(self.embed(tokens))  # [B, T, 6]
        return self.head(x), self.conv(x[..., :4].mT)


def peft_mixed(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = dict(r=4, lora_alpha=6, target_modules=["embed", "linear", "conv"], modules_to_save=["head"])
        return get_peft_model(Mixed(), LoraConfig(**config | options))


def ours_mixed(**options):
    model = Mixed()
    config = dict(r=4, lora_alpha=6, target_modules=["embed", "linear", "conv"], modules_to_save=["head"])
    apply_lora(model, **config | options)
    return model
