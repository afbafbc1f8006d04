"""PairOptimizer: a torch optimizer whose parameters are pairs, in batches of one shape, and others, by AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from fused_lora.optim.batches import Batch, batches, dense_gradient, joined, maths_dtype
from fused_lora.optim.pairs import Pair, pair_groups, replaced


class PairOptimizer(Optimizer):
    """A torch optimizer over LoRA pairs and other parameters.

    A group of parameters is one of pairs, whose `lora_pairs` says how A and B alternate in `params`, or one of other
    parameters, on which AdamW acts. All state is in `self.state` under the parameters, in at least fp32, and loads in
    the dtype in which it was saved. A subclass has `_step_pairs`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]):
        super().__init__(pair_groups(params) if isinstance(params, nn.Module) else params, defaults)
        if not any(group["lora_pairs"] for group in self.param_groups):
            raise ValueError(
                "params must hold LoRA pairs that train: a model with adapters, lora_pairs(model), or groups of these; "
                "got none"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; `params` may be Pairs, of which a group then consists."""
        group = dict(param_group)
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        pairs = [member for member in members if isinstance(member, Pair)]
        if pairs and len(pairs) < len(members):
            raise ValueError("params of a group must be pairs or other parameters; got both (make it two groups)")
        for pair in pairs:
            pair.check()
        group["lora_pairs"] = [(p.scaling, p.name, p.blocks, p.interleaved) for p in pairs]
        group["params"] = [t for pair in pairs for t in (pair.A, pair.B)] if pairs else members
        self._check({**self.defaults, **group})
        super().add_param_group(group)

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyperparameters out of range."""
        for name in ("lr", "eps", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ValueError(f"{name} must be >= 0; got {group[name]}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1); got {group['betas']}")

    # Compiled in pieces it leaves the state of some parameters as it was, from the third step on (torch 2.13.0).
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. torch.compile runs it as it is.

        Args:
            closure: evaluates the model again and returns the loss.
        Returns: what the closure returns.
        Raises: ValueError for a gradient that is sparse, a factor that is sharded, and where others stand in the place
            of the factors or one of two is frozen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_pairs: list[Batch] = []
        for group in self.param_groups:
            if group["lora_pairs"]:
                of_pairs += self._batches(group)
            else:
                params = [p for p in group["params"] if p.grad is not None]
                self._adamw(group, params, [dense_gradient(p) for p in params])
        self._step_pairs(of_pairs)
        return loss

    def _step_pairs(self, batches: list[Batch]) -> None:
        """One step of pairs with gradients."""
        raise NotImplementedError

    def _batches(self, group: dict[str, Any]) -> list[Batch]:
        if len(group["params"]) != 2 * len(group["lora_pairs"]):
            raise replaced(type(self).__name__)
        tensors = zip(group["params"][::2], group["params"][1::2])
        pairs = [Pair(A, B, *about) for (A, B), about in zip(tensors, group["lora_pairs"])]
        pairs = [pair for pair in pairs if pair.A.grad is not None or pair.B.grad is not None]
        for pair in pairs:
            if not (pair.A.requires_grad and pair.B.requires_grad):
                raise ValueError(
                    f"{pair.name}: lora_A and lora_B must both train, as when the {type(self).__name__} was made; got "
                    f"lora_{'B' if pair.A.requires_grad else 'A'} frozen"
                )
        return batches(group, pairs, [int(self.state[pair.A].get("step", 0)) + 1 for pair in pairs])

    def _stack(self, batch: Batch, which: str, key: str, shape: Sequence[int]) -> Tensor:
        """The state of all A or all B under a key, [P, ...]; zeros before the first step."""
        if batch.step == 1:
            return batch.A.new_zeros(len(batch.A), *shape)
        return joined([self.state[t][key] for t in batch.tensors(which)])

    def _keep(self, batch: Batch, which: str, **stacks: Tensor) -> None:
        """Make parts of stacks the state of A or B, and count the step."""
        parts = {key: batch.split(stack) for key, stack in stacks.items()}
        step = _count(batch.step)
        for i, t in enumerate(batch.tensors(which)):
            self.state[t].update({key: part[i] for key, part in parts.items()}, step=step)

    def _adamw(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """One step of AdamW with these gradients, in fp32 at least."""
        by_kind: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            by_kind.setdefault((p.device, maths_dtype(p)), []).append(i)
        for (device, dtype), chosen in by_kind.items():
            values = [params[i].to(dtype) for i in chosen]
            states = [self.state[params[i]] for i in chosen]
            for state, value in zip(states, values):
                if not state:
                    state.update(step=_count(0), exp_avg=torch.zeros_like(value))
                    state["exp_avg_sq"] = torch.zeros_like(value)
            given = [grads[i].to(dtype) for i in chosen]
            averages, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
            # The fused kernel takes a parameter and what belongs to it element by element as they lie in memory.
            laid_alike = all(len({t.stride() for t in one}) == 1 for one in zip(values, given, averages, squares))
            adamw(
                values,
                given,
                averages,
                squares,
                [],
                [state["step"] for state in states],
                fused=True if device.type == "cpu" and laid_alike else None,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for i, value in zip(chosen, values):
                if value is not params[i]:
                    params[i].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but for the dtype of the state, which stays as saved but for the counts of steps, and for what
        the groups say of pairs, which the model knows."""
        about = [group["lora_pairs"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for group, pairs in zip(self.param_groups, about):
            group["lora_pairs"] = pairs
        for i, p in zip(saved, params):
            for key, value in state_dict["state"].get(i, {}).items():
                if key == "step":
                    self.state[p][key] = _count(value)
                elif isinstance(value, Tensor) and self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.to(p.device, copy=True)


def _count(steps: Any) -> Tensor:
    """A number of steps as torch's optimizers keep it. In a default dtype of bfloat16 a count ends at 256, and on a
    default device that is none of the CPU's each step waits for it."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")
