"""ModuleToSave, the wrapper of a module that an adapter trains in full, or of which it trains rows."""

import copy
from collections.abc import Sequence

from torch import nn

from fused_lora.config import unknown_name
from fused_lora.nn.adapter_tensors import set_trainable
from fused_lora.nn.trained_rows import TrainedRows


class ModuleToSave(nn.Module):
    """A frozen module with a trainable full copy for each adapter that asks for one (PEFT's `modules_to_save`), or with
    `TrainedRows`.

    Calls and unknown attributes go to the active adapter's copy, or to the original. The original keeps its Parameters,
    so a tied twin (an embedding under a copied output head) is untouched.

    Args:
        original_module: any module with a forward.
    """

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.merged = False  # inside `merged(model)`: state_dict() is the current module's own
        self.training = original_module.training

    def current(self) -> nn.Module:
        """The module that a call runs."""
        return self.original_module if self.active_adapter is None else self.modules_to_save[self.active_adapter]

    def add_adapter(
        self, adapter_name: str, rows: Sequence[int] | None = None, tied_to: nn.Module | None = None
    ) -> nn.Module:
        """A frozen copy of the original for a new adapter.

        Args:
            adapter_name: its name.
            rows: numbers of rows of the weight, if it trains these alone.
            tied_to: the adapter's copy, or rows, of another module, which has the same weight and goes on to have it.
        Returns: the copy, or the rows.
        """
        if rows is not None:
            assert tied_to is None or isinstance(tied_to, TrainedRows)
            added: nn.Module = TrainedRows(self.original_module, rows, tied_to)
        else:
            added = copy.deepcopy(self.original_module)
            if tied_to is not None:
                added.weight = tied_to.weight
        self.modules_to_save[adapter_name] = added
        return added

    def set_adapter(self, adapter_name: str | None) -> None:
        """Make one adapter's copy the one that runs and trains; None is the original."""
        if adapter_name is not None and adapter_name not in self.modules_to_save:
            raise unknown_name("adapter_name", adapter_name, self.modules_to_save)
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                set_trainable(parameter, name == adapter_name and parameter.is_floating_point())
        self.active_adapter = adapter_name

    def plain(self) -> nn.Module:
        """The module that is left when the active adapter stays for good; `merge` has put its rows into the weight."""
        current = self.current()
        return current.module if isinstance(current, TrainedRows) else current

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError unless `merge` can put the rows of these adapters into the weight."""
        for name in adapter_names:
            module = self.modules_to_save[name]
            if isinstance(module, TrainedRows):
                module.check_mergeable()

    def merge(self) -> None:
        """Put rows that the active adapter trains into the weight; from now on `state_dict()` is the plain module's."""
        current = self.current()
        self.merged = True
        if isinstance(current, TrainedRows):
            current.fold()

    def unmerge(self) -> None:
        """Undo `merge`, if it was called."""
        current = self.current()
        self.merged = False
        if isinstance(current, TrainedRows):
            current.unfold()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """transformers' save_pretrained writes a tensor of these names once: the original may be tied to another
        module, the wrapper be reached by two names."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        return {name: name for name, _ in tensors}

    def forward(self, *args, **kwargs):
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "active_adapter" not in vars(self):  # half-built, in deepcopy or unpickling
                raise
            return getattr(self.current(), name)

    def state_dict(self, *args, **kwargs):
        """As Module.state_dict; inside `merged(model)` that of the module that runs, under the wrapper's own name."""
        return self.plain().state_dict(*args, **kwargs) if self.merged else super().state_dict(*args, **kwargs)
