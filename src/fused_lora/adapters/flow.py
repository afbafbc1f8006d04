"""LoRA-Flow over a model: gates on its blocks, and their file."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from fused_lora.adapters.blocks import Block, check_alone, rows_of_blocks
from fused_lora.adapters.holders import adapter_names, all_holders, named_holders, own_tensors
from fused_lora.adapters.model import check_not_merged, set_adapter
from fused_lora.adapters.unload import switch_on
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.config import unknown_name
from fused_lora.files import write_whole
from fused_lora.layer_config import as_number, finite_numbers
from fused_lora.nn.adapter_tensors import set_trainable
from fused_lora.nn.linear import LoRALinear
from fused_lora.variants.flow import BlockWeights, Flow, FlowGate

FILE_NAME = "lora_flow.safetensors"
_ATTRIBUTE = "lora_flow_gate"  # of a block


class LoRAFlow:
    """Several adapters of a model that act together, weighted for every token by a gate in each of its blocks.

    Equivalent to, in all layers of a block (decoder layer) whose input is x::

        w = softmax(F.linear(x, gate.weight) / temperature, dim=-1) + gate.bias
        y = F.linear(u, weight, bias) + sum(w[..., [j]] * scaling_j * F.linear(F.linear(u, A_j), B_j) for each adapter)

    for a layer's input u. The adapters are frozen, without dropout, and may differ in rank and in the layers that they
    sit in; what trains is gate.weight [k, d], from zero, and gate.bias [k], from init_weights - 1 / k. The gates are
    modules of the blocks, so that optimizers, .to() and checkpoints reach them. `static` has no gates: init_weights
    for every token, at the price of one adapter of all ranks together, and then merging is allowed.

    Args:
        model: a model with these adapters, none merged, in wrappers or not, not sharded.
        adapters: their names.
        init_weights: a number for each; None is the last adapter alone, as the paper begins.
        temperature: of the softmax.
        static: whether the weights stay what they are.
    Raises: ValueError naming the argument, what was expected and what was given; the model is unchanged then.
    Source: Wang et al., arXiv 2402.11455.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[str],
        init_weights: Sequence[float] | None = None,
        *,
        temperature: float = 1.0,
        static: bool = False,
    ):
        root = unwrapped(model)
        self.adapters = _checked_adapters(root, adapters)
        count = len(self.adapters)
        weights = [0.0] * (count - 1) + [1.0]
        if init_weights is not None:
            weights = finite_numbers("init_weights", init_weights, count)
        temperature = _checked_temperature(temperature)
        for name, layer in all_holders(root)[0].items():
            check_alone(name, layer, "LoRA-Flow")
        self._root, self.gates = root, dict[str, FlowGate]()
        self._before = {name: holder.active_adapter for name, holder in named_holders(root).items()}
        self._trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._blocks: list[Block] = []
        self._hooks: list[BlockWeights] = []
        set_adapter(model, self.adapters)
        try:
            for tensor in (tensor for name in self.adapters for tensor in own_tensors(root, name)):
                set_trainable(tensor, False)
            self._blocks = [block for row in rows_of_blocks(root, "LoRA-Flow") for block in row if block.layers]
            for block in self._blocks:
                self._link(block, weights, temperature, static)
        except BaseException:
            self._take_off()
            raise

    def _link(self, block: Block, weights: list[float], temperature: float, static: bool) -> None:
        """Give a block its gate and its layers their links."""
        given: BlockWeights | list[float] = weights
        first = next(iter(block.layers.values()))
        if not static:
            place = first.lora_A[first.active_adapters[0]]
            dtype = torch.promote_types(place.dtype, torch.float32)
            gate = FlowGate(_width(self._root, first), weights, temperature, place.device, dtype)
            given = BlockWeights(gate)
            given.watch(block.module)
            self._hooks.append(given)
            self.gates[block.name] = gate
            block.module.add_module(_ATTRIBUTE, gate)
        for layer in block.layers.values():
            layer.link = Flow(layer, self.adapters, given)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains."""
        for gate in self.gates.values():
            yield from gate.parameters()

    def remove(self) -> None:
        """Take the gates off; the adapters that were active before act and train again. A second call does nothing."""
        check_not_merged(self._root, "LoRA-Flow is removed")
        if self._blocks:
            self._take_off()

    def _take_off(self) -> None:
        """Undo what was done to the model, all of it or as far as it came."""
        for hooks, block in zip(self._hooks, self._blocks):
            hooks.unwatch(block.module)
        for block in self._blocks:
            for layer in block.layers.values():
                layer.link = None
            block.module._modules.pop(_ATTRIBUTE, None)
        self._blocks, self._hooks, self.gates = [], [], {}
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        switch_on(self._root, self._before)

    def save(self, directory: str | Path) -> None:
        """Write the gates as lora_flow.safetensors, beside what `save_adapter` writes of an adapter or elsewhere.

        Raises: ValueError without gates; OSError naming the file, with the old one untouched.
        """
        if not self.gates:
            raise ValueError("save() needs gates; got a LoRA-Flow that is static or removed")
        gates = [(f"{name}.{key}", t) for name, gate in self.gates.items() for key, t in gate.state_dict().items()]
        tensors = {key: t.detach().cpu().contiguous() for key, t in gates}
        temperature = next(iter(self.gates.values())).temperature
        about = {"format": "pt", "adapters": json.dumps(self.adapters), "temperature": repr(temperature)}
        write_whole({Path(directory) / FILE_NAME: to_bytes(tensors, metadata=about)})

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Read the gates, and their temperature, that `save` wrote for the same adapters.

        Raises: FileNotFoundError; ValueError for a damaged file, other adapters, or other blocks; nothing changes then.
        """
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(2, "No such file", str(path))
        try:
            with safe_open(path, framework="pt") as file:
                about, keys = file.metadata() or {}, list(file.keys())
                tensors = {key: file.get_tensor(key) for key in keys}
                adapters, temperature = json.loads(about["adapters"]), _checked_temperature(float(about["temperature"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} must be a file of LoRAFlow.save; got {error}") from None
        if adapters != self.adapters:
            raise ValueError(f"{path} must weight adapters {self.adapters}; got {adapters}")
        own = {f"{name}.{key}": t for name, gate in self.gates.items() for key, t in gate.state_dict().items()}
        wanted, got = ({key: list(t.shape) for key, t in each.items()} for each in (own, tensors))
        if wanted != got:
            key = next(key for key in (*wanted, *got) if wanted.get(key) != got.get(key))
            raise ValueError(f"{path} must have {key} of shape {wanted.get(key)}; got {got.get(key)} (another model?)")
        for key, t in own.items():
            t.copy_(tensors[key])
        for gate in self.gates.values():
            gate.temperature = temperature

    def __repr__(self) -> str:
        return f"LoRAFlow(adapters={self.adapters}, gates={len(self.gates)})"


def _checked_adapters(root: nn.Module, adapters: Sequence[str]) -> list[str]:
    known = adapter_names(root)
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters must be different names, one at least; got {adapters!r}")
    for name in adapters:
        if name not in known:
            raise unknown_name("adapters", name, known)
    return list(adapters)


def _checked_temperature(temperature: float) -> float:
    """Of a call or of a file."""
    if not 0 < as_number(temperature) < math.inf:
        raise ValueError(f"temperature must be a number > 0; got {temperature!r}")
    return as_number(temperature)


def _width(root: nn.Module, first: LoRALinear) -> int:
    """The width of the blocks' inputs: what the configuration says, else that of the first layer in a block."""
    config: Any = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None) or first.in_features
