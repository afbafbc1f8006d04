"""Lion: steps of one size, in the direction of the sign of a moving average."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from fused_lora.optim.batches import dense_gradient


class Lion(Optimizer):
    """Lion with decoupled weight decay.

    Equivalent to, for each parameter p with gradient g and average m, zero at the start::

        p *= 1 - lr * weight_decay
        p -= lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    Every element moves by lr, whatever its gradient, so lr is a third to a tenth of Adam's. Weight decay is that of
    AdamW, times the present lr; where a recipe states it as a share at the peak of lr, as for Composer's
    DecoupledLionW, divide by that peak. The average has the dtype of its parameter.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the step's direction and of the average; (0.9, 0.95) in "LoRA Learns Less and Forgets Less".
        weight_decay: decoupled, times lr.
    Raises: ValueError naming the argument, what was expected and what was given; a step raises it for a sparse
        gradient.
    Source: Chen et al., arXiv 2302.06675.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        group = self.defaults | param_group
        for name in ("lr", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ValueError(f"{name} must be >= 0; got {group[name]}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1); got {group['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        Returns: what the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients, lr, (beta1, beta2) = [dense_gradient(p) for p in params], float(group["lr"]), group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            directions = torch._foreach_lerp(averages, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_lerp_(averages, gradients, 1 - beta2)
        return loss
