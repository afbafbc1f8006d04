"""One training step of a language model, forward and backward, in each of several ways (ways.py), in one interleaved
run over the same weights, with the memory a step needs.

A workload is a model and its batches: SmolLM2-135M here, a model of Llama-3.1-8B's shape in bench/bench_llama.py.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bench import memory
from fused_lora.bench.runner import WrongResult, prepare, ratio_facts
from fused_lora.bench.timing import Pass, Spread, interleave, ratio
from fused_lora.bench.ways import DROPS, PEERS, Candidate, model_for
from fused_lora.hardware import cpu_features
from fused_lora.models import load_model, packaged_model


@dataclass(frozen=True)
class Batch:
    """What one step sees: random tokens [sequences, tokens]. On a CPU memory costs each candidate a process of its own
    and is measured where the batch is `weighed`."""

    sequences: int
    tokens: int
    checkpointing: bool = False
    weighed: bool = True


_BATCHES = (Batch(1, 64), Batch(1, 256))


@dataclass(frozen=True)
class Workload:
    """A model and the batches of its training step.

    title: what the table says above it.
    base: gives the frozen model, on its device; picklable where that is a CPU, since peak memory is measured in a
        process of its own.
    batches: one group of rows each.
    dropouts: PEFT and ours run with each of them.
    kinds: the ways to train it, of `ways.WAYS`, frozen first.
    """

    title: str
    base: Callable[[], nn.Module]
    batches: tuple[Batch, ...]
    dropouts: tuple[float, ...] = (0.0,)
    kinds: tuple[str, ...] = ("frozen", "peft", "peft+fuse", "fused", "addmm")

    def candidates(self) -> dict[str, Candidate]:
        """All of them by name, frozen first."""
        dropped = [Candidate(kind, p) for p in self.dropouts for kind in self.kinds if kind in DROPS]
        plain = [Candidate(kind) for kind in self.kinds if kind not in DROPS]
        return {c.name: c for c in (*plain[:1], *dropped, *plain[1:])}


def smollm2_steps(device: str) -> tuple[Workload, ...]:
    """SmolLM2-135M in fp32; and in bf16 under adapters in fp32, as PEFT keeps them, with dropout, too, where PyTorch's
    bf16 products are no matter of minutes."""
    plain = Workload("SmolLM2-135M, fp32", functools.partial(smollm2, torch.float32, device), _BATCHES)
    if device == "cpu" and not cpu_features()["avx512"]:
        return (plain,)
    base, batches = functools.partial(smollm2, torch.bfloat16, device), (*_BATCHES, Batch(4, 256, weighed=False))
    return plain, Workload("SmolLM2-135M, bf16", base, batches, (0.0, 0.05))


def variants_on(device: str) -> tuple[Workload, Workload]:
    """The same with LoRA's variants, and with eight adapters in one batch."""
    base = functools.partial(smollm2, torch.float32, device)
    title = "SmolLM2-135M, fp32"
    kinds = ("frozen", "fused", "peft", "dora", "peft dora", "peft dora+fuse", "allora", "flow", "reslora")
    mixed = ("frozen", "fused", "mixed", "peft mixed", "peft mixed+fuse")
    return (
        Workload(f"{title}, variants", base, (_BATCHES[0], Batch(1, 256, weighed=False)), kinds=kinds),
        Workload(f"{title}, eight adapters", base, (Batch(8, 32),), kinds=mixed),
    )


def smollm2(dtype: torch.dtype, device: str) -> nn.Module:
    """The packaged model, without the cache of generation."""
    model: Any = load_model(packaged_model(), dtype, device)[0]
    model.config.use_cache = False
    return model


def step_of(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Forward and backward over the batch; returns the loss. Sets whether the model checkpoints."""
    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's wrapper
    inner: Any = unwrap() if unwrap else model
    with warnings.catch_warnings():  # the names that transformers 5 has from its first release on
        warnings.simplefilter("ignore", FutureWarning)
        if batch.checkpointing:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif inner.is_gradient_checkpointing:
            inner.gradient_checkpointing_disable()
    shape, generator = (batch.sequences, batch.tokens), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, inner.config.vocab_size, shape, generator=generator).to(inner.device)

    def step() -> Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    return step


def timed(model: nn.Module, step: Callable[[], Tensor]) -> Pass:
    """A pass that returns the seconds of a step; gradients are dropped outside the time.

    So is the step of an optimizer, of nothing: what layers keep until parameters change (DoRA's norms) is computed in
    every step, as in training.
    """
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)

    def one() -> tuple[float]:
        wait()
        start = time.perf_counter()
        step()
        wait()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        optimizer.step()
        return (seconds,)

    return one


def check_step(name: str, model: nn.Module, loss: float, frozen_loss: float) -> None:
    """B is zero, so every candidate computes the frozen model's loss; and whatever trains has got a gradient.

    Raises: WrongResult naming the candidate and what is off.
    """
    dtype = next(model.parameters()).dtype
    limit = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    if not abs(loss - frozen_loss) <= limit:
        raise WrongResult(f"{name}: the loss must be {frozen_loss:.5f} within {limit:.1e}; got {loss:.5f}")
    for parameter, value in model.named_parameters():
        if value.requires_grad and (value.grad is None or not value.grad.isfinite().all()):
            raise WrongResult(f"{name}: {parameter} has no finite gradient after a step")


def peak_on_cpu(base: Callable[[], nn.Module], candidate: Candidate, batch: Batch, threads: int) -> float:
    """MiB that a step needs on top of the loaded model; for a process of its own."""
    torch.set_num_threads(threads)
    model = model_for(candidate, base())
    return memory.resident_mib(timed(model, step_of(model, batch)))


def run_steps(workload: Workload, budget_s: float = 60.0, least: int = 7) -> Iterator[list[dict]]:
    """For each batch, a row per candidate: the model's dtype, milliseconds a step with p20 and p80, ratios, MiB of the
    model and, where it is weighed, what a step needs on top; or that the candidate was dropped, and why.

    Args:
        workload: the model and its batches.
        budget_s: seconds of timing for all of it.
        least: rounds at the least, whatever they take.
    Raises: what the frozen model raises.
    """
    base, candidates = workload.base(), workload.candidates()
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    models, missing = prepare(list(candidates), lambda name: model_for(candidates[name], base))
    for batch in workload.batches:
        found = _batch_rows(workload, models, batch, budget_s / len(workload.batches), least) | missing
        yield [dict(candidate=name, dtype=dtype) | vars(batch) | found[name] for name in candidates]


def _batch_rows(
    workload: Workload, models: dict[str, nn.Module], batch: Batch, budget_s: float, least: int
) -> dict[str, dict]:
    """Times, losses and memory of one batch, or why there are none, by candidate."""
    candidates, losses = workload.candidates(), {}

    def make(name: str) -> tuple[Pass, float | None]:
        model = models[name]
        step = step_of(model, batch)
        one = timed(model, step)
        try:
            losses[name] = step().item()
            check_step(name, model, losses[name], losses["frozen"])
            model.zero_grad(set_to_none=True)
            one()
            if next(model.parameters()).is_cuda:
                return one, memory.allocated_mib(one)
            if not batch.weighed:
                return one, None
            threads = torch.get_num_threads()
            return one, memory.in_fresh_process(peak_on_cpu, workload.base, candidates[name], batch, threads)
        finally:  # what does not fit leaves nothing behind
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    ready, dropped = prepare(list(models), make)
    times = interleave({name: one for name, (one, _) in ready.items()}, budget_s=budget_s, least=least)
    model_mib = {name: memory.model_mib(models[name]) for name in ready}
    peak_mib = {name: model_mib[name] + step for name, (_, step) in ready.items() if step is not None}
    rows = {}
    for name, series in times.items():
        rows[name] = Spread.of(series.seconds()).facts("step", "ms", 1e3) | dict(rounds=series.clean)
        rows[name] |= ratio_facts("ratio", ratio(series, times["frozen"]))
        rows[name] |= dict(loss=losses[name], model_mib=model_mib[name])
        if (step_mib := ready[name][1]) is not None:
            rows[name] |= dict(step_mib=step_mib, memory_ratio=peak_mib[name] / peak_mib["frozen"])
        peer = Candidate(PEERS.get(candidates[name].kind, "peft"), candidates[name].dropout).name
        if peer in times:
            rows[name] |= ratio_facts("times_peft", ratio(times[peer], series))
        if "fused" in times:
            rows[name] |= ratio_facts("over_lora", ratio(series, times["fused"]))
    return rows | dropped
