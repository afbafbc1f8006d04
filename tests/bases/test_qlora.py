"""QLoRA trains on the packaged model: the first layers of SmolLM2 over NF4 and int8, beside stock PEFT."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from fused_lora import apply_lora
from fused_lora.data import split, stdlib_documents, to_blocks
from fused_lora.models import load_model, packaged_model

LAYERS, STEPS, TOKENS = 4, 8, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def first_layers():
    """The first layers of SmolLM2 with its embedding and head in bf16, and blocks of Python's own texts."""
    model, tokenizer = load_model(packaged_model(), torch.bfloat16, "cpu")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    blocks = to_blocks(split(stdlib_documents())[0][:4], tokenizer, TOKENS)
    return model.requires_grad_(False), blocks[:STEPS, :TOKENS]


def by_bitsandbytes(model):
    """Every linear layer of the decoder in NF4 with nested scales, QLoRA's format."""
    import bitsandbytes as bnb

    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                how = dict(quant_type="nf4", compress_statistics=True)
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, **how
                )
                layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **how)
                setattr(parent, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # what PEFT asks


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())


def trained(model, blocks) -> list[float]:
    """The losses of a few steps from one start, whatever the adapters' names: A by the layers' order, B zero."""
    g = torch.Generator().manual_seed(0)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 2 * LAYERS * len(TARGETS)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5 if "lora_A" in name else p.data.zero_()
    optimizer, losses = torch.optim.AdamW(adapters, lr=2e-3), []
    for block in blocks:
        logits = model(block[None]).logits
        loss = F.cross_entropy(logits[0, :-1].float(), block[1:])
        loss.backward()
        assert all(p.grad.isfinite().all() for p in adapters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    return losses


@pytest.mark.parametrize("quantise", [by_bitsandbytes, by_torchao])
def test_the_loss_curve_is_that_of_peft(first_layers, quantise, one_thread):
    """As near to PEFT's over the same quantised weights as bf16 lets two ways of rounding be."""
    from peft import LoraConfig, get_peft_model

    model, blocks = first_layers
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (ours, theirs):
            quantise(each)
        apply_lora(ours, 8, 16, target_modules=TARGETS)
        theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    mine, other = trained(ours.train(), blocks), trained(theirs.train(), blocks)
    print(mine, other)
    assert min(mine[-3:]) < mine[0]
    torch.testing.assert_close(mine, other, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
