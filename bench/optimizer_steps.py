"""What a step of each optimizer costs beside the forward and backward of SmolLM2-135M, R=16 on all linears, in fp32.

Usage: python bench/optimizer_steps.py [TOKENS] [ROUNDS]
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fused_lora import apply_lora
from fused_lora.models import load_model, packaged_model
from fused_lora.optim import (
    LoRAProAdamW,
    LoRARite,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

RATE = 1e-6  # the steps barely change the model
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True),
    "LoRA+": lambda model: create_loraplus_optimizer(model, AdamW, lr=RATE, fused=True),
    "LoRA-RITE": lambda model: LoRARite(model, lr=RATE),
    "LoRA-RITE, escape": lambda model: LoRARite(model, lr=RATE, escape=True),
    "LoRA-Pro": lambda model: LoRAProAdamW(model, lr=RATE),
    "LoRA-Pro, symmetric": lambda model: LoRAProAdamW(model, lr=RATE, x_mode="symmetric"),
    "Riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=RATE, fused=True),
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, lr=RATE),  # freezes A, so it comes last
}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(model: nn.Module, tokens: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds by round of "forward and backward" and of each optimizer's step, after a first round that counts for
    nothing."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-3)  # as after some steps: a zero B has no ranks
    optimizers = {name: make(model) for name, make in MAKERS.items() if name != "LoRA-FA"}
    times: dict[str, list[float]] = {}

    def pass_through() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    for _ in range(rounds + 1):
        times.setdefault("forward and backward", []).append(seconds(pass_through))
        kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        for name, optimizer in optimizers.items():
            for p, gradient in kept.items():
                p.grad.copy_(gradient)  # some change gradients
            times.setdefault(name, []).append(seconds(optimizer.step))
    optimizer = MAKERS["LoRA-FA"](model)
    times["LoRA-FA"] = [seconds(optimizer.step) for _ in range(rounds + 1)]
    return {name: found[1:] for name, found in times.items()}


def report(times: dict[str, list[float]]) -> str:
    """Medians in ms, and how much of the step with fused AdamW each adds to it."""
    middle = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    passes, adamw = middle["forward and backward"], middle["AdamW"]
    lines = [f"{name:22}{ms:9.1f} ms{100 * (ms - adamw) / (passes + adamw):8.1f} %" for name, ms in middle.items()]
    lines[0] = f"{'forward and backward':22}{passes:9.1f} ms"
    return "\n".join(lines)


if __name__ == "__main__":
    count, rounds = (int(given) for given in (*sys.argv[1:], *("256", "5")[len(sys.argv) - 1 :]))
    model, _ = load_model(packaged_model(), torch.float32, "cpu")
    apply_lora(model, r=16, lora_alpha=32, target_modules="all-linear")
    tokens = torch.randint(0, 49000, (1, count), generator=torch.Generator().manual_seed(0))
    print(report(measure(model.train(), tokens, rounds)))
