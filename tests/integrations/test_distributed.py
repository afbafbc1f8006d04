"""Data parallelism in two processes: DistributedDataParallel and FSDP2 give one process's gradients and steps, sharded
checkpoints come back, and what cannot work is refused."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import TARGETS, Decoder, adapted, batch, loss_of, outcomes, run_checks, steps, trained, whole

from fused_lora import LoRALinear, apply_lora, disable_adapter, load_adapter, save_adapter, set_adapter
from fused_lora.schedules import MergeSchedule
from fused_lora.testing import WHOLE_MODEL, assert_close

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model: nn.Module, **how) -> nn.Module:
    """Block by block and the root, as trainers shard: frozen base and trainable adapters in one group."""
    for block in model.blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def my_loss(model: nn.Module) -> None:
    loss_of(model, dist.get_rank()).backward()


def both_losses(dtype: torch.dtype, model: nn.Module) -> None:
    """What the two processes compute together, in one."""
    for part in (0, 1):
        (loss_of(model, part, dtype) / 2).backward()


def equal_to_one_process(model: nn.Module, losses=my_loss, single=both_losses, **lora) -> None:
    one, exact = (steps(adapted(**lora).to(t), partial(single, t)) for t in (torch.float32, torch.float64))
    assert_close(steps(model, losses), one, exact, WHOLE_MODEL)


def replicated(directory: Path) -> None:
    for how in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        equal_to_one_process(DistributedDataParallel(adapted(), **how))


def replicated_with_layers_that_are_not_run(directory: Path) -> None:
    class OneBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted()

        def forward(self, x):
            return self.inner.head(self.inner.blocks[0](x))

    want, model = OneBlock(), DistributedDataParallel(OneBlock(), find_unused_parameters=True)
    both_losses(torch.float32, want)
    my_loss(model)
    for name, p in trained(model).items():
        mine = want.get_parameter(name).grad
        assert (mine is None) == ("blocks.1" in name)
        if mine is not None:
            torch.testing.assert_close(p.grad, mine)


def accumulated(dtype: torch.dtype, model: nn.Module) -> None:
    for part in (0, 1, 2, 3):
        (loss_of(model, part, dtype) / 4).backward()


def replicated_with_accumulation(directory: Path) -> None:
    def losses(model):
        with model.no_sync():
            (loss_of(model, dist.get_rank()) / 2).backward()
        (loss_of(model, 2 + dist.get_rank()) / 2).backward()

    equal_to_one_process(DistributedDataParallel(adapted()), losses, accumulated)


def sharded_in_blocks(directory: Path) -> None:
    for reshard in (True, False):
        model = sharded(adapted(), reshard_after_forward=reshard)
        equal_to_one_process(model)
        assert {p.device_mesh.size() for p in model.parameters()} == {2}


def sharded_with_accumulation(directory: Path) -> None:
    def losses(model):
        for half, last in ((0, False), (2, True)):
            model.set_requires_gradient_sync(last)
            (loss_of(model, half + dist.get_rank()) / 2).backward()

    equal_to_one_process(sharded(adapted()), losses, accumulated)


def sharded_layer_by_layer(directory: Path) -> None:
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            fully_shard(layer)
    equal_to_one_process(sharded(model))


def sharded_with_checkpointing(directory: Path) -> None:
    """The recomputation of a block finds its weights gathered."""
    model = adapted()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    equal_to_one_process(sharded(model))


def sharded_and_compiled(directory: Path) -> None:
    model = adapted()
    model.blocks[1].compile(backend="eager")
    equal_to_one_process(sharded(model))


def sharded_in_mixed_precision(directory: Path) -> None:
    """bf16 in forward and backward over fp32 shards, reduced in fp32: as near to the truth as one process that computes
    in bf16."""
    exact, one = adapted().double(), adapted()
    both_losses(torch.float64, exact)
    for part in (0, 1):
        low = copy.deepcopy(one).bfloat16()
        low.zero_grad()
        loss_of(low, part, torch.bfloat16).backward()
        for p, q in zip(one.parameters(), low.parameters()):
            if p.requires_grad:
                p.grad = (0 if p.grad is None else p.grad) + q.grad.float() / 2
    model = sharded(adapted(), mp_policy=BF16)
    my_loss(model)
    got, peer, want = ({n: whole(p.grad) for n, p in trained(m).items()} for m in (model, one, exact))
    assert_close(got, peer, want, WHOLE_MODEL)


def checkpoints_come_back(directory: Path) -> None:
    """torch.distributed.checkpoint writes model and optimizer of FSDP2, and another run goes on as the first."""
    runs = []
    for seed in (1, 2):
        model = sharded(adapted(seed))
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
        my_loss(model)
        optimizer.step()
        optimizer.zero_grad()
        runs.append((model, optimizer))
    path = directory / "checkpoint"
    states = [dict(zip(("model", "optimizer"), get_state_dict(*run))) for run in runs]
    dcp.save(states[0], checkpoint_id=path)
    dcp.load(states[1], checkpoint_id=path)
    model, optimizer = runs[1]
    set_state_dict(model, optimizer, model_state_dict=states[1]["model"], optim_state_dict=states[1]["optimizer"])
    for model, optimizer in runs:
        my_loss(model)
        optimizer.step()
    first, second = ({name: whole(p) for name, p in run[0].named_parameters()} for run in runs)
    assert len(first) == 48 and all(torch.equal(t, second[name]) for name, t in first.items())


def several_adapters_sharded(directory: Path) -> None:
    """Two that act together train as in one process, another choice is made on the shards, and one is saved whole."""

    def two() -> nn.Module:
        model = adapted()
        apply_lora(model, 2, target_modules=["q", "up"], init_lora_weights=False, adapter_name="other")
        for i, parameter in enumerate(trained(model).values()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        set_adapter(model, ["default", "other"])
        return model

    one, exact = (steps(two().to(dtype), partial(both_losses, dtype)) for dtype in (torch.float32, torch.float64))
    model, want = sharded(two()), two()
    with disable_adapter(model), disable_adapter(want):
        torch.testing.assert_close(model(batch(0)[0]), want(batch(0)[0]))
    for name in ("other", None):
        set_adapter(model, name)
        set_adapter(want, name)
        torch.testing.assert_close(model(batch(0)[0]), want(batch(0)[0]))
    save_adapter(model, directory / f"other{dist.get_rank()}", "other")
    again = load_adapter(Decoder(), directory / f"other{dist.get_rank()}")
    set_adapter(want, "other")
    torch.testing.assert_close(again(batch(0)[0]), want(batch(0)[0]))
    set_adapter(model, ["default", "other"])
    assert_close(steps(model, my_loss), one, exact, WHOLE_MODEL)


def adapters_sharded_by_themselves_are_refused(directory: Path) -> None:
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            fully_shard(layer.lora_A)
            fully_shard(layer.lora_B)
    sharded(model)
    with pytest.raises(ValueError, match=r"must be DTensors all or none \(FSDP shards a whole layer or a block"):
        model(batch(0)[0])


def another_adapter_is_refused_once_replicated(directory: Path) -> None:
    """DistributedDataParallel would leave its gradients as each process has them; what it knows is set and loaded."""
    mine = directory / f"of{dist.get_rank()}"
    save_adapter(adapted(2), mine)
    model = adapted()
    apply_lora(model, 4, target_modules=["q"], adapter_name="other")
    set_adapter(model, "default")
    model = DistributedDataParallel(model)
    want = model(batch(0)[0])
    for call in (
        lambda: set_adapter(model, "other"),
        lambda: set_adapter(model, None),
        lambda: load_adapter(model, mine, "other"),
    ):
        with pytest.raises(ValueError, match=r"after the adapter that trains is set.* that trains \['default'\] for"):
            call()
    torch.testing.assert_close(model(batch(0)[0]), want, rtol=0, atol=0)
    set_adapter(model, "default")
    load_adapter(model, mine)
    torch.testing.assert_close(model(batch(0)[0]), adapted(2)(batch(0)[0]))


def models_of_peft(directory: Path) -> None:
    """Layers of PEFT that `fuse` made ours run the op on what FSDP2 gathers."""
    from peft import LoraConfig, get_peft_model

    from fused_lora.peft import fuse
    from fused_lora.peft import layer as peft_layer

    def model():
        torch.manual_seed(2)
        return get_peft_model(Decoder(), LoraConfig(r=4, target_modules=list(TARGETS), init_lora_weights=False))

    one, exact = (steps(model().to(dtype), partial(both_losses, dtype)) for dtype in (torch.float32, torch.float64))
    ours, calls, real = model(), [], peft_layer.lora_linear
    fuse(ours, strict=True)
    sharded(ours.base_model.model)
    peft_layer.lora_linear = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    try:
        assert_close(steps(ours, my_loss), one, exact, WHOLE_MODEL)
    finally:
        peft_layer.lora_linear = real
    assert len(calls) == 2 * 2 * len(TARGETS)


def replicated_and_merged_in_stages(directory: Path) -> None:
    """A fresh adapter after a merge is the same in both processes, whatever their generators' seeds."""
    model = DistributedDataParallel(adapted())
    with pytest.raises(ValueError, match="ranks must be empty under DistributedDataParallel"):
        MergeSchedule(model, knots=[1], ranks=[4, 2])
    with pytest.raises(ValueError, match="model must not be sharded"):
        MergeSchedule(sharded(adapted()), every=1)
    schedule = MergeSchedule(model, every=1)
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.02)
    for _ in range(3):
        my_loss(model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(optimizer)
    own = [t.clone() for t in model.state_dict().values()]
    for t in own:
        dist.broadcast(t, 0)
    assert all(map(torch.equal, own, model.state_dict().values()))


# ranks of 0 train magnitudes alone
DORA = dict(use_dora=True, rank_pattern={"o": 0, "up": 2})


def dora_replicated(directory: Path) -> None:
    for lora in (DORA, DORA | dict(dora_exact=True)):
        equal_to_one_process(DistributedDataParallel(adapted(**lora)), **lora)


def dora_sharded(directory: Path) -> None:
    """In blocks of which one is compiled and one checkpointed, what is saved offloaded; then layer by layer."""

    def offloaded(model):
        with torch.autograd.graph.save_on_cpu():
            my_loss(model)

    model = adapted(**DORA)
    model.blocks[0].compile(backend="eager")
    model.blocks[1].forward = partial(checkpoint, model.blocks[1].forward, use_reentrant=False)
    equal_to_one_process(sharded(model), offloaded, **DORA)
    lora = DORA | dict(dora_exact=True)
    model = adapted(**lora)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            fully_shard(layer, reshard_after_forward=False)
    equal_to_one_process(sharded(model), **lora)


def dora_s_files_of_shards(directory: Path) -> None:
    mine, model = directory / f"dora{dist.get_rank()}", sharded(adapted(**DORA))
    model(batch(0)[0])
    save_adapter(model, mine)
    torch.testing.assert_close(load_adapter(Decoder(), mine)(batch(0)[0]), adapted(**DORA)(batch(0)[0]))
    save_adapter(adapted(2, **DORA), mine)
    load_adapter(model, mine)
    torch.testing.assert_close(model(batch(0)[0]), adapted(2, **DORA)(batch(0)[0]))


def allora_scales_steps_of_shards(directory: Path) -> None:
    lora = dict(allora_eta=2.0, allora_mode="update")
    equal_to_one_process(DistributedDataParallel(adapted(**lora)), **lora)
    equal_to_one_process(sharded(adapted(**lora)), **lora)
    flat = FullyShardedDataParallel(adapted(**lora), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="allora_mode='update'.* and FullyShardedDataParallel exclude each other"):
        my_loss(flat)


CHECKS = [
    dora_replicated,
    dora_sharded,
    dora_s_files_of_shards,
    allora_scales_steps_of_shards,
    replicated,
    replicated_and_merged_in_stages,
    another_adapter_is_refused_once_replicated,
    replicated_with_layers_that_are_not_run,
    replicated_with_accumulation,
    sharded_in_blocks,
    sharded_with_accumulation,
    sharded_layer_by_layer,
    sharded_with_checkpointing,
    sharded_and_compiled,
    sharded_in_mixed_precision,
    checkpoints_come_back,
    several_adapters_sharded,
    adapters_sharded_by_themselves_are_refused,
    models_of_peft,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check, found):
    assert found[check] == [None, None], "\n".join(map(str, found[check]))


if __name__ == "__main__":
    run_checks(CHECKS, int(sys.argv[1]), Path(sys.argv[2]))
