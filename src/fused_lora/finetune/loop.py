"""The training loop: loss, schedule, the optimizer step, and a run that can be killed at any time and resumed
bit for bit.

Bit for bit holds on the same machine, thread count and versions, on a GPU as far as its kernels are deterministic.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import data
from fused_lora.finetune import checkpoint, processes
from fused_lora.finetune.optimizers import make_optimizer
from fused_lora.finetune.settings import Settings
from fused_lora.models import context_of, out_of_memory
from fused_lora.rows import IGNORED, inputs_of, labels_of, positions_of
from fused_lora.schedules import MergeSchedule


def predicted(blocks: Tensor) -> int:
    """How many tokens of the blocks [n, L] are predicted: the learned ones, all but the first of each block."""
    return int((blocks[:, 1:] >= 0).sum())


def loss_sum(model: nn.Module, blocks: Tensor) -> Tensor:
    """Sum of -log p over the predicted tokens of the blocks [n, L], in fp32. Filling lies behind the text, where no
    token attends to it; where a block holds several texts, position_ids that begin anew keep them apart."""
    positions = positions_of(blocks)
    apart = {} if positions is None else {"position_ids": positions}
    logits = model(input_ids=inputs_of(blocks), use_cache=False, **apart).logits[:, :-1].float()
    labels = labels_of(blocks[:, 1:])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int, device: str) -> float:
    """Mean -log p of the predicted tokens of the blocks [n, L], nats; its exp is the perplexity. Each process takes its
    share of them."""
    was_training = model.training
    model.eval()
    parts = blocks.split(batch_size)[processes.rank() :: processes.count()]
    total = sum(loss_sum(model, data.trimmed(part).to(device)).item() for part in parts)
    model.train(was_training)
    return processes.summed(total, device) / predicted(blocks)


def learning_rate(step: int, settings: Settings) -> float:
    """Of the step after `step` done ones: linear to lr over `warmup` steps, then, unless it is constant, a cosine or a
    line that would be `final_share` of it at step `steps`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * (settings.final_share + (1 - settings.final_share) * share)


def train_step(
    model: nn.Module, optimizer, scaler: torch.amp.GradScaler, passes: list[Tensor], max_grad_norm: float
) -> tuple[float, float]:
    """One optimizer step over several passes, every predicted token of them with the same weight, and over those of all
    processes; returns (loss, gradient norm).

    Raises: ValueError if loss or gradient is not finite (fp16 skips a step whose gradient overflows, and lowers its
        scale).
    """
    trained, loss = checkpoint.trained(model).values(), 0.0
    tokens = processes.summed(sum(predicted(blocks) for blocks in passes), passes[0].device)
    for blocks in passes:
        part = loss_sum(model, blocks) / tokens
        scaler.scale(part).backward()
        loss += part.item()
    loss = processes.summed(loss, passes[0].device)
    processes.sum_gradients(trained)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf).item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise ValueError(
            f"loss and gradient must be finite, a lower --lr may help; got loss {loss:g}, gradient norm {norm:g}"
        )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class Run:
    """A model in training, with the rows of its metrics.

    Args:
        settings: what decides the numbers.
        output: directory of the checkpoint and of metrics.jsonl.
        model: what trains, a fresh adapter or all of it, requires gradients.
        blocks, held_out: tokens [n, at most seq_len].
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
        self.identity["processes"] = processes.count()
        optimizer = make_optimizer(model, settings)
        self.schedule: MergeSchedule | None = None
        if settings.merge_every:
            every, warmup = settings.merge_every, settings.warmup
            self.schedule = MergeSchedule(model, every=every, warmup=warmup, export="stack")
        scaler = torch.amp.GradScaler(torch.device(settings.device).type, enabled=settings.dtype == "fp16")
        self.state = (model, optimizer, scaler)
        self.rows: list[dict] = []

    def start(self, replaced: Iterable[Path]) -> None:
        """Measure the base model, remove the files of the run that this one replaces, write the first row and
        checkpoint.

        Raises: ValueError if the model fails on blocks beyond its context, or its loss is not finite; the files are
            there then.
        """
        try:
            loss = self._measure(0)
        except (IndexError, RuntimeError) as error:
            context, length = context_of(self.model), self.settings.seq_len
            if out_of_memory(error) or (context is not None and length <= context):
                raise
            words = f"{context} tokens" if context else "which its configuration does not say"
            raise ValueError(
                f"seq_len must be within the model's context, {words}; got {length} ({type(error).__name__}: {error})"
            ) from error
        if not math.isfinite(loss):
            raise ValueError(f"the base model's loss on the held-out data must be finite; got {loss}")
        processes.by_first(lambda: _remove(replaced))
        self._log({"step": 0, "held_out_loss": loss})
        checkpoint.save_checkpoint(self.checkpoint, *self.state, 0, self.identity, self.schedule)

    def restore(self) -> None:
        """Go back to the checkpoint, and metrics.jsonl with it. Raises: ValueError if it is damaged or of other
        settings or data."""
        step = checkpoint.load_checkpoint(self.checkpoint, *self.state, self.identity, self.schedule)
        self.rows = processes.by_first(lambda: checkpoint.cut_metrics(self.metrics, step))
        self.say(f"resuming after step {step} of {self.settings.steps}")
        for row in self.rows[1:]:
            self.tick(row)

    def train(self, save_every: int, eval_every: int) -> None:
        """The steps that are left; a checkpoint every save_every and a held-out loss every eval_every of them (0:
        none), and at the last."""
        settings, steps = self.settings, self.settings.steps
        for step in range(len(self.rows), steps + 1):
            began = time.perf_counter()
            rate = learning_rate(step - 1, settings)
            for group in self.state[1].param_groups:
                group["lr"] = rate * (group["initial_lr"] / settings.lr if settings.lr else 1.0)
            row: dict[str, Any] = {"step": step, "lr": rate}
            passes = self._passes(step - 1)
            clip = 0.0 if settings.optimizer == "rite" else settings.max_grad_norm  # which clips by itself
            row["loss"], norm = train_step(*self.state, passes, clip)
            if self.schedule is not None:
                self.schedule.step(self.state[1])
            row["grad_norm"] = norm if math.isfinite(norm) else None  # JSON has no infinity
            row["tokens"] = int(processes.summed(sum(predicted(p) for p in passes), settings.device))
            row["seconds"] = time.perf_counter() - began
            self.tick(row)
            if step == steps or (eval_every and step % eval_every == 0):
                row["held_out_loss"] = self._measure(step)
            self._log(row)
            if step == steps or (save_every and step % save_every == 0):
                checkpoint.save_checkpoint(self.checkpoint, *self.state, step, self.identity, self.schedule)

    def _passes(self, done: int) -> list[Tensor]:
        """This process's blocks of the step after `done` done ones, a tensor [batch_size, at most seq_len] for each
        pass."""
        size = self.settings.batch_size * self.settings.grad_accum
        numbers = data.shuffled(len(self.blocks), done * size, size, self.settings.seed)
        passes = self.blocks[numbers[processes.rank() :: processes.count()]].split(self.settings.batch_size)
        return [data.trimmed(blocks).to(self.settings.device) for blocks in passes]

    def _measure(self, step: int) -> float:
        loss = held_out_loss(self.model, self.held_out, self.settings.batch_size, self.settings.device)
        self.say(f"held-out perplexity after {step} steps: {math.exp(min(loss, 700)):.3f}")
        return loss

    def _log(self, row: dict) -> None:
        self.rows.append(row)
        processes.by_first(lambda: self._append(row))

    def _append(self, row: dict) -> None:
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error
