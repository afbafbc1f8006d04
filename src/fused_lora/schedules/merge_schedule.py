"""MergeSchedule: LoRA in stages, each folded into the base weights before the next begins."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_lora.adapters.wrappers import unwrapped as unwrapped_model
from fused_lora.files import write_whole
from fused_lora.nn.layer import LoRALayer
from fused_lora.schedules import rates
from fused_lora.schedules.folding import (
    Replaced,
    check_exchangeable,
    check_foldable,
    check_stepped,
    fold,
    master_of,
    set_rank,
)
from fused_lora.schedules.stack import Links, write_stack
from fused_lora.schedules.stages import Stages
from fused_lora.schedules.targets import find_layers


class MergeSchedule:
    """Merges of the active adapter into the base weights at chosen optimizer steps; a fresh adapter goes on from there.

    Equivalent to, after such a step, in every layer with the adapter::

        weight += (1 - momentum) * scaling * B @ A
        B *= momentum                                 # momentum_mode="keep"; without momentum A random, B zero
        optimizer.state of A and B is cleared

    So the model's output stays what it was, to rounding (with momentum_mode="drop" but for the part that is dropped).
    The base weights change in place: they belong to the run's checkpoint from then on, and the adapter alone, saved
    after a merge, is not the whole update. `state_dict` holds the weights; `save_stack` writes the whole update as one
    adapter on the original base.

    Args:
        model: with one active adapter of plain LoRA, not quantised, not sharded, no target tied to another module.
        every: merge after every so many steps; or
        knots: the steps after which to merge.
        ranks: the rank of each stage, one more than knots, the first the adapter's own; lora_alpha stays.
        momentum: the share of the update that stays in the adapter, in [0, 1).
        momentum_mode: "keep" leaves that share in B, "drop" discards it and starts A and B afresh.
        reset_optimizer: clear the optimizer's state of A and B.
        reset_scheduler: start the learning rate's schedule again after a merge.
        warmup: steps after each merge in which the learning rate rises linearly to the schedule's.
        master: keep an fp32 copy of bf16 and fp16 base weights from the first merge on, so that what one merge loses to
            rounding is there in the next.
        export: "stack" keeps the factors of every stage for `save_stack`; "weights" keeps the weights alone.
        rebuild_optimizer: is called with the optimizer and the new Parameter of each old one after a change of rank, in
            place of the exchange in its param_groups.
    Raises: ValueError naming the argument or the layer, what was expected and what was given.
    Source: PeriodicLoRA, arXiv 2402.16141; Chain of LoRA, arXiv 2401.04151; ReLoRA, arXiv 2307.05695.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        knots: Iterable[int] = (),
        ranks: Iterable[int] = (),
        momentum: float = 0.0,
        momentum_mode: str = "keep",
        reset_optimizer: bool = True,
        reset_scheduler: bool = False,
        warmup: int = 0,
        master: bool = True,
        export: str = "weights",
        rebuild_optimizer: Callable[[Optimizer, Replaced], None] | None = None,
    ):
        self.stages = Stages(every, tuple(knots), tuple(ranks), momentum, momentum_mode, warmup, export)
        self.reset_optimizer, self.reset_scheduler = reset_optimizer, reset_scheduler
        self.master, self.rebuild_optimizer = master, rebuild_optimizer
        self._model, self._root = model, unwrapped_model(model)
        self.adapter_name, self._layers = find_layers(model, self.stages)
        self.steps = self.merges = self.merged_at = 0
        self._masters: dict[str, Tensor] = {}
        self._links: dict[str, Links] = {name: [] for name in self._layers}

    @classmethod
    def periodic(cls, model: nn.Module, every: int, **options) -> "MergeSchedule":
        """PeriodicLoRA: a merge every so many steps, with a new start of adapter, optimizer state and learning rate.
        The paper's momentum rule is not public in full; `momentum` here keeps the output whatever its value."""
        return cls(model, every=every, **{"reset_scheduler": True, **options})

    @classmethod
    def chain(cls, model: nn.Module, knots: Iterable[int], ranks: Iterable[int] = (), **options) -> "MergeSchedule":
        """Chain of LoRA: a link ends after each of the steps `knots`; the learning rate's schedule goes on."""
        return cls(model, knots=knots, ranks=ranks, **options)

    @classmethod
    def relora(cls, model: nn.Module, every: int, warmup: int, **options) -> "MergeSchedule":
        """ReLoRA: a merge every so many steps, and a short warm-up back to the learning rate of one long schedule. The
        state of A and B is cleared whole, where ReLoRA's own code prunes most of it."""
        return cls(model, every=every, warmup=warmup, **options)

    def step(self, optimizer: Optimizer | None = None, scheduler: Any = None) -> bool:
        """Count an optimizer step, and merge if it is one after which a merge is due.

        To be called after `optimizer.step()` and `scheduler.step()`; never between the passes of one step.

        Args: optimizer, scheduler: whose state is reset; needed for that alone.
        Returns: whether there was a merge.
        Raises: ValueError as `merge`; at the first step already for an optimizer or a scheduler that is not given, and
            for A and B of which DeepSpeed's ZeRO steps copies; the step does not count then.
        """
        due = self.stages.due(self.steps + 1)
        optimizer, scheduler = self._checked(optimizer, scheduler, merges=due)
        self.attach(optimizer)
        self.steps += 1
        if due:
            self._merge(optimizer, scheduler)
        return due

    def attach(self, optimizer: Optimizer | None) -> None:
        """Have the optimizer's steps after a merge warm up. `step` does so itself; after `load_state_dict`, which may
        stand within a warm-up, this comes before the first step."""
        if self.stages.warmup and optimizer is not None:
            rates.warm_up(rates.unwrapped(optimizer, "optimizer"), self._warm_share)

    def _warm_share(self) -> float:
        """The share of the learning rate that the next step gets."""
        since = self.steps - self.merged_at
        return (since + 1) / self.stages.warmup if self.merges and since < self.stages.warmup else 1.0

    def merge(self, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
        """Merge now, and start the next stage.

        Raises: ValueError if optimizer or scheduler, to be reset, is not given or cannot be, if A or B are not finite,
            or a layer is merged, was taken off, or has another adapter active; nothing changes then.
        """
        self._merge(*self._checked(optimizer, scheduler, merges=True))

    @torch.no_grad()
    def _merge(self, optimizer: Optimizer | None, scheduler: Any) -> None:
        for name, layer in self._layers.items():
            self._fold(name, layer)
        self.merges, self.merged_at = self.merges + 1, self.steps
        replaced = self._next_stage()
        if optimizer is not None:
            self._tell(optimizer, replaced)
        if self.reset_scheduler:
            rates.restart(scheduler)

    def _checked(self, optimizer: Optimizer | None, scheduler: Any, merges: bool) -> tuple[Optimizer | None, Any]:
        """Both without accelerate's wrappers. Raises: ValueError unless a merge can reset them and, if now, fold."""
        optimizer, scheduler = rates.unwrapped(optimizer, "optimizer"), rates.unwrapped(scheduler, "scheduler")
        for name, given in (("optimizer", optimizer), ("scheduler", scheduler)):
            if getattr(self, f"reset_{name}") and given is None:
                raise ValueError(f"{name} must be given with reset_{name}=True; got None")
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise ValueError(f"optimizer must be one of torch.optim's kind; got a {type(optimizer).__name__}")
        if self.reset_scheduler:
            rates.check_restartable(scheduler)
        if optimizer is not None and self.stages.ranks and self.rebuild_optimizer is None:
            check_exchangeable(optimizer)
        check_stepped(self._layers, self.adapter_name)
        if merges:
            check_foldable(self._root, self._layers, self.adapter_name)
        return optimizer, scheduler

    def _fold(self, name: str, layer: LoRALayer) -> None:
        share = 1 - self.stages.momentum
        if self.master and name not in self._masters and (copy := master_of(layer.weight)) is not None:
            self._masters[name] = copy
        if self.stages.export == "stack":
            self._links[name].append(self._factors(name, share))
        fold(layer, self.adapter_name, share * float(layer.scaling[self.adapter_name]), self._masters.get(name))

    def _next_stage(self) -> Replaced:
        """Start A and B of the next stage, the same on all processes. Returns: what took which Parameter's place."""
        replaced: Replaced = {}
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        for layer in self._layers.values():
            if self.stages.keeps:
                layer.lora_B[self.adapter_name].mul_(self.stages.momentum)
                continue
            layer.reset_lora_parameters(self.adapter_name)
            replaced |= self._change_rank(layer)
            for tensors in (layer.lora_A, layer.lora_B) if together else ():
                torch.distributed.broadcast(tensors[self.adapter_name].data, 0)
        return replaced

    def _change_rank(self, layer: LoRALayer) -> Replaced:
        """Give a layer fresh A and B if this stage has another rank. Returns: what took which Parameter's place."""
        now = layer.r[self.adapter_name]
        rank = self.stages.rank(self.merges, now)
        return {} if rank == now else set_rank(layer, self.adapter_name, rank)

    def _tell(self, optimizer: Optimizer, replaced: Replaced) -> None:
        """Have the optimizer train the new Parameters, without state."""
        if replaced and self.rebuild_optimizer is not None:
            self.rebuild_optimizer(optimizer, replaced)
        else:
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for old in replaced:
            optimizer.state.pop(old, None)
        for layer in self._layers.values():
            for tensors in (layer.lora_A, layer.lora_B):
                tensors[self.adapter_name].grad = None
                if self.reset_optimizer:
                    optimizer.state.pop(tensors[self.adapter_name], None)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs beside the model's adapter and the optimizer: the counts, the base
        weights that have changed (the fp32 masters where there are some), and the factors of the stages. Tensors are
        the schedule's own, not copies."""
        counts = {"steps": self.steps, "merges": self.merges, "merged_at": self.merged_at}
        state = {name: torch.tensor(value) for name, value in counts.items()}
        for name, layer in self._layers.items() if self.merges else ():
            state[f"weight.{name}"] = self._masters.get(name, layer.weight.detach())
            for j, (lora_A, lora_B) in enumerate(self._links[name]):
                state[f"A.{j}.{name}"], state[f"B.{j}.{name}"] = lora_A, lora_B
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Go on where `state_dict` was taken: the counts, the base weights, and the adapter's rank at that time, so
        that the model's and then the optimizer's own state dicts fit.

        Args:
            state: of a schedule with the same arguments, over the same model.
            optimizer: one that is made already, over the adapter's Parameters.
        Raises: ValueError naming what does not fit; nothing changes then.
        """
        counts = {name: int(state[name]) for name in ("steps", "merges", "merged_at") if name in state}
        merged = counts.get("merges", 0) > 0
        wanted = {f"weight.{name}": layer.weight for name, layer in self._layers.items()} if merged else {}
        got = {key: t for key, t in state.items() if key.startswith("weight.")}
        shapes = [{key: tuple(t.shape) for key, t in tensors.items()} for tensors in (wanted, got)]
        stages = range(counts.get("merges", 0) if self.stages.export == "stack" else 0)
        factors = {f"{kind}.{j}.{name}" for kind in "AB" for j in stages for name in self._layers}
        if len(counts) < 3 or shapes[0] != shapes[1] or set(state) != {*counts, *got, *factors}:
            what = f"a schedule with export={self.stages.export!r} over this model's {len(self._layers)} layers"
            raise ValueError(f"state must be of {what}; got {len(state)} entries of another")
        if self.merges and not merged:
            raise ValueError(
                "state must be of after the first merge, earlier ones lack the base weights, which have changed since: "
                f"load it over the original model; got a state of before, and {self.merges} merges done"
            )
        self.steps, self.merges, self.merged_at = counts["steps"], counts["merges"], counts["merged_at"]
        replaced: Replaced = {}
        for name, layer in self._layers.items():
            self._links[name] = [(state[f"A.{j}.{name}"], state[f"B.{j}.{name}"]) for j in stages]
            if merged:
                values = state[f"weight.{name}"].to(layer.weight.device)
                self._masters.pop(name, None)
                if self.master and values.dtype != layer.weight.dtype:
                    self._masters[name] = values.clone()
                layer.weight.copy_(values)
            replaced |= self._change_rank(layer)
        if optimizer is not None:
            self._tell(rates.unwrapped(optimizer, "optimizer"), replaced)
            self.attach(optimizer)

    def save(self, path: str | Path) -> None:
        """Write `state_dict` as safetensors. Raises: OSError naming the file."""
        state = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in self.state_dict().items()}
        write_whole({Path(path): to_bytes(state)})

    def load(self, path: str | Path, optimizer: Optimizer | None = None) -> None:
        """`load_state_dict` of a file that `save` wrote. Raises: OSError naming the file; ValueError."""
        self.load_state_dict(load_file(path), optimizer)

    def save_stack(self, directory: str | Path) -> None:
        """Write everything that was learned, past stages and the adapter as it is, as one plain LoRA adapter on the
        original base, whose rank is the sum of the stages'. It equals the changed weights to their rounding.

        Args: directory: as in `save_adapter`.
        Raises: ValueError unless export is "stack"; OSError naming the file.
        """
        if self.stages.export != "stack":
            raise ValueError(f"save_stack needs export='stack'; got export={self.stages.export!r}")
        own = {name: self._factors(name, 1.0) for name in self._layers}
        fresh = self.merges > 0 and not any(A.any() and B.any() for A, B in own.values())
        links = {name: past if fresh else [*past, own[name]] for name, past in self._links.items()}
        write_stack(self._model, self.adapter_name, self._layers, links, Path(directory))

    def _factors(self, name: str, share: float) -> tuple[Tensor, Tensor]:
        """Copies of a layer's A and B on the CPU, B with the scaling and a share in it."""
        layer = self._layers[name]
        lora_A, lora_B = layer.lora_A[self.adapter_name].detach(), layer.lora_B[self.adapter_name].detach()
        factor = share * float(layer.scaling[self.adapter_name])
        return lora_A.float().to("cpu", copy=True), (lora_B.float() * factor).cpu()

    def callback(self):
        """This schedule as a transformers TrainerCallback, which steps it and keeps its state in the checkpoints."""
        from fused_lora.schedules.trainer import MergeCallback

        return MergeCallback(self)
