"""LoRA-Pro: AdamW on the gradients of A and B whose step of B A is nearest to full fine-tuning's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.optim.batches import Batch
from fused_lora.optim.pair_optimizer import PairOptimizer
from fused_lora.optim.whitening import Whitening, reciprocal, whiten

X_MODES = ("sylvester", "symmetric", "zero")
MODES = ("efficient", "full")


class LoRAProAdamW(PairOptimizer):
    """LoRA-Pro: the gradients of a pair are replaced by those whose change of scaling B A is nearest to full
    fine-tuning's, and AdamW acts on them, or in full mode on the change itself.

    Equivalent to, with G the gradient of the whole weight, P_A and P_B the projectors on the rows of A and the columns
    of B, and any X [R, R]::

        pro_A = inv(B.T @ B) @ g_A / scaling**2 + X @ A
        pro_B = (g_B - P_B @ g_B) @ inv(A @ A.T) / scaling**2 - B @ X
        scaling * (B @ pro_A + pro_B @ A) == G - (1 - P_B) @ G @ (1 - P_A)

    Efficient mode hands pro_A and pro_B to AdamW. Full mode keeps Adam's moments of that change, two matrices as large
    as the weight, and takes A and B in plain steps of size lr towards Adam's direction. Where B or A lacks ranks, as B
    does at the start, the inverses are pseudo-inverses. Gradients are unscaled before the step under
    `torch.amp.GradScaler` as usual. All other parameters are AdamW's, without decay where they have one dimension.

    Args:
        params: a model with adapters, `lora_pairs(model)`, or groups whose `params` are either pairs or others.
        lr: learning rate; small B make large steps, so it wants a warm-up.
        betas, eps: AdamW's.
        weight_decay: decoupled, times lr; of A and B, not of the frozen weight.
        mode: "efficient" or "full".
        x_mode: X by which pro_A and pro_B are nearest to g_A and g_B ("sylvester"), by which second-order terms do not
            depend on how the product is split ("symmetric"), or none ("zero").
        damping: this part of the mean eigenvalue is added to those of BT B and A AT; bf16 gradients may want 1e-4.
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Wang et al., arXiv 2407.18242.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mode: str = "efficient",
        x_mode: str = "sylvester",
        damping: float = 1e-8,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(mode=mode, x_mode=x_mode, damping=damping))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for name, known in (("mode", MODES), ("x_mode", X_MODES)):
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {group[name]!r}")
        if not group["damping"] >= 0:
            raise ValueError(f"damping must be >= 0; got {group['damping']}")
        for scaling, name, *_ in group["lora_pairs"]:
            if not scaling:
                raise ValueError(f"{name}: scaling must not be 0; got {scaling}")

    def _step_pairs(self, batches: list[Batch]) -> None:
        for batch in batches:
            form = ClosedForm(batch.A, batch.B, batch.scaling, batch.group["damping"])
            if batch.group["mode"] == "full":
                self._step_full(batch, form)
                continue
            pro_A, pro_B = form.gradients(batch.g_A, batch.g_B, batch.group["x_mode"])
            self._adamw(batch.group, batch.tensors("A"), batch.shaped("A", pro_A))
            self._adamw(batch.group, batch.tensors("B"), batch.shaped("B", pro_B))

    def _step_full(self, batch: Batch, form: "ClosedForm") -> None:
        """Adam's direction of the whole weight, pair by pair, seen from A and B."""
        parts = [
            batch.split(t) for t in (batch.A, batch.B, batch.scaling, *form.gradients(batch.g_A, batch.g_B, "zero"))
        ]
        towards_A, towards_B = torch.empty_like(batch.A), torch.empty_like(batch.B)
        towards = batch.split(towards_A), batch.split(towards_B)
        for i, t in enumerate(batch.tensors("A")):
            A, B, scaling, pro_A, pro_B = (part[i] for part in parts)
            u = self._adam_direction(batch, self.state[t], scaling * (B @ pro_A + pro_B @ A))
            torch.mul(B.mT @ u, scaling, out=towards[0][i])
            torch.mul(u @ A.mT, scaling, out=towards[1][i])
        for which, direction in zip("AB", form.gradients(towards_A, towards_B, batch.group["x_mode"])):
            lr = float(batch.group["lr"])
            values = (1 - lr * batch.group["weight_decay"]) * getattr(batch, which)
            batch.put(which, values.sub_(direction, alpha=lr))
            self._keep(batch, which)

    @staticmethod
    def _adam_direction(batch: Batch, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """Adam's step over lr for gradients [blocks, N, K], with the moments in `state`."""
        (beta1, beta2), step = batch.group["betas"], batch.step
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, torch.zeros_like(gradient))
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(batch.group["eps"])
        return (state["exp_avg"] / (1 - beta1**step)).div_(root)


class ClosedForm:
    """The gradients of LoRA-Pro for pairs A [P, R, K], B [P, N, R] with scaling [P, 1, 1]."""

    def __init__(self, A: Tensor, B: Tensor, scaling: Tensor, damping: float):
        floor = A.shape[1] * torch.finfo(A.dtype).eps  # what a Gram matrix in this dtype has as noise
        self.A, self.B = A, B
        self.white_A, self.white_B = whiten(A.mT, floor, damping), whiten(B, floor, damping)
        self.U_B = self.white_B.basis().to(B.dtype)  # B inv(BT B) BT = U_B U_BT
        inverses = [white.inverse @ white.inverse.mT / scaling**2 for white in (self.white_A, self.white_B)]
        self.inv_AAt, self.inv_BtB = (inverse.to(A.dtype) for inverse in inverses)
        self.half = -0.5 * scaling**2

    def gradients(self, g_A: Tensor, g_B: Tensor, x_mode: str) -> tuple[Tensor, Tensor]:
        """pro_A [P, R, K] and pro_B [P, N, R] of g_A and g_B, see LoRAProAdamW."""
        pro_A = self.inv_BtB @ g_A
        pro_B = torch.baddbmm(g_B, self.U_B, self.U_B.mT @ g_B, alpha=-1) @ self.inv_AAt
        if x_mode == "sylvester":
            X = _sylvester(self.white_B, self.white_A, -(pro_A @ self.A.mT))
        elif x_mode == "symmetric":
            X = self.half * self.inv_BtB @ (self.B.mT @ g_B) @ self.inv_AAt
        else:
            return pro_A, pro_B
        return pro_A.baddbmm_(X, self.A), pro_B.baddbmm_(self.B, X, alpha=-1)


def _sylvester(left: Whitening, right: Whitening, C: Tensor) -> Tensor:
    """X [P, R, R] of L X + X M = C with positive semidefinite L and M by their spectra."""
    turned = left.vectors.mT @ C.double() @ right.vectors
    sums = left.values[:, :, None] + right.values[:, None, :]
    return (left.vectors @ (turned * reciprocal(sums)) @ right.vectors.mT).to(C.dtype)
