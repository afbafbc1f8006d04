"""lora_linear(): every check of the library, once, and the autograd Function over the two operators."""

import difflib

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lora import ops
from fused_lora.backends import NAMES

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_dispatch_modes, _functorch_active = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def _operators(x: Tensor, weight: Tensor, lora_A: Tensor):
    """The operators' two callables: their implementations in plain eager mode, else torch.ops.fused_lora.*.

    The dispatcher and its Python bridge cost 20 us a direction, a third of a tiny layer. Whoever listens at the dispatcher (tracing,
    torch.compile, torch.func, selective checkpointing and every other dispatch mode, tensor subclasses) is seen here and gets the operators.
    """
    if (
        is_compiling() or _dispatch_modes() > 0 or _functorch_active()
        or type(x) not in _PLAIN_TENSORS or type(weight) not in _PLAIN_TENSORS or type(lora_A) not in _PLAIN_TENSORS
    ):  # fmt: skip
        return torch.ops.fused_lora.forward.default, torch.ops.fused_lora.backward.default
    return ops.forward, ops.backward


class LoRALinearFunction(torch.autograd.Function):
    """y, h = the op on x [M, K]. Saves x [M, K] and h [M, R] (each only if a needed gradient uses it), never a mask or a copy of x."""

    @staticmethod
    def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, backend, x_lora, h_in, gate, out_scale, grad_row_scale):
        forward, _ = _operators(x, weight, lora_A)
        return forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, x_lora, h_in, gate, out_scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, lora_A, lora_B, _, ctx.scaling, ctx.dropout_p, seed, ctx.backend, x_lora, h_in, gate, out_scale, grad_row_scale = inputs
        _, need_weight, need_A, need_B, _, _, _, _, _, _, _, need_gate, need_scale, _ = ctx.needs_input_grad
        keep_x = need_weight or need_scale or (need_A and x_lora is None)
        keep_h = need_B or need_gate or need_scale
        tensors = [x if keep_x else None, weight, lora_A, lora_B, output[1] if keep_h else None, seed]
        if not (x_lora is None and h_in is None and gate is None and out_scale is None and grad_row_scale is None):
            tensors += [x_lora, h_in, gate, out_scale, grad_row_scale]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dh):
        x, weight, lora_A, lora_B, h, seed, *variant = ctx.saved_tensors
        x_lora, h_in, gate, out_scale, grad_row_scale = variant or (None,) * 5
        if dy is None:  # nothing of y was used
            if dh is None:
                return (None,) * 14
            dy = dh.new_zeros((dh.shape[0], weight.shape[0]))
        need = ctx.needs_input_grad
        needs = [*need[:5], *need[9:13]]
        _, backward = _operators(dy, weight, lora_A)
        grads = iter(
            backward(
                dy, dh, x, weight, lora_A, lora_B, h, ctx.scaling, ctx.dropout_p, seed, x_lora, h_in, gate, out_scale, grad_row_scale,
                needs, ctx.backend,
            )
        )  # fmt: skip
        dx, dw, dA, dB, dbias, dx_lora, dh_in, dgate, dscale = [next(grads) if wanted else None for wanted in needs]
        return dx, dw, dA, dB, dbias, None, None, None, None, dx_lora, dh_in, dgate, dscale, None


# Function.apply binds its arguments through inspect.signature on every call (a third of a tiny layer's forward); outside torch.func and
# torch.compile, which need that wrapper, its own C++ base does the same work.
_eager_apply = super(torch.autograd.Function, LoRALinearFunction).apply


def _apply(*args):
    if is_compiling() or _functorch_active():
        return LoRALinearFunction.apply(*args)
    return _eager_apply(*args)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    x_lora: Tensor | None = None,
    h_in: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    grad_row_scale: Tensor | None = None,
    return_h: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer with a LoRA update: y = x Wt + scaling * dropout(x) At Bt + bias.

    Equivalent to::

        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_A), lora_B)

    and, with the optional tensors,
    ``y = out_scale * (x Wt + scaling * ((x_lora At + h_in) * gate) Bt) + bias``.
    Differentiable in every tensor but `grad_row_scale`, once (no double backward). Under autocast x, weight and bias are cast as
    `torch.nn.Linear` casts them. Products accumulate in fp32; h = scaling * dropout(x) At is rounded to x's dtype.

    Args:
        x: [..., K], bf16, fp16 or fp32 (fp64 on the reference back end), any strides, zero rows allowed.
        weight: [N, K], x's dtype.
        lora_A, lora_B: [R, K] and [N, R], both in x's dtype or both fp32.
        scaling: lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)); a float or a 0-d tensor, which does not recompile a graph when it changes.
        bias: [N], x's dtype.
        dropout_p: probability of zeroing an element of the low-rank path's input, in [0, 1), resolved to 1.5e-5. The mask is drawn from
            PyTorch's default generator and regenerated in the backward.
        training: dropout acts only if true.
        backend: auto, cuda, triton, cpu or reference. "auto" falls back to the PyTorch composition where no fused kernel serves the
            request; a named back end raises instead.
        x_lora: x's shape, input of the low-rank path instead of x (ResLoRA).
        h_in: [..., R], added to x_lora At (ResLoRA).
        gate: [..., k] with k dividing R, a factor for each block of R / k ranks (LoRA-Flow, per-adapter scale).
        out_scale: [N] fp32 (DoRA).
        grad_row_scale: [N] fp32, scales the rows of dy for dA and dB only (ALLoRA).
        return_h: return (y, h) with h = x_lora At [..., R].
    Returns: y [..., N] in x's dtype, or (y, h).
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Hu et al., arXiv 2106.09685; names as in Hugging Face PEFT.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, lora_A, lora_B, bias, x_lora, h_in = _autocast(x, weight, lora_A, lora_B, bias, x_lora, h_in)
    N, K = weight.shape if weight.dim() == 2 else (-1, -1)
    R = lora_A.shape[0] if lora_A.dim() == 2 else -1
    dtype, adapter_dtype = x.dtype, lora_A.dtype
    good = (
        N > 0 and K > 0 and R > 0 and x.dim() > 0 and x.shape[-1] == K and lora_A.shape[1] == K and lora_B.shape == (N, R)
        and dtype == weight.dtype and dtype in _DTYPES and adapter_dtype == lora_B.dtype and (adapter_dtype in (dtype, torch.float32))
        and x.device == weight.device == lora_A.device == lora_B.device
        and (bias is None or (bias.shape == (N,) and bias.dtype == dtype and bias.device == x.device))
        and 0.0 <= dropout_p < 1.0 and backend in NAMES
    )  # fmt: skip
    if not good:
        raise _explain(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    if not (x_lora is None and h_in is None and gate is None and out_scale is None and grad_row_scale is None):
        _check_variant(x, N, R, x_lora, h_in, gate, out_scale, grad_row_scale)
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"scaling must be a number or a 0-d tensor; got a tensor of shape {list(scaling.shape)}")
        lora_A, scaling = lora_A.float() * scaling, 1.0  # in fp32 on A: nothing is read on the host, and scaling may train
    if return_h:  # h without the factor: fold it into the gate
        gate, scaling = (x.new_full((*x.shape[:-1], 1), scaling, dtype=torch.float32) if gate is None else gate * scaling), 1.0
    dropout = training and round(dropout_p * 65536) > 0
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout else None

    flat = x.dim() != 2
    if flat:
        lead = x.shape[:-1]
        x, x_lora, h_in, gate = (t if t is None else t.reshape(-1, t.shape[-1]) for t in (x, x_lora, h_in, gate))
    y, h = _apply(
        x, weight, lora_A, lora_B, bias, float(scaling), dropout_p if dropout else 0.0, seed, backend, x_lora, h_in, gate, out_scale, grad_row_scale
    )
    if flat:
        y = y.view(*lead, N)
    if not return_h:
        return y
    return y, (h.view(*lead, R) if flat else h)


def _autocast(x, weight, lora_A, lora_B, bias, x_lora, h_in):
    """What torch.nn.Linear's autocast does; fp32 adapters stay as they are (the kernels take them over a half-precision x)."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype == torch.float64:
        return x, weight, lora_A, lora_B, bias, x_lora, h_in
    x, weight, bias, x_lora, h_in = (t if t is None else t.to(dtype) for t in (x, weight, bias, x_lora, h_in))
    if lora_A.dtype != torch.float32 or lora_B.dtype != torch.float32:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return x, weight, lora_A, lora_B, bias, x_lora, h_in


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def _explain(x, weight, lora_A, lora_B, bias, dropout_p, backend) -> ValueError:
    """The first thing that is wrong with the arguments."""
    if weight.dim() != 2 or weight.numel() == 0:
        return ValueError(f"weight must have shape [N, K] with N, K >= 1; got {_shape(weight)}")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        return ValueError(f"x must have shape [..., {K}] to match weight {_shape(weight)}; got {_shape(x)}")
    if lora_A.dim() != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != K:
        return ValueError(f"lora_A must have shape [R, {K}] with R >= 1 to match x[..., {K}]; got {_shape(lora_A)}")
    R = lora_A.shape[0]
    if lora_B.shape != (N, R):
        return ValueError(f"lora_B must have shape [{N}, {R}] to match weight {_shape(weight)} and lora_A {_shape(lora_A)}; got {_shape(lora_B)}")
    if x.dtype not in _DTYPES:
        return ValueError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if weight.dtype != x.dtype:
        return ValueError(f"weight must have x's dtype {x.dtype}; got {weight.dtype}")
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.dtype not in (x.dtype, torch.float32):
            return ValueError(f"{name} must have x's dtype {x.dtype} or float32; got {t.dtype}")
    if lora_A.dtype != lora_B.dtype:
        return ValueError(f"lora_B must have lora_A's dtype {lora_A.dtype}; got {lora_B.dtype}")
    if bias is not None and bias.shape != (N,):
        return ValueError(f"bias must have shape [{N}] to match weight {_shape(weight)}; got {_shape(bias)}")
    if bias is not None and bias.dtype != x.dtype:
        return ValueError(f"bias must have x's dtype {x.dtype}; got {bias.dtype}")
    for name, t in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if t is not None and t.device != x.device:
            return ValueError(f"{name} must be on x's device {x.device}; got {t.device}")
    if not 0.0 <= dropout_p < 1.0:
        return ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
    near = difflib.get_close_matches(str(backend), NAMES, 1)
    return ValueError(f"backend must be one of {', '.join(NAMES)}; got {backend!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def _check_variant(x, N, R, x_lora, h_in, gate, out_scale, grad_row_scale) -> None:
    """Shapes, dtypes and devices of the optional tensors."""
    lead = tuple(x.shape[:-1])
    if x_lora is not None and (x_lora.shape != x.shape or x_lora.dtype != x.dtype):
        raise ValueError(f"x_lora must have x's shape {_shape(x)} and dtype {x.dtype}; got {_shape(x_lora)} and {x_lora.dtype}")
    if h_in is not None and (tuple(h_in.shape) != (*lead, R) or h_in.dtype != x.dtype):
        raise ValueError(f"h_in must have shape {[*lead, R]} and dtype {x.dtype}; got {_shape(h_in)} and {h_in.dtype}")
    if gate is not None and (tuple(gate.shape[:-1]) != lead or gate.shape[-1] < 1 or R % gate.shape[-1]):
        raise ValueError(f"gate must have shape {[*lead, 'k']} with k dividing R = {R}; got {_shape(gate)}")
    for name, t in (("out_scale", out_scale), ("grad_row_scale", grad_row_scale)):
        if t is not None and (tuple(t.shape) != (N,) or t.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must have shape [{N}] and dtype float32; got {_shape(t)} and {t.dtype}")
    for name, t in (("x_lora", x_lora), ("h_in", h_in), ("gate", gate), ("out_scale", out_scale), ("grad_row_scale", grad_row_scale)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {t.device}")
