"""Pairs by module: which there are, in layers of ours and of PEFT, and their blocks."""

import pytest
import torch
from mixed_layers import Mixed, ours_mixed, peft_mixed
from pair_problems import Net
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny_llama import llama
from torch import nn

from fused_lora import LoRALinear, apply_lora
from fused_lora.nn import LoRAConv, LoRAEmbedding, LoRAParameter
from fused_lora.optim import LoRAProAdamW, LoRARite, Pair, lora_pairs, lora_param_groups
from fused_lora.optim.pairs import pair_groups
from fused_lora.peft import fuse


@pytest.mark.parametrize("make", [ours_mixed, peft_mixed])
def test_every_kind_of_layer_has_its_pair_and_the_rest_is_the_rests(make):
    model = make(rank_pattern={"linear": 2}, alpha_pattern={"linear": 5})
    pairs = {pair.name.rpartition(".")[2]: pair for pair in lora_pairs(model)}
    shapes = {name: (pair.stack_A(pair.A).shape, pair.stack_B(pair.B).shape) for name, pair in pairs.items()}
    assert shapes == {
        "embed": ((1, 4, 11), (1, 8, 4)),
        "linear": ((1, 2, 8), (1, 6, 2)),
        "conv": ((2, 2, 12), (2, 3, 2)),
    }
    assert {name: pair.scaling for name, pair in pairs.items()} == {"embed": 1.5, "linear": 2.5, "conv": 1.5}
    groups = pair_groups(model)
    assert [p.shape for p in groups[1]["params"]] == [(4, 6)] and [p.shape for p in groups[2]["params"]] == [(4,)]
    assert groups[2]["weight_decay"] == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_peft_models_fused_or_not(fused):
    model = get_peft_model(llama(), PeftConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"))
    if fused:
        fuse(model)
    ours = llama()
    apply_lora(ours, r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    got, want = lora_pairs(model), lora_pairs(ours)
    assert len(got) == 14
    assert [(p.name.removeprefix("base_model.model."), p.scaling, p.A.shape, p.B.shape) for p in got] == [
        (p.name, p.scaling, p.A.shape, p.B.shape) for p in want
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p.A)].replace("lora_A", "lora_B") == names[id(p.B)] for p in got)


def test_only_what_trains():
    model = Net()
    model.first.add_adapter("other", r=2)
    assert [pair.name for pair in lora_pairs(model)] == ["first", "second"]
    model.first.set_adapter("other")
    assert [pair.A.shape[0] for pair in lora_pairs(model)] == [2, 3]
    model.second.set_adapter(None)
    assert [pair.name for pair in lora_pairs(model)] == ["first"]
    model.first.lora_A["other"].requires_grad_(False)
    assert lora_pairs(model) == []
    assert any(p is model.first.lora_B["other"] for group in pair_groups(model) for p in group["params"])


def test_a_shared_layer_and_tied_factors_count_once():
    layer = LoRALinear(6, 6, r=2)
    twin = LoRALinear(6, 6, r=2)
    twin.lora_A["default"], twin.lora_B["default"] = layer.lora_A["default"], layer.lora_B["default"]
    assert [pair.name for pair in lora_pairs(nn.Sequential(layer, layer, twin))] == ["0"]


def test_a_factor_of_two_pairs_is_refused():
    layer, twin = LoRALinear(6, 6, r=2), LoRALinear(6, 6, r=2)
    twin.lora_A["default"] = layer.lora_A["default"]
    with pytest.raises(ValueError, match="1: A and B must belong to one pair; got one that 0 has"):
        lora_pairs(nn.Sequential(layer, twin))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return x @ self.weight.mT


def test_the_blocks_of_experts_and_grouped_convolutions_are_the_updates():
    """The sum over blocks of B A, as the layers compute it in a merge or a forward."""
    experts = LoRAParameter(Experts(), "weight")
    experts.add_adapter("default", r=2)
    conv = LoRAConv.over(nn.Conv1d(4, 6, 3, groups=2, bias=False), r=4)
    for layer in (experts, conv):
        nn.init.normal_(layer.lora_B["default"])
    (pair,) = lora_pairs(experts)
    left, right = experts._factors("default")
    assert torch.equal(pair.stack_B(pair.B) @ pair.stack_A(pair.A), left @ right)
    assert torch.equal(pair.like_A(pair.stack_A(pair.A)), pair.A) and torch.equal(
        pair.like_B(pair.stack_B(pair.B)), pair.B
    )
    (pair,) = lora_pairs(conv)
    product = pair.stack_B(pair.B) @ pair.stack_A(pair.A)  # [2, 3, 4 * 3]
    x = torch.randn(2, 4, 9)
    want = conv(x) - conv.base_layer(x)
    got = nn.functional.conv1d(x, pair.scaling * product.reshape(6, 4, 3))
    assert torch.allclose(got, want, atol=1e-5)


def test_a_factor_that_experts_share_is_refused_by_name_but_for_loraplus():
    experts = LoRAParameter(Experts(), "weight")
    experts.add_adapter("default", r=2)
    experts.share("default", "lora_A")
    model = nn.Sequential(experts)
    with pytest.raises(ValueError, match="0: each expert must have factors of its own; got one that all 3 share"):
        lora_pairs(model)
    assert [len(group["params"]) for group in lora_param_groups(model, 1e-3)] == [1, 1]


@pytest.mark.parametrize("cls", [LoRARite, LoRAProAdamW])
def test_experts_step_as_so_many_pairs(cls):
    """The optimizer's step of [E R, in] and [out, R E] is that of E separate pairs."""
    experts = LoRAParameter(Experts().double(), "weight")
    experts.add_adapter("default", r=2)
    nn.init.normal_(experts.lora_B["default"])
    (pair,) = lora_pairs(experts)
    As, Bs = (t.detach().clone() for t in (pair.stack_A(pair.A), pair.stack_B(pair.B)))
    factors = [(nn.Parameter(A.clone()), nn.Parameter(B.clone())) for A, B in zip(As, Bs)]
    alone = [Pair(A, B, pair.scaling, f"expert{i}") for i, (A, B) in enumerate(factors)]
    together, apart = cls(experts, lr=0.1), cls(alone, lr=0.1)
    for step in range(3):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step)).double()
        together.zero_grad()
        apart.zero_grad()
        experts(x).sin().sum().backward()
        weight = experts.weight + pair.scaling * torch.stack([p.B @ p.A for p in alone])
        (x @ weight.mT).sin().sum().backward()
        together.step()
        apart.step()
    assert torch.allclose(pair.stack_A(pair.A), torch.stack([p.A for p in alone]), atol=1e-9)
    assert torch.allclose(pair.stack_B(pair.B), torch.stack([p.B for p in alone]), atol=1e-9)
    assert not torch.allclose(pair.stack_A(pair.A), As, atol=1e-2)


@pytest.mark.parametrize("make", [ours_mixed, peft_mixed])
@pytest.mark.parametrize("cls", [LoRARite, LoRAProAdamW])
def test_every_kind_of_layer_trains(make, cls):
    model = make()
    optimizer = cls(model, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.square().sum() for y in model(torch.arange(11)[None])).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_an_embedding_trains_from_its_A_of_zero():
    embedding = LoRAEmbedding.over(nn.Embedding(7, 4), r=2)
    optimizer = LoRARite(embedding, lr=0.1)
    embedding(torch.arange(7)).square().sum().backward()
    optimizer.step()
    assert embedding.lora_A["default"].abs().max() > 1e-3


def test_adalora_is_refused_by_name():
    from peft import AdaLoraConfig

    model = get_peft_model(Mixed(), AdaLoraConfig(target_modules=["linear"], total_step=10))
    with pytest.raises(ValueError, match="linear: the update must be scaling \\* B A; got AdaLoRA"):
        lora_pairs(model)


@pytest.mark.parametrize("A, B", [((2, 6), (4, 3)), ((6,), (4, 2))])
def test_factors_that_make_no_product_are_refused_by_name(A, B):
    with pytest.raises(ValueError, match="odd: lora_A .*must"):
        LoRARite([Pair(nn.Parameter(torch.zeros(A)), nn.Parameter(torch.zeros(B)), 1.0, "odd")], lr=0.1)


def test_sharded_factors_are_refused(tmp_path):
    """At the start, and in a step where something has sharded them since."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = LoRALinear(6, 4, r=2)
        optimizer = LoRARite(layer, lr=0.1)
        sharded = nn.Parameter(
            distribute_tensor(layer.lora_A["default"].detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        )
        layer.lora_A["default"] = optimizer.param_groups[0]["params"][0] = sharded
        sharded.grad = torch.zeros_like(sharded)
        for refuses in (optimizer.step, lambda: lora_pairs(layer)):
            with pytest.raises(ValueError, match="lora_A must be a whole tensor.*got a DTensor of shape"):
                refuses()
    finally:
        dist.destroy_process_group()
