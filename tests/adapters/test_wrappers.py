"""Whatever wraps a model or its parts: files have the plain model's names, plain files load, and what would be silently
wrong is refused before anything changed."""

import copy
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from fused_lora.adapters import apply_lora, load_adapter, merged, save_adapter, set_adapter
from fused_lora.nn import LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 3 * 8).view(3, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(model: nn.Module) -> nn.Module:
    """Values far from a fresh adapter's in everything that trains."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def adapted(modules_to_save=("head",)) -> nn.Module:
    return trained(apply_lora(Net(), 2, target_modules=["up", "down"], modules_to_save=list(modules_to_save)))


def set_block(model, wrap):
    model.blocks[0] = wrap(model.blocks[0])
    return model


def set_inside_head(model, wrap):
    head = getattr(model.head, "original_module", model.head)  # a wrapper inside a module that is copied
    head[1] = wrap(head[1])
    return model


def set_down(model, wrap):
    model.blocks[1].down = wrap(model.blocks[1].down)
    return model


def compiled(module):
    return torch.compile(module, backend="eager")


def in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


WRAPPERS = {
    "whole compiled": compiled,
    "blocks compiled in place": in_place,
    "one block compiled": lambda m: set_block(m, compiled),
    "data parallel": nn.DataParallel,
    "one block data parallel": lambda m: set_block(m, nn.DataParallel),
    "averaged": AveragedModel,
    "one block checkpointed": lambda m: set_block(m, checkpoint_wrapper),
    "one target checkpointed": lambda m: set_down(m, checkpoint_wrapper),
    "compiled inside a copied module": lambda m: set_inside_head(m, compiled),
    "several, nested": lambda m: compiled(AveragedModel(set_block(m, lambda b: compiled(checkpoint_wrapper(b))))),
}


@pytest.fixture
def plain(tmp_path):
    """The directory of a plain model's adapter."""
    save_adapter(adapted(), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_reads_and_writes_a_plain_model_s_files(wrap, plain, tmp_path):
    want = adapted()(X)
    model = wrap(Net())
    assert load_adapter(model, plain) is model
    torch.testing.assert_close(model(X), want)
    save_adapter(model, tmp_path / "wrapped")
    for name in (WEIGHTS, CONFIG):
        ours, theirs = ((d / name) for d in (tmp_path / "wrapped", plain))
        if name == WEIGHTS:
            assert {k: t.tolist() for k, t in load_file(ours).items()} == {
                k: t.tolist() for k, t in load_file(theirs).items()
            }
        else:
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    after = wrap(adapted())  # adapters first, then the wrapper
    save_adapter(after, tmp_path / "after")
    assert (tmp_path / "after" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_merges_and_switches(wrap, plain):
    model = wrap(Net())
    base = model(X)
    load_adapter(model, plain)
    want = adapted()(X)
    with merged(model):
        torch.testing.assert_close(model(X), want)
    set_adapter(model, None)
    torch.testing.assert_close(model(X), base)
    torch.compiler.reset()


@pytest.mark.parametrize("arguments", [{"target_modules": ["down"]}, {"modules_to_save": ["down"]}])
def test_a_target_that_is_compiled_by_itself_is_refused(arguments):
    model = set_down(Net(), compiled)  # its compiled call would go on to run the old layer
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"blocks\.1\.down must not be compiled by itself .*; got a compiled one"):
        apply_lora(model, **{"target_modules": ["up"], **arguments})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_layer_with_an_adapter_may_be_compiled_by_itself(plain):
    model = set_down(adapted(), compiled)
    want = adapted()(X)
    torch.testing.assert_close(model(X), want)
    load_adapter(model, plain)
    save_adapter(model, plain)
    torch.testing.assert_close(load_adapter(Net(), plain)(X), want)
    torch.compiler.reset()


def inside(model):
    return nn.ModuleDict({"policy": model, "value": nn.Linear(8, 1)})


PEFT = {
    "outside": lambda net, config: get_peft_model(net, config),
    "inside": lambda net, config: inside(get_peft_model(net, config)),
    "injected": lambda net, config: inside(inject_adapter_in_model(config, net)),
    "compiled, inside": lambda net, config: inside(compiled(get_peft_model(net, config))),
}


@pytest.mark.parametrize("put", PEFT.values(), ids=PEFT)
@pytest.mark.parametrize("targets", ["all-linear", ["value"]])
def test_peft_models_are_refused_wherever_they_are(put, targets, plain):
    model = put(Net(), PeftConfig(r=2, target_modules=["up"]))
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for call in (
        lambda: apply_lora(model, target_modules=targets),
        lambda: load_adapter(model, plain),
        lambda: save_adapter(model, plain),
    ):
        with pytest.raises(ValueError, match="model must be the base model; got a .* with PEFT adapters"):
            call()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("meta", ["blocks.1.down", "head", ""])
def test_loading_onto_meta_is_refused(meta, known, plain):
    model = adapted() if known else Net()
    model.get_submodule(meta).to(device="meta")
    want = set(model.state_dict())
    with pytest.raises(ValueError, match=r"model must have its values before load_adapter .* on the meta device"):
        load_adapter(model, plain)
    assert set(model.state_dict()) == want


def test_a_meta_model_takes_adapters_and_refuses_to_save_them(tmp_path):
    model = apply_lora(Net().to(device="meta"), 2)
    assert model.blocks[0].up.lora_A["default"].is_meta and model(X.to("meta")).shape == (3, 4)
    with pytest.raises(ValueError, match=r"must have values to be saved; got .*lora_A\.weight on the meta device"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: weight must be a plain Parameter with values"):
        merged(model).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_after_it_got_adapters(how, plain, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model = apply_lora(adapted(), 3, target_modules=["up"], adapter_name="second")
    set_adapter(model, "default")
    want = adapted()(X)
    offload = cpu_offload if how == "cpu" else lambda m, d: disk_offload(m, tmp_path / "offloaded", d)
    offload(model, torch.device("cpu"))
    assert model.blocks[0].up.lora_A["default"].is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)
        set_adapter(model, "second")
        assert not torch.equal(model(X), want)
        set_adapter(model, "default")
        torch.testing.assert_close(model(X), want)
    save_adapter(model, tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert model.blocks[0].up.lora_A["default"].is_meta
    for call, message in (
        (lambda: load_adapter(model, plain), "offload it afterwards"),
        (lambda: merged(model).__enter__(), r"blocks\.0\.up: weight must be a plain Parameter with values"),
        (model.blocks[0].up.merge, "weight must be a plain Parameter with values"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("how", ["offloaded", "dispatched"])
def test_offloaded_before_it_got_adapters(how, tmp_path):
    from accelerate import cpu_offload, dispatch_model

    saved = ("head",) if how == "dispatched" else ()
    here, away = adapted(saved), Net()
    save_adapter(here, tmp_path / "here")
    cpu_offload(away) if how == "offloaded" else dispatch_model(away, {"": "cpu"}, force_hooks=True)
    assert away.blocks[0].up.weight.is_meta == (how == "offloaded")
    apply_lora(away, target_modules=["up"], adapter_name="second")
    load_adapter(away, tmp_path / "here")
    assert not away.blocks[0].up.lora_A["default"].is_meta
    want, got = here(X), away(X)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(
        away.blocks[0].up.lora_B["default"].grad, here.blocks[0].up.lora_B["default"].grad, rtol=1e-4, atol=1e-3
    )
    save_adapter(away, tmp_path / "away")
    assert (tmp_path / "away" / WEIGHTS).read_bytes() == (tmp_path / "here" / WEIGHTS).read_bytes()


def test_a_failure_half_way_leaves_the_model_as_it_was(plain, monkeypatch):
    made = []
    real = torch.empty

    def failing(*args, **kwargs):
        made.append(args)
        if len(made) == 4:  # B of the second layer
            raise torch.OutOfMemoryError("no more memory")
        return real(*args, **kwargs)

    for model, arguments in ((Net(), {}), (adapted(), {"adapter_name": "second", "modules_to_save": ["head"]})):
        before = [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]
        twin = copy.deepcopy(model)
        for call in (
            lambda: apply_lora(model, target_modules=["up", "down"], **arguments),
            lambda: load_adapter(model, plain, "second"),
        ):
            made.clear()
            monkeypatch.setattr(torch, "empty", failing)
            with pytest.raises(torch.OutOfMemoryError):
                call()
            monkeypatch.setattr(torch, "empty", real)
            assert [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()] == before
            assert torch.equal(model(X), twin(X))
