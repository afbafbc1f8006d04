"""It trains: under checkpointing, offloaded activations, torch.compile, accumulation, autocast and dropout B leaves
zero, gradients are finite and the loss curve is that of stock PEFT. Every two settings meet in some row."""

import contextlib
from functools import cache
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import apply_lora

peft = pytest.importorskip("peft", reason="needs peft, to compare with")
IDS = torch.randint(0, 128, (12, 16), generator=torch.Generator().manual_seed(3))
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case(NamedTuple):
    """How a run trains. checkpointing: no, reentrant or not."""

    checkpointing: str = "no"
    offload: bool = False
    compiled: bool = False
    accumulation: int = 1
    autocast: bool = False
    dropout: float = 0.0
    dora: bool = False


CASES = [
    Case(),
    Case("no", offload=True, accumulation=2, autocast=True, dropout=0.1),
    Case("no", offload=True, compiled=True, dropout=0.1),
    Case("reentrant", accumulation=2, dropout=0.1),
    Case("reentrant", offload=True, autocast=True),
    Case("reentrant", compiled=True, autocast=True, dropout=0.1),
    Case("not reentrant", autocast=True, dropout=0.1),
    Case("not reentrant", offload=True, accumulation=2),
    Case("not reentrant", offload=True, compiled=True, accumulation=2),
    Case("not reentrant", offload=True, dora=True),
    Case("reentrant", offload=True, accumulation=2, autocast=True, dora=True),
]


def llama(dtype):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, max_position_embeddings=32)).to(dtype)


def ours(dtype, dropout, dora):
    return apply_lora(llama(dtype), 4, 16, TARGETS, lora_dropout=dropout, use_dora=dora)


def peer(dtype, dropout, dora):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, lora_dropout=dropout, use_dora=dora)
    return peft.get_peft_model(llama(dtype), config)


@cache
def curve(make, case: Case, dtype=torch.float32) -> torch.Tensor:
    """The losses of three steps, each over as many batches as are accumulated."""
    model = make(dtype, case.dropout, case.dora).train()
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in trains.items():
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    if case.checkpointing != "no":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    torch._dynamo.utils.counters.clear()
    if case.compiled:  # the decoder layer, which is what compiles fast
        model.model.layers[0].compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(trains.values(), lr=0.02, weight_decay=0.0)
    torch.manual_seed(7)
    losses = []
    for step in range(3):
        for batch in IDS[4 * step : 4 * step + 4].chunk(case.accumulation):
            with torch.autograd.graph.save_on_cpu() if case.offload else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                    loss = model(input_ids=batch, labels=batch, use_cache=False).loss / case.accumulation
                loss.backward()
            losses.append(loss.detach().double())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trains.values())
        optimizer.step()
        optimizer.zero_grad()
    assert case.compiled == bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(torch.count_nonzero(p) > p.numel() // 2 for name, p in trains.items() if "lora_B" in name)
    return torch.stack(losses)


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_graphs():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    curve.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case._asdict().items() if v))
def test_it_trains(case):
    got = curve(ours, case)
    usual = Case(accumulation=case.accumulation, dora=case.dora)
    if case.dropout:
        plain = usual._replace(autocast=case.autocast, dropout=case.dropout)
        want = curve(ours, plain)
        assert not torch.equal(want, curve(ours, plain._replace(dropout=0.0)))
    else:
        want = curve(peer, usual._replace(autocast=case.autocast))
    exact = curve(peer, usual, torch.float64)
    rounding = (curve(peer, usual._replace(autocast=case.autocast)) - exact).abs().max()
    assert (got - want).abs().max() <= 2 * rounding + 1e-6
    assert (curve(peer, usual) - exact).abs().max() < 1e-4  # the bound means something
