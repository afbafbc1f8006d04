"""Column- and row-parallel layers with adapters in two processes: the outputs, gradients and steps of one process, on
shards of W, by the fused op."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from two_processes import Collectives, Decoder, adapted, batch, loss_of, outcomes, run_checks, steps, trained, whole

from fused_lora import LoRALinear, apply_lora, load_adapter, lora_linear, merged, save_adapter, set_adapter
from fused_lora.distributed import ColwiseLoRA, RowwiseLoRA, tensor_parallel_plan
from fused_lora.ops import linear
from fused_lora.testing import WHOLE_MODEL, assert_close

COLUMNS, ROWS = ("q", "k", "v", "up"), ("o", "down")


def split(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """One plan for layers with adapters and the head, which has none."""
    plan = {f"blocks.*.{name}": ColwiseLoRA() for name in COLUMNS} | {
        f"blocks.*.{name}": RowwiseLoRA() for name in ROWS
    }
    plan["head"] = ColwiseLoRA(output_layouts=Replicate())
    return parallelize_module(model, mesh or init_device_mesh("cpu", (2,)), plan)


def one_batch(dtype):
    return lambda model: loss_of(model, 0, dtype).backward()


def gradients_and_steps(directory: Path) -> None:
    one, exact = (steps(adapted().to(dtype), one_batch(dtype)) for dtype in (torch.float32, torch.float64))
    assert_close(steps(split(adapted()), one_batch(torch.float32)), one, exact, WHOLE_MODEL)


def outputs_are_those_of_the_fused_op_on_shards(directory: Path) -> None:
    want, model, seen = adapted()(batch(0)[0]), split(adapted()), []
    real = linear.eager_apply

    def watched(x, lora_A, lora_B, call):
        seen.append((x.shape[-1], *call[0].shape))  # x's and W's shapes
        return real(x, lora_A, lora_B, call)

    linear.eager_apply = watched
    try:
        torch.testing.assert_close(model(batch(0)[0]), want, rtol=1e-4, atol=1e-4)
    finally:
        linear.eager_apply = real
    assert set(seen) == {(16, 8, 16), (8, 16, 8), (16, 12, 16), (12, 16, 12)} and len(seen) == 12


def placements(directory: Path) -> None:
    layers = dict(split(adapted()).blocks[0].named_children())
    for name in (*COLUMNS, *ROWS):
        layer, column = layers[name], name in COLUMNS
        placed = [t.placements for t in (layer.weight, layer.lora_A["default"], layer.lora_B["default"])]
        want = (Shard(0), Replicate(), Shard(0)) if column else (Shard(1), Shard(1), Replicate())
        assert placed == [(one,) for one in want]
        if layer.bias is not None:
            assert layer.bias.placements == (Shard(0) if column else Replicate(),)
        assert [p.requires_grad for p in layer.parameters()] == [False, *[False] * (layer.bias is not None), True, True]


def no_weight_is_gathered(directory: Path) -> None:
    model = split(adapted())
    with Collectives() as forward:
        loss = loss_of(model, 0)
    assert forward.names == {"all_reduce": 4, "all_gather_into_tensor": 1}  # o and down of each block; the logits
    with Collectives() as backward:
        loss.backward()
    # dA or dB of 12 layers; dx of q, k, v and up, but of the first block's q, k and v, and of the head
    assert backward.names == {"all_reduce": 12 + 5 + 1}
    assert all(p.grad.placements == p.placements for p in trained(model).values())


def dtensors_in_and_out(directory: Path) -> None:
    """Sequence parallelism's layouts, and a batch that is split, take the op on shards or PyTorch's own way."""
    mesh, x = init_device_mesh("cpu", (2,)), batch(0)[0]
    for name, style in (("up", ColwiseLoRA), ("o", RowwiseLoRA)):
        plain = getattr(adapted().blocks[0], name)
        layer = getattr(adapted().blocks[0], name)
        style(input_layouts=Shard(0), output_layouts=Shard(0), use_local_output=False)._apply(layer, mesh)
        y = layer(distribute_tensor(x, mesh, [Shard(0)]))
        assert isinstance(y, DTensor) and y.placements == (Shard(0),)
        torch.testing.assert_close(whole(y), plain(x))
    plain, given = adapted().blocks[0].up, [x]
    given += [t.detach() for t in (plain.weight, plain.lora_A["default"], plain.lora_B["default"], plain.bias)]
    dy = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    for x_placed in (Shard(0), Shard(1), Shard(2), Replicate()):
        leaves = [t.clone().requires_grad_() for t in given]
        want = lora_linear(*leaves[:4], 2.0, bias=leaves[4])
        want.backward(dy)
        placed = [distribute_tensor(t, mesh, [p]) for t, p in zip(given, (x_placed, *[Replicate()] * 4))]
        shards = [t.requires_grad_() for t in placed]
        y = lora_linear(*shards[:4], torch.tensor(2.0), bias=shards[4])
        y.backward(distribute_tensor(dy, mesh, [Replicate()]))
        torch.testing.assert_close(whole(y), whole(want))
        for shard, leaf in zip(shards, leaves):
            torch.testing.assert_close(whole(shard.grad), leaf.grad, rtol=1e-4, atol=1e-5)


def files_are_those_of_a_plain_model(directory: Path) -> None:
    mine = directory / f"of{torch.distributed.get_rank()}"
    save_adapter(adapted(2), mine / "plain")
    save_adapter(split(adapted(2)), mine / "split")
    names = "adapter_model.safetensors", "adapter_config.json"
    assert all((mine / "plain" / name).read_bytes() == (mine / "split" / name).read_bytes() for name in names)
    model = split(adapted())
    load_adapter(model, mine / "plain")
    torch.testing.assert_close(model(batch(0)[0]), adapted(2)(batch(0)[0]), rtol=1e-4, atol=1e-4)


def adapters_are_switched_and_disabled(directory: Path) -> None:
    x = batch(0)[0]
    model = apply_lora(adapted(), 4, target_modules=["q", "o"], adapter_name="other")
    split(model)
    set_adapter(model, None)
    torch.testing.assert_close(model(x), Decoder()(x))
    set_adapter(model, "other")  # fresh, so the base model's
    torch.testing.assert_close(model(x), Decoder()(x))
    set_adapter(model, "default")
    torch.testing.assert_close(model(x), adapted()(x), rtol=1e-4, atol=1e-4)


def several_act_together(directory: Path) -> None:
    x, outputs = batch(0)[0], []
    for style in (ColwiseLoRA(output_layouts=Replicate()), None):
        layer = adapted().blocks[0].q
        layer.add_adapter("other")
        torch.manual_seed(1)
        nn.init.normal_(layer.lora_A["other"])
        nn.init.normal_(layer.lora_B["other"])
        layer.set_adapter(["default", "other"])
        if style is not None:
            parallelize_module(layer, init_device_mesh("cpu", (2,)), style)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def transposed_weights(directory: Path) -> None:
    """transformers' Conv1D holds W as [K, N]; it is split over the same N or K."""
    from transformers.pytorch_utils import Conv1D

    x, mesh = batch(0)[0], init_device_mesh("cpu", (2,))
    for style, split_dim in ((ColwiseLoRA(output_layouts=Replicate()), 1), (RowwiseLoRA(input_layouts=Replicate()), 0)):
        torch.manual_seed(0)
        plain = nn.Sequential(Conv1D(24, 16))
        layer = copy.deepcopy(apply_lora(plain, 4))[0]
        nn.init.normal_(layer.lora_B["default"])
        want = layer(x)
        parallelize_module(layer, mesh, style)
        assert layer.weight.placements == (Shard(split_dim),)
        torch.testing.assert_close(layer(x), want)


def dropout(directory: Path) -> None:
    """With the masks fixed the update is linear in A and in B, so <y - base, dy> = <A, dA> = <B, dB>."""
    x, mesh = batch(0)[0], init_device_mesh("cpu", (2,))
    for name, style in (("up", ColwiseLoRA(output_layouts=Replicate())), ("o", RowwiseLoRA(input_layouts=Replicate()))):
        layer = parallelize_module(getattr(adapted(lora_dropout=0.5).blocks[0], name), mesh, style)
        torch.manual_seed(5)
        y = layer(x)
        assert not torch.equal(y, layer(x))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        y.backward(dy)
        layer.set_adapter(None)
        base = layer(x)
        want = ((y - base) * dy).sum()
        for t in (layer.lora_A["default"], layer.lora_B["default"]):
            torch.testing.assert_close((whole(t) * whole(t.grad)).sum(), want, rtol=1e-4, atol=1e-4)


def copied_head(directory: Path) -> None:
    """A module that is trained in full is split as a plain layer is."""
    x = batch(0)[0]
    plain, model = adapted(modules_to_save=["head"]), split(adapted(modules_to_save=["head"]))
    assert_close({"y": model(x)}, {"y": plain(x)}, {"y": plain.double()(x.double())})
    assert model.head.current().weight.placements == (Shard(0),)


def plan_of_transformers(directory: Path) -> None:
    """A Llama by its own plan: heads and MLP are split, logits come back whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids, mesh = torch.arange(12).view(2, 6), init_device_mesh("cpu", (2,))
    found = []
    for splits, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
        model = apply_lora(LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)), 4)
        g = torch.Generator().manual_seed(1)
        for p in trained(model).values():
            nn.init.normal_(p, std=0.1, generator=g)
        if splits:
            parallelize_module(model, mesh, tensor_parallel_plan(model))
            assert model.model.layers[0].self_attn.q_proj.lora_B["default"].placements == (Shard(0),)
        output = model.to(dtype)(input_ids=ids, labels=ids)
        output.loss.backward()
        found.append({"logits": output.logits} | {name: whole(p.grad) for name, p in trained(model).items()})
    assert_close(*found, WHOLE_MODEL)
    with pytest.raises(
        ValueError, match="model must have a tp_plan, as transformers' models do; got a Decoder without"
    ):
        tensor_parallel_plan(adapted())
    model.tp_plan = {"model.layers.*.mlp.gate_proj": "packed_colwise"}
    with pytest.raises(ValueError, match="by linear layers alone; got 'packed_colwise' for model.layers"):
        tensor_parallel_plan(model)


def both_kinds_of_parallelism(directory: Path) -> None:
    """FSDP2 over a mesh of one by two, whose second dimension splits layers."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = split(adapted(), mesh["tensor"])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["data"])
    one, exact = (steps(adapted().to(dtype), one_batch(dtype)) for dtype in (torch.float32, torch.float64))
    assert_close(steps(model, one_batch(torch.float32)), one, exact, WHOLE_MODEL)
    assert model.blocks[0].q.weight.device_mesh.ndim == 2


def checkpoints_come_back(directory: Path) -> None:
    """torch.distributed.checkpoint writes each process's part and puts it back."""
    models = [split(adapted(seed)) for seed in (1, 2)]
    states = [get_model_state_dict(model) for model in models]
    dcp.save(states[0], checkpoint_id=directory / "checkpoint")
    dcp.load(states[1], checkpoint_id=directory / "checkpoint")
    set_model_state_dict(models[1], states[1])
    torch.testing.assert_close(models[1](batch(0)[0]), adapted()(batch(0)[0]), rtol=1e-4, atol=1e-4)


def what_is_not_served_is_refused(directory: Path) -> None:
    mesh, model = init_device_mesh("cpu", (2,)), split(adapted())
    before = {name: id(p) for name, p in model.named_parameters()}
    layer = model.blocks[0].q
    with pytest.raises(ValueError, match="a layer must be whole to be split; got a weight placed"):
        parallelize_module(layer, mesh, RowwiseLoRA())
    with pytest.raises(ValueError, match="model must not be sharded to be merged"), merged(model):
        pass
    with pytest.raises(ValueError, match="weight must be a plain .*DTensor"):
        layer.merge()
    with pytest.raises(ValueError, match="model must not be sharded when adapters are added"):
        apply_lora(model, adapter_name="second")
    assert before == {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="x, weight, lora_A, lora_B must be DTensors all or none.*got DTensors for we"):
        LoRALinear.forward(layer, batch(0)[0])
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    around = LoRALinear.from_linear(hooked)
    with pytest.raises(ValueError, match="a layer must have its weight itself to be split; got one around a Linear"):
        parallelize_module(around, mesh, ColwiseLoRA())
    whole_layer = adapted().blocks[0].q
    whole_layer.merge()
    with pytest.raises(ValueError, match="a layer must be unmerged to be split; got adapter 'default' merged"):
        parallelize_module(whole_layer, mesh, ColwiseLoRA())


CHECKS = [
    gradients_and_steps,
    outputs_are_those_of_the_fused_op_on_shards,
    placements,
    no_weight_is_gathered,
    dtensors_in_and_out,
    files_are_those_of_a_plain_model,
    adapters_are_switched_and_disabled,
    several_act_together,
    transposed_weights,
    dropout,
    copied_head,
    plan_of_transformers,
    both_kinds_of_parallelism,
    checkpoints_come_back,
    what_is_not_served_is_refused,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check, found):
    assert found[check] == [None, None], "\n".join(map(str, found[check]))


if __name__ == "__main__":
    run_checks(CHECKS, int(sys.argv[1]), Path(sys.argv[2]))
