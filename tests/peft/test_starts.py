"""PEFT's starts that need data or gradients, with fused layers: the adapter trains as stock PEFT's."""

import copy
import warnings

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft_twins import assert_trains_like_peft
from tiny_llama import TOKENS, llama

from fused_lora import apply_lora
from fused_lora.peft import fuse, unfuse

TARGETS = dict(r=4, target_modules=["q_proj", "down_proj"])


def corda(base):
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"), **TARGETS)
    preprocess_corda(base, config, run_model=lambda: base(TOKENS[:1]))
    return get_peft_model(base, config)


def lora_ga(base):
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **TARGETS)
    preprocess_loraga(base, config, lambda: base(TOKENS, labels=TOKENS).loss.backward())
    return get_peft_model(base, config)


def eva(base):
    """Its hooks sit on the adapted layers, fused ones here."""
    model = get_peft_model(base, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **TARGETS))
    fuse(model, strict=True)
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model


@pytest.mark.parametrize("start", [corda, lora_ga, eva])
def test_a_start_that_asks_the_model(start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = start(llama(hidden=32)).eval()
    stock = copy.deepcopy(model)
    unfuse(stock)
    assert not fuse(model, strict=True).of("peft")
    assert_trains_like_peft(model, stock)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "eva", "loftq"])
def test_apply_lora_names_the_way(start):
    with pytest.raises(ValueError, match=rf"got '{start}', which needs .*: let PEFT make the adapter, and fuse it"):
        apply_lora(llama(hidden=16), 4, init_lora_weights=start)
