"""End to end: one training step, forward + backward, of a Llama-3.1-8B-shaped model with random bf16 weights on one
GPU.

    python bench/bench_llama.py OUT.json [--layers 32] [--rounds 5]

Frozen, PEFT, ours and addmm in one interleaved run over the same weights, R=16 on all seven linears of every layer, A
and B in fp32 as PEFT keeps them (addmm's in bf16), PEFT and ours with and without dropout; batches 1 x 512, 1 x 2048,
2 x 2048, and 4 x 2048 with gradient checkpointing. Time is a median over rounds of steps, memory the allocator's peak.
Needs about 70 GiB; a candidate that does not fit, is wrong or fails is reported so.
"""

import argparse
import functools
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora.bench import environment
from fused_lora.bench.report import print_steps, print_written
from fused_lora.bench.results import check_writable
from fused_lora.bench.steps import Batch, Workload, run_steps
from fused_lora.bench.ways import RANK
from fused_lora.files import write_json
from fused_lora.hardware import gpu_clocks

DROPOUT = 0.05
BATCHES = (Batch(1, 512), Batch(1, 2048), Batch(2, 2048), Batch(4, 2048, checkpointing=True))
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


def base_model(layers: int, device: str = "cuda", **shape) -> nn.Module:
    """Random bf16 weights; `shape` replaces fields of LLAMA."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA | shape))
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    check_writable(given.output)
    title = f"Llama-3.1-8B shape, {given.layers} layers, bf16"
    workload = Workload(title, functools.partial(base_model, given.layers), BATCHES, (0.0, DROPOUT))
    document = dict(environment=environment("cuda"), layers=given.layers, rank=RANK, rows=[])
    for rows in run_steps(workload, least=given.rounds, budget_s=0):
        document["rows"] += [row | gpu_clocks(torch.cuda.current_device()) for row in rows]
        write_json(given.output, document)
        print_steps(title, rows)
    print_written(given.output)


if __name__ == "__main__":
    main()
