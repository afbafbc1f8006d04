"""LoRA-RITE: an optimizer whose steps of B A do not depend on how the product is split into factors."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.optim.batches import Batch
from fused_lora.optim.pair_optimizer import PairOptimizer
from fused_lora.optim.whitening import add_times_, eigh, reciprocal, times, whiten


class _Side(NamedTuple):
    """One factor X [P, n, R] of a batch, A transposed: n is K for A and N for B."""

    batch: Batch
    which: str  # "A" or "B"
    X: Tensor  # [P, n, R]
    gradient: Tensor  # [P, n, R] without the magnitude of the other factor
    back: Tensor  # [P, R, R]: X moves by a direction times this
    turn: Tensor  # [P, R, R] from the other factor's last basis to its present one
    basis: Tensor  # [P, n, R] of X itself, as the other side will turn from it


class LoRARite(PairOptimizer):
    """LoRA-RITE: Adam with matrix preconditioners on LoRA pairs, in the basis of each other's columns.

    Equivalent to, for each pair at step t, with b' = b (1 - b^(t-1)) / (1 - b^t) of both betas and the gradients of all
    pairs scaled to a norm of at most `clip_norm`::

        U_A R_A, U_B R_B = qr(A.T), qr(B)
        G_A, G_B = pinv(R_B).T @ g_A, g_B @ pinv(R_A)
        P_A, P_B = U_B.T @ U_B_before, U_A.T @ U_A_before
        V_A = b2' * P_A @ V_A @ P_A.T + (1 - b2') * G_A @ G_A.T / K
        V_B = b2' * P_B @ V_B @ P_B.T + (1 - b2') * G_B.T @ G_B / N
        M_A = b1' * P_A @ M_A + (1 - b1') * isqrt(V_A) @ G_A
        M_B = b1' * M_B @ P_B.T + (1 - b1') * G_B @ isqrt(V_B)
        A -= lr * (pinv(R_B) @ M_A + weight_decay * A)
        B -= lr * (M_B @ pinv(R_A).T + weight_decay * B)

    B A moves by -lr (U_B M_A + M_B U_A.T) to first order, whatever the magnitudes of A and B. It wants a learning rate
    of its own, to be swept (the paper's is above Adam's, docs/study.md found one below it), and no other clipping of
    gradients; under `torch.amp.GradScaler` they are unscaled before the step as usual. Weight decay of A and B depends
    on how the product is split. All other parameters are AdamW's with the same lr, betas, eps and weight_decay, without
    decay where they have one dimension.

    Args:
        params: a model with adapters, `lora_pairs(model)`, or groups whose `params` are either pairs or others.
        lr: learning rate.
        betas: of M and V.
        eps: this part of V's largest eigenvalue is added to all.
        weight_decay: decoupled, times lr.
        clip_norm: of all pairs' G_A and G_B together; None for none.
        skip_rms: G of a larger root mean square counts as zero, as in the official code with 1; it can stop a training
            for good. None for none.
        relative_eps: False adds eps to the square roots of the eigenvalues, as the official code does.
        escape: add to V what it loses when bases turn, as in the paper; the official code does not by default.
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Yen et al., arXiv 2410.20625.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = 1.0,
        skip_rms: float | None = None,
        relative_eps: bool = True,
        escape: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, skip_rms=skip_rms)
        super().__init__(params, defaults | dict(relative_eps=relative_eps, escape=escape))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for name in ("clip_norm", "skip_rms"):
            if group[name] is not None and not group[name] > 0:
                raise ValueError(f"{name} must be > 0 or None; got {group[name]}")
        if group["clip_norm"] != self.defaults["clip_norm"]:
            raise ValueError(f"clip_norm must be one for all groups; got {group['clip_norm']} in a group")

    def _step_pairs(self, batches: list[Batch]) -> None:
        sides = [side for batch in batches for side in self._sides(batch)]
        clip = batches[0].group["clip_norm"] if batches else None
        factors = [1.0] * len(sides)
        if clip is not None:
            norms = [side.gradient.norm() for side in sides]
            total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
            factors = [(clip / total).clamp(max=1.0).to(norm.device) for norm in norms]
        for side, factor in zip(sides, factors):
            self._step_side(side, factor)

    def _sides(self, batch: Batch) -> list[_Side]:
        """Both factors with their unmagnified gradients."""
        R, dtype = batch.A.shape[1], batch.A.dtype
        floor = max((R * torch.finfo(dtype).eps) ** 2, R * torch.finfo(torch.float64).eps)
        Xs, gradients = {"A": batch.A.mT, "B": batch.B}, {"A": batch.g_A.mT, "B": batch.g_B}
        white = {which: whiten(X, floor) for which, X in Xs.items()}
        bases = {which: white[which].basis().to(dtype) for which in "AB"}
        sides = []
        for which, other in (("A", "B"), ("B", "A")):
            inverse = white[other].inverse.to(dtype)
            gradient = times(gradients[which], inverse)
            skip = batch.group["skip_rms"]
            if skip is not None:
                gradient *= gradient.square().mean((1, 2), keepdim=True) <= skip**2
            turn = bases[other].mT @ self._tall(batch, other, "basis", bases[other])
            sides.append(_Side(batch, which, Xs[which], gradient, inverse.mT, turn, bases[which]))
        return sides

    def _tall(self, batch: Batch, which: str, key: str, like: Tensor) -> Tensor:
        """State [P, n, R] of the shape of another tensor, and in memory as A or B is."""
        if which == "B":
            return self._stack(batch, which, key, like.shape[1:])
        return self._stack(batch, which, key, like.mT.shape[1:]).mT

    def _step_side(self, side: _Side, factor: float | Tensor) -> None:
        """One step of a factor with its gradient times a number."""
        batch, which, gradient, turn = side.batch, side.which, side.gradient, side.turn
        group, (n, R) = batch.group, gradient.shape[1:]
        beta1, beta2 = (beta * (1 - beta ** (batch.step - 1)) / (1 - beta**batch.step) for beta in group["betas"])
        before = self._stack(batch, which, "second_moment", (R, R))
        turned = turn @ before @ turn.mT
        second_moment = torch.lerp(gradient.mT @ gradient * (factor**2 / n), turned, beta2)
        state = dict(second_moment=second_moment)
        escaped = None
        if group["escape"]:
            escaped = self._stack(batch, which, "escaped", ())
            escaped = state["escaped"] = beta2 * (escaped + _lost(before, turned))
        momentum = times(self._tall(batch, which, "momentum", gradient), beta1 * turn.mT)
        add_times_(momentum, gradient, (1 - beta1) * factor * _inverse_root(group, second_moment, escaped))
        lr = float(group["lr"])
        add_times_(side.X, momentum, side.back, beta=1 - lr * group["weight_decay"], alpha=-lr)
        batch.put(which, getattr(batch, which))
        for key, t in (("momentum", momentum), ("basis", side.basis)):
            state[key] = t.mT if which == "A" else t
        self._keep(batch, which, **state)


def _lost(before: Tensor, turned: Tensor) -> Tensor:
    """How much of the second moments [P, R, R] the turned ones lack, [P]."""
    largest = (torch.linalg.eigvalsh(before.double()) - torch.linalg.eigvalsh(turned.double())).amax(-1)
    trace = (before - turned).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(largest.to(trace.dtype).clamp(min=0), trace.clamp(min=0))


def _inverse_root(group: dict[str, Any], second_moment: Tensor, escaped: Tensor | None) -> Tensor:
    """The symmetric inverse square root of V + escaped [P, R, R], the only one that turns with the basis."""
    values, vectors = eigh(second_moment)
    if escaped is not None:
        values = values + escaped[:, None]
    eps = group["eps"]
    roots = (values + eps * values[:, -1:]).sqrt() if group["relative_eps"] else values.sqrt() + eps
    return (vectors * reciprocal(roots)[:, None, :] @ vectors.mT).to(second_moment.dtype)
