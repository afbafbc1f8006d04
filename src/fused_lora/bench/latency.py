"""One forward of SmolLM2-135M without gradients, the latency table of LoRA's paper in spirit: frozen, LoRA merged,
unmerged on the op and through PEFT, bottleneck adapters and prefix tuning, over one set of weights in one interleaved
run. Whole prompts, and generation: one token a sequence after a prompt that the cache holds.

LoRA has r=16 on every linear layer but the head. The bottleneck adapters, h + W_up relu(W_down h) of size 64, stand
after the attention and the MLP of every layer (houlsby: arXiv 1902.00751) or after the MLP alone (pfeiffer: arXiv
2005.00247); PEFT's prefix tuning has 30 virtual tokens.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters import merge_and_unload
from fused_lora.bench.runner import WrongResult, prepare, ratio_facts
from fused_lora.bench.steps import Candidate, model_for, smollm2, timed
from fused_lora.bench.timing import Pass, Spread, interleave, ratio

SIZE, VIRTUAL_TOKENS = 64, 30
CANDIDATES = ("frozen", "merged", "fused", "peft+fuse", "peft", "houlsby", "pfeiffer", "prefix")


@dataclass(frozen=True)
class Prompts:
    """Random tokens [sequences, tokens], and how many tokens a pass generates after them, each in a forward of its own
    over the cache; 0 for a pass that is the forward of the prompts themselves."""

    sequences: int
    tokens: int
    generated: int = 0


BATCHES = (Prompts(1, 128), Prompts(4, 128), Prompts(8, 256), Prompts(1, 128, 16), Prompts(8, 128, 16))


class Bottleneck(nn.Module):
    """A linear layer followed by an adapter that starts as the identity: y + W_up relu(W_down y) with y = linear(x)."""

    def __init__(self, linear: Any, size: int = SIZE):
        super().__init__()
        width, like = linear.out_features, linear.weight
        self.linear = linear
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.up(torch.relu(self.down(y)))


def model_of(kind: str, base: nn.Module) -> nn.Module:
    """A model over the weights of `base`, merged over copies of them."""
    if kind == "merged":
        return merge_and_unload(model_for(Candidate("fused"), base)).eval()
    if kind not in ("houlsby", "pfeiffer", "prefix"):
        return model_for(Candidate(kind), base).eval()
    model: Any = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())}).requires_grad_(False)
    if kind == "prefix":
        from peft import PrefixTuningConfig, get_peft_model

        model.config.use_cache = True  # the prefix is what a cache would hold
        return get_peft_model(model, PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)).eval()
    for layer in model.model.layers:
        if kind == "houlsby":
            layer.self_attn.o_proj = Bottleneck(layer.self_attn.o_proj)
        layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj)
    return model.eval()


def forward_of(model: Any, prompts: Prompts) -> Callable[[], Tensor]:
    """The forward of the prompts, or those of the tokens after them, which are given ones, so that every candidate has
    the same; returns the logits of the last token."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(1)
    shape = prompts.sequences, prompts.tokens + prompts.generated
    ids = torch.randint(0, inner.config.vocab_size, shape, generator=generator).to(inner.device)
    given, following = ids[:, : prompts.tokens], ids[:, prompts.tokens :]

    def forward(cached: bool = False) -> Any:
        with torch.no_grad(), warnings.catch_warnings():  # PEFT's prefix tuning has transformers' older names
            warnings.simplefilter("ignore", FutureWarning)
            return model(input_ids=given, logits_to_keep=1, use_cache=cached)

    if not prompts.generated:
        return lambda: forward().logits[:, -1]
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    cache = getattr(forward(cached=True), name)  # a prefix is in it, so that tokens pass by PEFT's forward

    @torch.no_grad()
    def generate() -> Tensor:
        for token in following.split(1, dim=1):
            out = inner(input_ids=token, use_cache=True, **{name: cache})
        cache.crop(-prompts.generated)
        return out.logits[:, -1]

    return generate


def check(kind: str, logits: Tensor, frozen: Tensor) -> None:
    """Every adapter starts as nothing, but for a prefix, which takes some of the attention.

    Raises: WrongResult naming the candidate.
    """
    error = (logits - frozen).abs().max().item()
    limit = float("inf") if kind == "prefix" else 1e-3 * frozen.abs().max().item()
    if not error <= limit or not logits.isfinite().all():
        raise WrongResult(f"{kind}: the logits must be the frozen model's within {limit:.1e}; off by {error:.1e}")


def run_latency(
    device: str,
    budget_s: float = 60.0,
    least: int = 7,
    base: Callable[[], nn.Module] | None = None,
    batches: tuple[Prompts, ...] = BATCHES,
) -> Iterator[list[dict]]:
    """For each batch, a row per candidate: milliseconds a forward (where tokens are generated, each has one) with their
    interval, and the ratio to the frozen model's; or that the candidate was dropped, and why.

    Args:
        device: cpu or cuda.
        budget_s: seconds of timing for all of it.
        least: rounds at the least, whatever they take.
        base: gives the frozen model; SmolLM2-135M where None.
        batches: one group of rows each.
    """
    frozen = base() if base else smollm2(torch.float32, device)
    models, missing = prepare(list(CANDIDATES), lambda kind: model_of(kind, frozen))
    for prompts in batches:
        want = forward_of(models["frozen"], prompts)()

        def make(kind: str, prompts=prompts, want=want) -> Pass:
            forward = forward_of(models[kind], prompts)
            check(kind, forward(), want)
            return timed(models[kind], forward)

        passes, dropped = prepare(list(models), make)
        times = interleave(passes, budget_s=budget_s / len(batches), least=least)
        rows = {
            kind: Spread.of(series.seconds()).facts("forward", "ms", 1e3 / max(1, prompts.generated))
            | dict(rounds=series.clean)
            | ratio_facts("ratio", ratio(series, times["frozen"]))
            for kind, series in times.items()
        }
        found = rows | dropped | missing
        yield [dict(candidate=kind) | asdict(prompts) | found[kind] for kind in CANDIDATES]
