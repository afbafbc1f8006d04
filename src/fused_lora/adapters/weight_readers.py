"""Code that reads the weight of a linear layer itself, past the layer's call and so past any adapter on it.

Such code is found in the source of the modules around a target: in `forward`, and in the methods of the same object
that it calls. `self.lm_head.weight` in a model's forward is a fused cross entropy that never calls lm_head;
`self.wo.weight.dtype` is no read of values. What is reached in another way (a local alias, a function in another file)
is not seen.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import nn

from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.modules_to_save import ModuleToSave

_NO_VALUES = {
    "data_ptr",
    "device",
    "dim",
    "dtype",
    "element_size",
    "is_meta",
    "layout",
    "ndim",
    "numel",
    "shape",
    "size",
}
_NO_VALUES |= {"requires_grad", "requires_grad_", "grad"}
_NO_READERS = {"finfo", "hasattr", "id", "isinstance", "is_tensor", "len", "type"}


def _slow_but_exact(bloom: Any) -> bool:
    return bloom.pretraining_tp > 1 and bloom.slow_but_exact


# Reads in branches that are not taken, by class: what would have to hold for them to be.
_BRANCHES: dict[str, Callable[[nn.Module], bool]] = {
    "BloomAttention": _slow_but_exact,
    "BloomMLP": _slow_but_exact,
    "DisentangledSelfAttention": lambda module: False,  # DeBERTa's query_states, which its encoder never passes
}


def reader_of(target: str, ancestors: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The class around a target whose forward reads the target's weight itself, or None.

    Args:
        target: the layer's name.
        ancestors: the modules around it by name, the model itself as "".
    """
    for name, module in ancestors:
        kind = type(module)
        below = target.removeprefix(f"{name}.").split(".")
        for base, *path in _weights_read(module):
            same = path == below if base == "self" else below[-len(path) :] == path
            if path and same and _BRANCHES.get(kind.__name__, lambda module: True)(module):
                return kind.__name__
    return None


def call_all_layers(model: nn.Module) -> None:
    """Have nn.TransformerEncoder and its layers call their linear layers where some hold adapters.

    In eval mode they hand linear1.weight and linear2.weight to one fused kernel, the encoder on nested tensors, unless
    the activation is neither ReLU nor GELU; the attributes that say so serve nothing else.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if any(isinstance(inner, LoRALayer | ModuleToSave) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            for layer in module.modules():
                if isinstance(layer, nn.TransformerEncoderLayer):
                    layer.activation_relu_or_gelu = 0


def _weights_read(module: nn.Module) -> set[tuple[str, ...]]:
    """The dotted names whose weight the module's forward reads, each as its parts: ("self", "lm_head")."""
    own = vars(module).get("forward")
    functions: list[Callable] = [type(module).forward]
    seen: set[Callable] = set()
    found: set[tuple[str, ...]] = set()
    if own is not None:
        functions.append(getattr(own, "__func__", own))
    while functions:
        function = functions.pop()
        if function in seen or getattr(function, "__module__", "").startswith("torch.nn."):
            continue  # PyTorch's own layer that reads weights, TransformerEncoderLayer, is told not to
        seen.add(function)
        reads, calls = _read_source(function)
        found |= reads
        functions += [getattr(type(module), name) for name in calls if hasattr(type(module), name)]
    return found


@cache
def _read_source(function: Callable) -> tuple[frozenset[tuple[str, ...]], frozenset[str]]:
    """What a function reads the weight of, and the methods of self that it calls; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(), frozenset()
    harmless: set[ast.AST] = set()
    reads: set[tuple[str, ...]] = set()
    calls: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _NO_VALUES:
            harmless.add(node.value)
        elif isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            harmless |= {node.left, *node.comparators}
        elif isinstance(node, ast.Call):
            *owner, name = _parts(node.func) or [""]
            if name in _NO_READERS:
                harmless |= set(node.args)
            if owner == ["self"]:
                calls.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            parts = _parts(node.value)
            if parts and node not in harmless:
                reads.add(tuple(parts))
    return frozenset(reads), frozenset(calls)


def _parts(node: ast.AST) -> list[str]:
    """a.b.c as its parts; empty for anything else."""
    if isinstance(node, ast.Attribute):
        owner = _parts(node.value)
        return [*owner, node.attr] if owner else []
    return [node.id] if isinstance(node, ast.Name) else []
