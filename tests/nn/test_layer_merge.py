"""LoRALinear.merge and unmerge: one rounding, no drift, and nothing else touched."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora.nn import LoRALinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(layer: LoRALinear, name: str = "default", seed: int = 0) -> LoRALinear:
    """The layer with an adapter whose B is not zero any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (layer.lora_A[name], layer.lora_B[name]):
            t.copy_(torch.randn(t.shape, generator=g) * 0.2)
    return layer


def bits(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousand_switches_leave_the_weight_bit_for_bit(dtype):
    layer = LoRALinear(32, 48, r=4, dtype=dtype)
    for name in ("second", "third"):
        layer.add_adapter(name, r=2)
    for seed, name in enumerate(layer.lora_A):
        trained(layer, name, seed)
    weight, before, merged_bits = layer.weight, bits(layer.weight), {}
    for step in range(1000):
        name = ("default", "second", "third")[step % 3]
        layer.set_adapter(name)
        layer.merge()
        assert merged_bits.setdefault(name, bits(layer.weight)) == bits(layer.weight)
        layer.unmerge()
    assert layer.weight is weight and bits(layer.weight) == before
    assert len(set(merged_bits.values()) | {before}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_is_rounded_once_from_fp32(dtype):
    layer = trained(LoRALinear(64, 48, r=8, lora_alpha=12, dtype=dtype))
    exact = layer.weight.double() + 1.5 * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    x = torch.randn(7, 64, dtype=dtype)
    layer.merge()
    error = (layer.weight.double() - exact).abs()
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
    assert (error <= half_ulp + 64 * torch.finfo(torch.float32).eps).all()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not layer.weight.requires_grad


def test_merging_never_touches_a_tied_twin():
    embedding, head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
    head.weight = embedding.weight
    layer = trained(LoRALinear.from_linear(head, r=4))
    before = bits(embedding.weight)
    layer.merge()
    assert bits(embedding.weight) == before and bits(layer.weight) != before
    layer.unmerge()
    assert layer.weight is embedding.weight and bits(embedding.weight) == before


@pytest.mark.parametrize("dtype, value", [(torch.float32, math.inf), (torch.bfloat16, math.nan), (torch.float16, 1e5)])
def test_non_finite_merge_changes_nothing(dtype, value):
    layer = trained(LoRALinear(16, 8, r=2, dtype=dtype))
    with torch.no_grad():
        layer.lora_A["default"][0, 3], layer.lora_B["default"][5, 0] = 1.0, value
    weight, before = layer.weight, bits(layer.weight)
    with pytest.raises(ValueError, match=r"adapter 'default' must be finite in torch\.\w+; got \d+ elements"):
        layer.merge()
    assert layer.weight is weight and bits(layer.weight) == before and not layer.merged


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
@pytest.mark.parametrize("tied", [True, False])
def test_conversion_while_merged_reaches_the_weight_kept_aside(tied, move):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
            if tied:
                head.weight = self.embedding.weight
            self.head = trained(LoRALinear.from_linear(head, r=4))

    model = Model()
    want = move(copy.deepcopy(model)).head.weight
    model.head.merge()
    merged = model.head.weight.detach().clone()
    move(model)
    assert torch.equal(model.head.weight, merged.to(want.dtype))
    model.head.unmerge()
    assert model.head.weight.dtype == want.dtype and bits(model.head.weight) == bits(want)
    assert (model.head.weight is model.embedding.weight) == tied


def test_while_merged_only_the_merged_adapter_is_allowed():
    layer = trained(LoRALinear(16, 8, r=2))
    layer.add_adapter("other")
    layer.merge()
    for change in (
        lambda: layer.set_adapter("other"),
        lambda: layer.set_adapter(None),
        lambda: layer.delete_adapter("default"),
        lambda: layer.reset_lora_parameters("default"),
        lambda: layer.load_state_dict(layer.state_dict()),
        layer.merge,
    ):
        with pytest.raises(ValueError, match="merged"):
            change()
    layer.set_adapter("default")
    layer.unmerge()
    with pytest.raises(ValueError, match="needs a merged adapter"):
        layer.unmerge()
    layer.set_adapter(None)
    with pytest.raises(ValueError, match="needs an active adapter"):
        layer.merge()


def test_merged_state_dict_is_a_linears():
    model, plain = nn.Sequential(trained(LoRALinear(16, 8, r=2))), nn.Sequential(nn.Linear(16, 8))
    model[0].merge()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(plain(x), model(x))
