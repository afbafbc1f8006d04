"""DeepSpeed's ZeRO in two processes: its three stages give one process's steps, files hold whole adapters, and what
cannot work under it is refused."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from quantised_layers import KINDS, K, quantised
from two_processes import TARGETS, Decoder, adapted, batch, loss_of, outcomes, run_checks, trained

from fused_lora import apply_lora, load_adapter, merged, save_adapter
from fused_lora.deepspeed_zero import gathered
from fused_lora.optim import LoRARite, create_lorafa_optimizer
from fused_lora.schedules import MergeSchedule
from fused_lora.testing import WHOLE_MODEL, assert_close

STAGES = (1, 2, 3)


def config(stage: int) -> dict:
    """Of a run in which ZeRO-3 frees every weight behind the module that has used it."""
    zero = dict(
        stage=stage, overlap_comm=False, stage3_param_persistence_threshold=0, stage3_max_live_parameters=0,
        stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0,
    )  # fmt: skip
    return dict(
        train_micro_batch_size_per_gpu=1, gradient_clipping=0.0, zero_allow_untested_optimizer=True,
        zero_optimization=zero,
    )  # fmt: skip


def sgd(model):
    return torch.optim.SGD(trained(model).values(), lr=0.01, momentum=0.9)


def engine_of(model, stage, optimizer=sgd):
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer(model), config=config(stage))[0]


def split(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A model as ZeRO-3 loads it, with the values of any other of its kind."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = kind()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(kind().state_dict())
    assert not any(parameter.numel() for parameter in model.parameters())
    return model


def values(model) -> dict[str, torch.Tensor]:
    parameters = trained(model)
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def stepped(engine) -> dict[str, torch.Tensor]:
    for _ in range(2):
        engine.backward(loss_of(engine, dist.get_rank()))
        engine.step()
    return values(engine.module)


def stepped_by_one(model, dtype) -> dict[str, torch.Tensor]:
    model = model.to(dtype)
    optimizer = sgd(model)
    for _ in range(2):
        for part in (0, 1):
            (loss_of(model, part, dtype) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in trained(model).items()}


def trains_as_one_process_does(directory: Path) -> None:
    for lora in ({}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["head"]}):
        one, exact = (stepped_by_one(adapted(**lora), dtype) for dtype in (torch.float32, torch.float64))
        for stage in STAGES:
            assert_close(stepped(engine_of(adapted(**lora), stage)), one, exact, WHOLE_MODEL)


def a_model_that_zero_3_has_loaded(directory: Path) -> None:
    for lora in ({}, {"use_dora": True}):
        model = apply_lora(split(Decoder), 4, target_modules=list(TARGETS), **lora)
        plain = apply_lora(Decoder(), 4, target_modules=list(TARGETS), **lora)
        with torch.no_grad():
            for parameter, like in zip(trained(model).values(), trained(plain).values(), strict=True):
                if "use_dora" in lora and parameter.dim() == 1:
                    torch.testing.assert_close(parameter, like)  # the norms of rows that were split
                parameter.copy_(like)
        one, exact = (stepped_by_one(plain, dtype) for dtype in (torch.float32, torch.float64))
        assert_close(stepped(engine_of(model, 3)), one, exact, WHOLE_MODEL)


def what_needs_values_is_refused_where_they_are_split(directory: Path) -> None:
    for arguments, message in (
        (dict(modules_to_save=["head"]), "modules_to_save .* must name modules with whole weights, .* got head, which"),
        (dict(init_lora_weights="pissa"), "needs plain linear layers with whole values; got blocks.0.q"),
    ):
        model = split(Decoder)
        with pytest.raises(ValueError, match=message):
            apply_lora(model, 4, **{"target_modules": list(TARGETS), **arguments})
        assert not any(parameter.requires_grad and "lora" in name for name, parameter in model.named_parameters())


class Table(torch.nn.Module):
    """Reads a parameter itself."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.ones(16, 16))

    def forward(self, x):
        return x @ self.rows


def parameters_that_modules_read_are_refused(directory: Path) -> None:
    engine = engine_of(apply_lora(torch.nn.Sequential(Table()), 4, target_modules=[], target_parameters=["0.rows"]), 3)
    with pytest.raises(ValueError, match="target_parameters must leave out what ZeRO-3 splits.*rows"):
        engine(batch(0)[0])


def quantised_bases_train_as_in_one_process(directory: Path) -> None:
    def made(kind):
        model = apply_lora(torch.nn.Sequential(quantised(kind, torch.float32)), 4, target_modules=["0"])
        with torch.no_grad():
            model[0].lora_B["default"].fill_(0.1)
        return model

    def x(part):
        return torch.randn(6, K, generator=torch.Generator().manual_seed(part))

    for kind in KINDS[:4]:  # bitsandbytes'; DeepSpeed refuses the tensors of torchao itself
        torch.manual_seed(1)
        one = made(kind)
        optimizer = sgd(one)
        torch.manual_seed(1)
        engine = engine_of(made(kind), 3)
        for _ in range(2):
            for part in (0, 1):
                (one(x(part)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(x(dist.get_rank())).square().mean())
            engine.step()
        torch.testing.assert_close(values(engine.module), values(one))


class Mixture(torch.nn.Module):
    """x [M, T, 16] to logits [M, T, 32]."""

    def __init__(self):
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
        self.inner = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=4))

    def forward(self, x):
        return self.inner(inputs_embeds=x).logits


def experts_train_as_in_one_process(directory: Path) -> None:
    def made(base):
        model = apply_lora(base, 4, target_parameters=["experts.down_proj", "experts.gate_up_proj"])
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
        return model

    one, exact = (stepped_by_one(made(Mixture()), dtype) for dtype in (torch.float32, torch.float64))
    assert any("experts" in name for name in one)
    for base in (Mixture(), split(Mixture)):
        assert_close(stepped(engine_of(made(base), 3)), one, exact, WHOLE_MODEL)


def files_hold_whole_adapters(directory: Path) -> None:
    x = batch(0)[0]
    for stage in STAGES:
        for lora in ({}, {"use_dora": True, "modules_to_save": ["head"]}):
            for loaded in (False, True)[: 1 + (stage == 3 and not lora)]:
                model = apply_lora(split(Decoder), 4, target_modules=list(TARGETS)) if loaded else adapted(**lora)
                engine = engine_of(model, stage)
                stepped(engine)
                with torch.no_grad():
                    want = engine(x)
                assert want.isfinite().all(), (stage, lora, loaded)
                mine = directory / f"{stage}{len(lora)}{loaded}{dist.get_rank()}"
                save_adapter(engine if loaded else engine.module, mine)
                torch.testing.assert_close(load_adapter(Decoder(), mine)(x), want)


def what_would_be_lost_is_refused(directory: Path) -> None:
    mine = directory / f"again{dist.get_rank()}"
    save_adapter(adapted(), mine)
    for stage in STAGES:
        model = adapted()
        schedule = MergeSchedule.periodic(model, every=9, reset_scheduler=False)
        engine = engine_of(model, stage)
        for inside in (engine, engine.module):
            with pytest.raises(ValueError, match="must not be deepspeed.initialize's yet when adapters are added"):
                apply_lora(inside, adapter_name="second")
            with pytest.raises(ValueError, match="deepspeed.initialize's yet when an adapter is read"):
                load_adapter(inside, mine)
        with pytest.raises(ValueError, match="A and B of blocks.0.q must be the optimizer's own"):
            schedule.step(engine.optimizer.optimizer)
        assert (stage == 3) == (model.blocks[0].q.weight.numel() == 0)
    with pytest.raises(ValueError, match="must not be sharded to be merged"), merged(engine):
        pass


def optimizers_that_need_both_factors_say_so(directory: Path) -> None:
    for optimizer in (lambda model: LoRARite(model, lr=0.1), create_lorafa_optimizer):
        for stage in STAGES:
            engine = engine_of(adapted(), stage, optimizer)
            engine.backward(loss_of(engine, dist.get_rank()))
            with pytest.raises(ValueError, match="needs A and B themselves among its parameters"):
                engine.step()
    engine = engine_of(adapted(allora_eta=2.0, allora_mode="update"), 2)
    with pytest.raises(ValueError, match="allora_mode='update'.* and DeepSpeed's ZeRO, .* exclude each other"):
        loss_of(engine, 0)


def models_of_peft(directory: Path) -> None:
    """`fuse`d layers run on the op, also where ZeRO-3 hooks the modules in them, and PEFT's forward is not called."""
    import peft

    import fused_lora.peft

    def build(dora: bool):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=list(TARGETS), init_lora_weights=False, use_dora=dora)
        return peft.inject_adapter_in_model(config, Decoder())

    def not_fused(self, x, *args, **kwargs):
        raise AssertionError("PEFT's forward")

    for dora in (False, True):
        one, exact = (stepped_by_one(build(dora), dtype) for dtype in (torch.float32, torch.float64))
        for stage in STAGES:
            model = build(dora)
            fused_lora.peft.fuse(model)
            engine = engine_of(model, stage)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(peft.tuners.lora.layer.Linear, "forward", not_fused)
                found = stepped(engine)
            assert_close(found, one, exact, WHOLE_MODEL)
            row = fused_lora.peft.explain(model).rows[0]
            assert ("until ZeRO-3 gathers" in str(row)) == (stage == 3), row


CHECKS = [
    trains_as_one_process_does,
    a_model_that_zero_3_has_loaded,
    what_needs_values_is_refused_where_they_are_split,
    parameters_that_modules_read_are_refused,
    quantised_bases_train_as_in_one_process,
    experts_train_as_in_one_process,
    files_hold_whole_adapters,
    what_would_be_lost_is_refused,
    optimizers_that_need_both_factors_say_so,
    models_of_peft,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return outcomes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check, found):
    assert found[check] == [None, None], "\n".join(map(str, found[check]))


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2"}
    run_checks(CHECKS, int(sys.argv[1]), Path(sys.argv[2]))
