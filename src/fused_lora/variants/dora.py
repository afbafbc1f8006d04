"""DoRA: the rows of W + s B A brought to trained lengths.

    y = m / n * (x Wt + s h Bt) + bias,    n = the norms of the rows of W + s B A, h = x At

It is `out_scale = m / n` of the op. n comes from two skinny products, B A is never formed:
n^2 = |W_i|^2 + s * sum_r B * (2 W At + s B (A At)).
Source: Liu et al., "DoRA", arXiv 2402.09353; rows (not columns) and the handling of dropout as in Hugging Face PEFT.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.backends import cpu_norm
from fused_lora.ops.autograd import plain_eager
from fused_lora.ops.internals import forward_ad_active, own_parameter, transforms_active, without_autocast
from fused_lora.variants import Update
from fused_lora.variants.once import OncePerStep

Norms = tuple[Tensor, Tensor | None]  # n and empty of `row_norm`


class _Times(torch.autograd.Function):
    """A Wt [R, N] in fp32 at least, of A [R, K] and a frozen W [N, K] in any dtype; no copy of W outlives a block of
    rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, lora_A: Tensor) -> Tensor:
        products = [lora_A @ block.to(lora_A.dtype).t() for block in _blocks(weight, lora_A.dtype)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        weight, lora_A = ctx.saved_tensors
        total, start = torch.zeros_like(lora_A), 0
        for block in _blocks(weight, lora_A.dtype):
            total = total.addmm(d[:, start : start + len(block)], block.to(lora_A.dtype))
            start += len(block)
        return None, total


def _blocks(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The rows of W: all at once in this dtype, else as many as fit the caches once they are in it."""
    if weight.dtype is dtype:
        return (weight,)
    elements = 2**20 if weight.is_cpu else 2**24
    return weight.split(max(1, elements // weight.shape[1]))


def row_squares(weight: Tensor) -> Tensor:
    """|W_i|^2 [N] of W [N, K], in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=dtype).square()


def row_norm(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Norms:
    """The norms of the rows of W + s B A, differentiable in A, B and s.

    Equivalent to ``torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1)``, but that rows which are all
    zero have the norm 1 and are named: m / n + empty is 1 where an m of 0 stands for such a row.

    Args:
        weight: W [N, K], any floating dtype.
        squares: of `row_squares`, whose dtype is that of the sums.
        lora_A, lora_B, scaling: [R, K], [N, R], a number or a 0-d tensor.
    Returns: n [N] and empty [N], 1 for such rows and else 0, or None where there are none. Where s B A takes away
        nearly all of a row, n has (|W_i| / n)^2 times the error of fp32; on the CPU without gradients such a row is
        summed as it is.
    """
    with without_autocast(weight):
        A, Bt = lora_A.to(squares.dtype), lora_B.to(squares.dtype).t()
        if isinstance(scaling, Tensor):
            Bt, scaling = Bt * scaling, 1.0
        times = _Times.apply if torch.is_grad_enabled() and not transforms_active() else _Times.forward
        inner = torch.addmm(times(weight, A), A @ A.t(), Bt, beta=2.0, alpha=scaling)  # [R, N]
        squared = torch.add(squares, (inner * Bt).sum(0), alpha=scaling)
        if weight.is_cpu and not torch.is_grad_enabled() and plain_eager(weight, lora_A, lora_B):
            squared = _summed_anew(squared, squares, weight, A, Bt, scaling)
        empty = squared <= 0.0
        return squared.masked_fill(empty, 1.0).sqrt(), empty.to(squares.dtype)


def _summed_anew(squared: Tensor, squares: Tensor, weight: Tensor, A: Tensor, Bt: Tensor, scaling: float) -> Tensor:
    """The squared norms [N], those anew where s B A takes away nearly all of a row of W."""
    rows = (squared < squares / 8).nonzero().flatten()
    if rows.numel() == 0:
        return squared
    sums = weight[rows].to(A.dtype) + scaling * (Bt[:, rows].t() @ A)
    return squared.index_copy(0, rows, sums.square().sum(1))


class RowNorm:
    """`row_norm` of one adapter in one layer, computed once an optimizer step, and |W_i|^2 once for a frozen W.

    Where the CPU's kernel serves both come from it, but for `exact`, whose gradient the kernel has not: m and n must
    have the same rounding for m / n to be 1.
    """

    def __init__(self) -> None:
        self._squares, self._norm = OncePerStep(), OncePerStep()

    def __call__(
        self,
        source: Any,
        weight: Any,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        training: bool,
        exact: bool = False,
    ) -> Norms:
        """`row_norm`, without gradients unless it is exact.

        Args:
            source: the tensor that holds W, in whatever form.
            weight: gives W [N, K].
            training: the layer's mode. Averages of weights are put in place for an evaluation, on a GPU past what can
                be seen: so the two modes share nothing.
        """

        given = source, weight, lora_A, lora_B, scaling
        if exact and (torch.is_grad_enabled() or forward_ad_active()):
            return row_norm(weight(), self._of_weight(weight, source), lora_A, lora_B, scaling)
        compute = partial(self._compute, given, exact)
        if isinstance(scaling, Tensor):
            return self._norm(compute, lora_A, lora_B, source, scaling, also=training)
        return self._norm(compute, lora_A, lora_B, source, also=(scaling, training))

    def _of_weight(self, weight: Any, source: Any) -> Tensor:
        return self._squares(lambda: row_squares(weight()), source)

    def _compute(self, given: tuple, exact: bool) -> Norms:
        source, weight, lora_A, lora_B, scaling = given
        W = weight()
        by_kernel = not exact and type(scaling) is float and cpu_norm.serves(lora_A, lora_B, W)
        if by_kernel and plain_eager(W, lora_A, lora_B):
            return cpu_norm.row_norm(W, lora_A, lora_B, scaling)
        with torch.no_grad():
            n, empty = row_norm(W, self._of_weight(weight, source), lora_A, lora_B, scaling)
            return n.detach(), empty  # of forward-mode derivatives, too

    def forget(self) -> None:
        """Compute anew next time."""
        self._squares.forget()
        self._norm.forget()


def out_scale(magnitude: Tensor, norm: Norms) -> Tensor:
    """m / n [N], 1 for rows of which both are zero; differentiable."""
    n, empty = norm
    m = magnitude if magnitude.dtype is n.dtype else magnitude.to(n.dtype)
    return m / n if empty is None else torch.addcdiv(empty, m, n)


def scaled_update(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, magnitude: Tensor, norm: Norms, dropout_p: float
) -> Update:
    """The update of a layer on x [..., K], with m [N] and what `RowNorm` has found.

    Where x is dropped from for the low-rank path, DoRA scales W x of the dropped x, too, with g = m / n:

    y = W x + (g - 1) * (W x_d) + g * s B A x_d + bias = (W x + s B A x_d + bias) + (g - 1) * (W x_d + s B A x_d)

    Two base products, and two in the backward. At g = 1 it is the plain layer bit for bit.
    """
    n, empty = norm
    if dropout_p == 0.0 and empty is None and magnitude.dtype is n.dtype and not n.requires_grad:
        return Update(lora_A, lora_B, scaling, 0.0, {"out_scale": magnitude, "out_norm": n})
    g = out_scale(magnitude, norm)
    update = Update(lora_A, lora_B, scaling, 0.0, {"out_scale": g})
    if dropout_p == 0.0:
        return update
    dropped = F.dropout(x, dropout_p)
    more = update._replace(optional={"out_scale": g - 1.0}, x=dropped)
    return update._replace(optional={"x_lora": dropped}, more=more)


class DoRA:
    """DoRA of one adapter in one layer.

    Args:
        adapter_name: the adapter's name.
        exact: whether the gradient runs through the norms, too; else they are constants to the backward, as in PEFT and
            section 4.3 of the paper.
    """

    def __init__(self, adapter_name: str, exact: bool):
        self.adapter_name, self.exact = adapter_name, exact
        self.norm = RowNorm()

    def forget(self) -> None:
        """Compute the norms anew next time."""
        self.norm.forget()

    def norms(self, layer: Any, lora_A: Tensor, lora_B: Tensor) -> Norms:
        """`row_norm` of the layer with its adapter."""
        scaling = layer.scaling[self.adapter_name]
        source = own_parameter(layer.base(), "weight")
        return self.norm(source, layer.matrix, lora_A, lora_B, scaling, layer.training, self.exact)

    def scale(self, layer: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """m / n [N] of the layer with its adapter."""
        return out_scale(layer.magnitude(self.adapter_name), self.norms(layer, lora_A, lora_B))

    def update(self, layer: Any, x: Tensor) -> Update:
        """See LayerVariant."""
        name = self.adapter_name
        lora_A, lora_B = layer.factors(name)
        m, norm = layer.magnitude(name), self.norms(layer, lora_A, lora_B)
        dropout_p = layer.acting_dropout(name)
        return scaled_update(x, lora_A, lora_B, layer.scaling[name], m, norm, dropout_p)
