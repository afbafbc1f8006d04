"""LoRA on the fused experts of a mixture: forward and backward of one layer of experts.

    python bench/bench_experts.py OUT.json [--hidden 512] [--intermediate 1024] [--experts 32] [--tokens 512]

Four experts a token, r=8 on both parameters, B as if trained. Frozen, PEFT's target_parameters, PEFT after `fuse`,
LoRAParameter, and LoRAParameter where it copies the weights (copied), in one interleaved run for each dtype. Each must
be as near to the result in fp64 as PEFT's is, up to a factor of 2, or is dropped.
"""

import argparse
import copy
import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fused_lora.bench import environment
from fused_lora.bench.report import print_written, say
from fused_lora.bench.results import check_writable
from fused_lora.bench.runner import WrongResult, prepare, ratio_facts
from fused_lora.bench.timing import Pass, Spread, cpu_pass, interleave, ratio
from fused_lora.files import write_json
from fused_lora.nn.experts import LoRAParameter

RANK, TOP_K, PARAMETERS = 8, 4, ("gate_up_proj", "down_proj")
CANDIDATES = ("frozen", "peft", "peft+fuse", "copied", "fused")


class Copied(LoRAParameter):
    """A LoRAParameter that computes the adapted parameters whole."""

    def why_copied(self) -> str:
        return "it is compared"


class Root(nn.Module):
    """What PEFT takes for a model."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def experts_of(hidden: int, intermediate: int, experts: int, dtype: torch.dtype) -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
    config._experts_implementation = "grouped_mm"
    module, g = Qwen3MoeExperts(config), torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = (torch.randn(p.shape, generator=g) * p.shape[2] ** -0.5).to(dtype)
    return module.requires_grad_(False)


def adapted(kind: str, experts: nn.Module) -> nn.Module:
    """The experts with an adapter, as the candidate does it, over the same weights."""
    module = copy.deepcopy(experts, {id(p): p for p in experts.parameters()})
    if kind == "frozen":
        return module
    torch.manual_seed(1)
    if kind in ("peft", "peft+fuse"):
        from peft import LoraConfig, get_peft_model

        from fused_lora.peft import fuse

        targets = [f"experts.{name}" for name in PARAMETERS]
        config = LoraConfig(r=RANK, target_modules=[], target_parameters=targets, init_lora_weights=False)
        module = get_peft_model(Root(module), config)
        if kind == "peft+fuse":
            fuse(module, strict=True)
    else:
        for name in PARAMETERS:
            module = (Copied if kind == "copied" else LoRAParameter)(module, name)
            module.add_adapter("default", r=RANK)
    g = torch.Generator().manual_seed(2)  # PEFT's wrappers hold the same tensors in the same order
    for name, p in module.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5
    return module


def outcome(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """y and every gradient."""
    x = inputs[0].detach().clone().requires_grad_()
    y = module(x, *inputs[1:])
    y.backward(torch.ones_like(y))
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)
    return {str(i): t.detach().double() for i, t in enumerate([y, x.grad, *grads])}


def checked(kind: str, experts: nn.Module, inputs: tuple[Tensor, ...], limits: dict[str, float]) -> Pass:
    """A candidate's pass. Raises: WrongResult if it is farther from the truth than `limits`, of PEFT, twice."""
    module = adapted(kind, experts)
    if kind != "frozen":
        wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        exact = copy.deepcopy(module).double()
        for each in exact.modules():
            if isinstance(each, Qwen3MoeExperts):
                each.config._experts_implementation = "eager"  # PyTorch's grouped product has no fp64
        truth, got = outcome(exact, wide), outcome(module, inputs)
        for name, want in truth.items():
            error, scale = (got[name] - want).norm().item(), want.norm().item()
            limits.setdefault(name, error)
            if not error <= 2 * limits[name] + 1e-6 * scale:
                raise WrongResult(f"{kind}: tensor {name} is off by {error:.1e}, over twice {limits[name]:.1e} of PEFT")
    x = inputs[0].detach().clone().requires_grad_()
    leaves = [p for p in module.parameters() if p.requires_grad]
    gradient = torch.ones_like(x)
    return cpu_pass(lambda x: module(x, *inputs[1:]), [x], gradient, leaves)


def rows_of(given: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    experts = experts_of(given.hidden, given.intermediate, given.experts, dtype)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(given.tokens, given.hidden, generator=g).to(dtype)
    weights, index = torch.randn(given.tokens, given.experts, generator=g).softmax(-1).topk(TOP_K)
    limits: dict[str, float] = {}
    make = functools.partial(checked, experts=experts, inputs=(x, index, weights.to(dtype)), limits=limits)
    passes, dropped = prepare(list(CANDIDATES), make)
    times = interleave(passes, budget_s=given.budget)
    rows = {}
    for name, series in times.items():
        rows[name] = Spread.of(series.seconds()).facts("both", "ms", 1e3) | dict(rounds=series.clean)
        rows[name] |= ratio_facts("ratio", ratio(series, times["frozen"]))
        if "peft" in times:
            rows[name] |= ratio_facts("times_peft", ratio(times["peft"], series))
    shape = dict(dtype=str(dtype).removeprefix("torch."), **{k: v for k, v in vars(given).items() if k != "output"})
    return [dict(candidate=name) | shape | (rows | dropped)[name] for name in CANDIDATES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name, usual in dict(hidden=512, intermediate=1024, experts=32, tokens=512).items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--budget", type=float, default=15.0)
    given = parser.parse_args()
    check_writable(given.output)
    document = dict(environment=environment("cpu"), rank=RANK, top_k=TOP_K, rows=[])
    for dtype in (torch.float32, torch.bfloat16):
        for row in rows_of(given, dtype):
            document["rows"].append(row)
            figures = row.get("why") or (
                f"{row['both_ms']:7.1f} ms ({row['both_low_ms']:.1f}-{row['both_high_ms']:.1f})  "
                f"x frozen {row['ratio']:.2f}  PEFT / it {row['times_peft']:.2f}"
            )
            say(f"{row['dtype']:9} {row['candidate']:10} {figures}")
        write_json(given.output, document)
    print_written(given.output)


if __name__ == "__main__":
    main()
