"""End to end: one training step, forward + backward, of a Llama-3.1-8B-shaped model with random bf16 weights on one
GPU.

    python bench/bench_llama.py OUT.json [--layers 32]

Frozen, PEFT and ours in one interleaved run, R=16 on all seven linears of every layer, A and B in fp32 as PEFT keeps
them, with and without dropout; batches 1 x 512, 1 x 2048, 2 x 2048, and 4 x 2048 with gradient checkpointing. Time is a
median over rounds of steps, memory the allocator's peak. Needs about 70 GiB; a candidate that does not fit is reported
so.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import apply_lora
from fused_lora.bench import environment
from fused_lora.bench.candidates import AddmmLinear
from fused_lora.bench.timing import Spread, interleave
from fused_lora.files import write_whole

RANK, ALPHA, DROPOUT = 16, 32, 0.05
BATCHES = [(1, 512, False), (1, 2048, False), (2, 2048, False), (4, 2048, True)]
LLAMA = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    attn_implementation="sdpa",
    use_cache=False,
)


def base_model(layers: int) -> nn.Module:
    """Random weights, frozen, on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA))
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).train()


def shared(base: nn.Module) -> nn.Module:
    """A second model over the very tensors of `base`, so that all candidates fit on one card."""
    with torch.device("meta"):
        model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.model.rotary_emb = base.model.rotary_emb  # its buffers are in no state dict
    return model.requires_grad_(False).train()


def candidates(base: nn.Module) -> dict[str, nn.Module]:
    from peft import LoraConfig, get_peft_model

    made = {"frozen": base}
    for name, dropout in (("", 0.0), (f" p={DROPOUT}", DROPOUT)):
        made[f"peft{name}"] = get_peft_model(
            shared(base), LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
        )
        made[f"fused{name}"] = apply_lora(shared(base), r=RANK, lora_alpha=ALPHA, lora_dropout=dropout)
    addmm = shared(base)
    for parent in list(addmm.model.layers.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, key, AddmmLinear(child, RANK, ALPHA).to("cuda"))
    return made | {"addmm": addmm}


def step(model: nn.Module, tokens: torch.Tensor, checkpointing: bool) -> Callable[[], tuple[float]]:
    """A timed forward + backward; a frozen model gets inputs that need a gradient, so that its backward runs as
    deep."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def run() -> tuple[float]:
        if checkpointing:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            inner.gradient_checkpointing_disable()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        embedded = inner.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        end.record()
        end.synchronize()
        model.zero_grad(set_to_none=True)
        return (start.elapsed_time(end) / 1e3,)

    return run


def peak_gib(run: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def batch_rows(models: dict[str, nn.Module], batch: int, length: int, checkpointing: bool, rounds: int) -> list[dict]:
    tokens = torch.randint(0, 128256, (batch, length), device="cuda")
    runs, peaks = {}, {}
    for name, model in models.items():
        run = step(model, tokens, checkpointing)
        try:
            run()
            runs[name], peaks[name] = run, peak_gib(run)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    times = interleave(runs, budget_s=0, least=rounds)
    spread = {name: Spread.of([t for (t,) in ts]) for name, ts in times.items()}
    rows = []
    for name in models:
        row = dict(candidate=name, batch=batch, length=length, checkpointing=checkpointing, fits=name in runs)
        if name in runs:
            s, frozen = spread[name], spread["frozen"]
            row |= dict(
                ms=s.median * 1e3,
                p20_ms=s.p20 * 1e3,
                p80_ms=s.p80 * 1e3,
                ratio=s.median / frozen.median,
                rounds=s.count,
            )
            row |= dict(gib=peaks[name], memory_ratio=peaks[name] / peaks["frozen"])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    models = candidates(base_model(given.layers))
    rows, console = [], Console()
    for batch, length, checkpointing in BATCHES:
        rows += batch_rows(models, batch, length, checkpointing, given.rounds)
        document = dict(environment=environment("cuda"), layers=given.layers, rank=RANK, rows=rows)
        write_whole({given.output: (json.dumps(document, indent=1) + "\n").encode()})
    table = Table(
        "batch",
        "candidate",
        "ms",
        "x frozen",
        "GiB",
        "x frozen",
        title=f"Llama-3.1-8B shape, {given.layers} layers, bf16, R={RANK} on all linears",
    )
    for r in rows:
        cells = (
            (f"{r['ms']:.1f}", f"{r['ratio']:.3f}", f"{r['gib']:.1f}", f"{r['memory_ratio']:.3f}")
            if r["fits"]
            else ("does not fit", "", "", "")
        )
        table.add_row(f"{r['batch']} x {r['length']}{' ckpt' if r['checkpointing'] else ''}", r["candidate"], *cells)
    console.print(table)


if __name__ == "__main__":
    main()
