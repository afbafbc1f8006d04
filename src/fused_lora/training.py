"""The training loop: settings, loss, schedule, the optimizer step, and a run that can be killed at any time and resumed
bit for bit.

Bit for bit holds on the same machine, thread count and versions, on a GPU as far as its kernels are deterministic.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import checkpoint, data

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers; a resumed run must have the same. The defaults take about three minutes
    on two CPU cores.

    Args:
        model: directory or id of a Hugging Face model, or a GGUF file; empty for the packaged SmolLM2-135M.
        data, eval_data: files or directories; no data is Python's standard library, no eval_data a held-out part of the
            data.
        text_field: field of a JSONL line.
        rank, alpha, dropout, target_modules, rslora: of the adapter, as in `apply_lora`.
        lr, warmup, steps: peak learning rate after `warmup` steps, then a cosine to zero at `steps`.
        batch_size, grad_accum, seq_len: blocks a pass, passes a step, tokens a block.
        max_grad_norm: 0 does not clip.
        weight_decay: AdamW's.
        seed: of A's start, dropout and the order of the blocks.
        dtype: of the frozen model, fp32, bf16 or fp16; the adapter is fp32.
        device: cpu or cuda.
        eval_tokens: how many held-out tokens the perplexity is of, at the most.
    Raises: ValueError naming the setting, what was expected and what was given.
    """

    model: str = ""
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    text_field: str = "text"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False
    lr: float = 1e-3
    warmup: int = 5
    steps: int = 60
    batch_size: int = 2
    grad_accum: int = 1
    seq_len: int = 256
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "fp32"
    device: str = "cpu"
    eval_tokens: int = 4096

    def __post_init__(self):
        least = dict(rank=1, warmup=0, steps=1, batch_size=1, grad_accum=1, seq_len=2, seed=0, eval_tokens=2)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be an int >= {low}; got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be less than 2**32; got {self.seed}")
        for name in ("lr", "max_grad_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0; got {getattr(self, name)}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps, {self.steps}; got {self.warmup}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        check_device(self.device)

    def plain(self) -> dict:
        """The settings as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def targets(self) -> str | list[str]:
        """target_modules as `apply_lora` takes it: names with commas between them are a list, anything else stays as it
        is."""
        names = [name.strip() for name in self.target_modules.split(",")]
        plain = all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
        return names if plain else self.target_modules


def check_device(device: str) -> None:
    """Raises ValueError unless PyTorch can compute there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdecimal()):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>; got {device!r}")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {device!r} needs a GPU that PyTorch sees; there are {torch.cuda.device_count()}")


def predicted(blocks: Tensor) -> int:
    """How many tokens of the blocks [n, L] are predicted: all but the first of each block and the filling."""
    return int((blocks[:, 1:] != data.IGNORED).sum())


def loss_sum(model: nn.Module, blocks: Tensor) -> Tensor:
    """Sum of -log p over the predicted tokens of the blocks [n, L], in fp32. Filling lies behind the text, where no
    token attends to it."""
    logits = model(input_ids=blocks.clamp(min=0), use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), ignore_index=data.IGNORED, reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int, device: str) -> float:
    """Mean -log p of the predicted tokens of the blocks [n, L], nats; its exp is the perplexity."""
    was_training = model.training
    model.eval()
    total = sum(loss_sum(model, part.to(device)).item() for part in blocks.split(batch_size))
    model.train(was_training)
    return total / predicted(blocks)


def learning_rate(step: int, settings: Settings) -> float:
    """Of the step after `step` done ones: linear to lr over `warmup` steps, then a cosine that would be zero at step
    `steps`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (settings.steps - settings.warmup)))


def train_step(
    model: nn.Module, optimizer, scaler: torch.amp.GradScaler, passes: list[Tensor], max_grad_norm: float
) -> tuple[float, float]:
    """One optimizer step over several passes, every predicted token of them with the same weight; returns (loss,
    gradient norm).

    Raises: ValueError if loss or gradient is not finite (fp16 skips a step whose gradient overflows, and lowers its
        scale).
    """
    tokens, loss = sum(predicted(blocks) for blocks in passes), 0.0
    for blocks in passes:
        part = loss_sum(model, blocks) / tokens
        scaler.scale(part).backward()
        loss += part.item()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(checkpoint.trained(model).values(), max_grad_norm or math.inf).item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise ValueError(
            f"loss and gradient must be finite, a lower --lr may help; got loss {loss:g}, gradient norm {norm:g}"
        )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


class Run:
    """A model in training, with the rows of its metrics.

    Args:
        settings: what decides the numbers.
        output: directory of the checkpoint and of metrics.jsonl.
        model: with a fresh adapter, the only part that trains.
        blocks, held_out: tokens [n, seq_len].
        say, tick: get lines of text and the row of every step.
    """

    def __init__(
        self,
        settings: Settings,
        output: Path,
        model: nn.Module,
        blocks: Tensor,
        held_out: Tensor,
        say: Callable[[str], None],
        tick: Callable[[dict], None],
    ):
        self.settings, self.model, self.blocks, self.held_out, self.say, self.tick = (
            settings,
            model,
            blocks,
            held_out,
            say,
            tick,
        )
        self.checkpoint, self.metrics = output / checkpoint.NAME, output / checkpoint.METRICS
        self.identity = {**settings.plain(), "data_sha256": data.fingerprint(blocks, held_out)}
        parameters = list(checkpoint.trained(model).values())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        scaler = torch.amp.GradScaler(torch.device(settings.device).type, enabled=settings.dtype == "fp16")
        self.state = (model, optimizer, scaler)
        self.rows: list[dict] = []

    def start(self) -> None:
        """Measure the base model and write the first row and checkpoint."""
        self._log({"step": 0, "held_out_loss": self._measure(0)})
        checkpoint.save_checkpoint(self.checkpoint, *self.state, 0, self.identity)

    def restore(self) -> None:
        """Go back to the checkpoint, and metrics.jsonl with it. Raises: ValueError if it is damaged or of other
        settings or data."""
        step = checkpoint.load_checkpoint(self.checkpoint, *self.state, self.identity)
        self.rows = checkpoint.cut_metrics(self.metrics, step)
        self.say(f"resuming after step {step} of {self.settings.steps}")
        for row in self.rows[1:]:
            self.tick(row)

    def train(self, save_every: int, eval_every: int) -> None:
        """The steps that are left; a checkpoint every save_every and a held-out loss every eval_every of them (0:
        none), and at the last."""
        settings, steps = self.settings, self.settings.steps
        for step in range(len(self.rows), steps + 1):
            began = time.perf_counter()
            for group in self.state[1].param_groups:
                group["lr"] = learning_rate(step - 1, settings)
            row = {"step": step, "lr": learning_rate(step - 1, settings)}
            passes = self._passes(step - 1)
            row["loss"], norm = train_step(*self.state, passes, settings.max_grad_norm)
            row["grad_norm"] = norm if math.isfinite(norm) else None  # JSON has no infinity
            row |= {"tokens": sum(predicted(p) for p in passes), "seconds": time.perf_counter() - began}
            self.tick(row)
            if step == steps or (eval_every and step % eval_every == 0):
                row["held_out_loss"] = self._measure(step)
            self._log(row)
            if step == steps or (save_every and step % save_every == 0):
                checkpoint.save_checkpoint(self.checkpoint, *self.state, step, self.identity)

    def _passes(self, done: int) -> list[Tensor]:
        """The blocks of the step after `done` done ones, a tensor [batch_size, seq_len] for each pass."""
        size = self.settings.batch_size * self.settings.grad_accum
        numbers = data.shuffled(len(self.blocks), done * size, size, self.settings.seed)
        return list(self.blocks[numbers].to(self.settings.device).split(self.settings.batch_size))

    def _measure(self, step: int) -> float:
        loss = held_out_loss(self.model, self.held_out, self.settings.batch_size, self.settings.device)
        self.say(f"held-out perplexity after {step} steps: {math.exp(min(loss, 700)):.3f}")
        return loss

    def _log(self, row: dict) -> None:
        self.rows.append(row)
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error
