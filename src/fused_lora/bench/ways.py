"""The ways to train a language model that a training step is timed in: frozen, PEFT, ours, and LoRA's variants."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import manual_seed, nn

from fused_lora.adapters import apply_lora, set_adapter
from fused_lora.bench.candidates import AddmmLinear

RANK, ALPHA, MIXED = 16, 32, 8
DROPS = ("peft", "peft+fuse", "fused")  # which run with dropout, too
# Whose speed the column "PEFT / it" compares with, where that is not "peft".
PEERS = {"dora": "peft dora", "peft dora": "peft dora", "peft dora+fuse": "peft dora", "mixed": "peft mixed"}
PEERS |= {"peft mixed": "peft mixed", "peft mixed+fuse": "peft mixed"}


@dataclass(frozen=True)
class Candidate:
    """A way to train a model, a key of WAYS; LoRA dropout for those of DROPS."""

    kind: str
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} p={self.dropout:g}" if self.dropout else self.kind


def model_for(candidate: Candidate, base: nn.Module) -> nn.Module:
    """A model over the very tensors of `base` with LoRA on every linear layer but the head, as the candidate does
    it; B starts at zero in all.

    Raises: ValueError for a kind that is not in WAYS.
    """
    if candidate.kind not in WAYS:
        *others, last = WAYS
        raise ValueError(f"kind must be {', '.join(others)} or {last}; got {candidate.kind!r}")
    model: Any = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())}).requires_grad_(False)
    manual_seed(0)
    return WAYS[candidate.kind](model.train(), candidate.dropout)


def _frozen(model: Any, dropout: float) -> nn.Module:
    # its backward runs as deep as the others' where the embeddings need a gradient
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def _addmm(model: Any, dropout: float) -> nn.Module:
    head = model.get_output_embeddings()
    for parent, key, linear in list(_linears(model)):
        if linear is not head:
            setattr(parent, key, AddmmLinear(linear, RANK, ALPHA))
    return model


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for key, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, key, child


def _ours(model: nn.Module, dropout: float = 0.0, **variant) -> nn.Module:
    return apply_lora(model, RANK, ALPHA, "all-linear", dropout, **variant).train()


def _peft(model: nn.Module, dropout: float = 0.0, fused: bool = False, count: int = 1, **variant) -> Any:
    """A PEFT model with adapters "default", "1" and so on."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", **variant)
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        made = get_peft_model(model, config)
        for other in range(1, count):
            made.add_adapter(str(other), config)
    if fused:
        from fused_lora.peft import fuse

        fuse(made, strict=True)
    return made.train()


def _flow(model: nn.Module, dropout: float) -> nn.Module:
    """Two adapters under gates, which are all that trains."""
    from fused_lora import LoRAFlow

    for name in ("one", "other"):
        apply_lora(model, RANK, ALPHA, adapter_name=name)
    LoRAFlow(model, ["one", "other"], [0.5, 0.5])
    return model.train()


def _reslora(model: nn.Module, dropout: float) -> nn.Module:
    from fused_lora import link_reslora

    link_reslora(_ours(model), "block", pre_num=1)
    return model


def _mixed(model: Any, dropout: float) -> nn.Module:
    """A sample an adapter, all of which train."""
    names = [str(i) for i in range(MIXED)]
    for name in names:
        apply_lora(model, RANK, ALPHA, adapter_name=name)
    set_adapter(model, names)
    return _with_names(model.train(), names)


def _peft_mixed(model: nn.Module, dropout: float, fused: bool = False) -> nn.Module:
    """PEFT's loop, which it has for inference: without dropout the same in training."""
    made = _peft(model, fused=fused, count=MIXED).eval()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return _with_names(made, ["default", *(str(i) for i in range(1, MIXED))])


def _with_names(model: Any, names: list[str]) -> nn.Module:
    def add(module, args, kwargs):
        return args, kwargs | dict(adapter_names=names)

    model.register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    return model


WAYS: dict[str, Callable[[Any, float], nn.Module]] = {
    "frozen": _frozen,
    "peft": _peft,
    "peft+fuse": functools.partial(_peft, fused=True),
    "fused": _ours,
    "addmm": _addmm,
    "dora": functools.partial(_ours, use_dora=True),
    "peft dora": functools.partial(_peft, use_dora=True),
    "peft dora+fuse": functools.partial(_peft, fused=True, use_dora=True),
    "allora": lambda model, dropout: apply_lora(model, RANK, RANK, allora_eta=2**0.5).train(),
    "flow": _flow,
    "reslora": _reslora,
    "mixed": _mixed,
    "peft mixed": _peft_mixed,
    "peft mixed+fuse": functools.partial(_peft_mixed, fused=True),
}
