"""Several adapters at once, and one made of several: what PEFT computes with the same tensors."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fused_lora import add_weighted_adapter
from fused_lora.adapters import apply_lora, load_adapter, merge_and_unload, merged, save_adapter, set_adapter
from fused_lora.nn import LoRALayer

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))
TARGETS = {"a": ["up", "down", "vectors"], "b": ["up", "wide", "vectors"], "c": ["up", "conv"]}
RANKS = {"a": 3, "b": 5, "c": 3}


class Hooked(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vectors, self.up, self.wide = nn.Embedding(20, 8), nn.Linear(8, 12), Hooked(12, 12)
        self.down, self.conv, self.head = Conv1D(8, 12), nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.down(torch.relu(self.wide(self.up(self.vectors(tokens)))))
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A PEFT model with all adapters, and their folders."""
    directory = tmp_path_factory.mktemp("several")
    model = None
    for seed, name in enumerate(TARGETS):
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=4 + seed, target_modules=TARGETS[name], lora_dropout=0.0)
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    model.save_pretrained(directory)
    return model.eval(), directory


def ours(directory) -> nn.Module:
    model = Net()
    for name in TARGETS:
        load_adapter(model, directory / name, name)
    return model.eval()


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("names", [["a", "b"], ["c", "a", "b"], ["b"], ["a", "b", "a"]])
def test_the_updates_of_several_are_added(files, names):
    theirs, directory = files
    model = ours(directory)
    set_adapter(model, names)
    theirs.base_model.set_adapter(names)
    assert model.up.active_adapters == names
    want, got = theirs(TOKENS), model(TOKENS)
    near(got, want)
    for output in (want, got):
        output.square().sum().backward()
    grads = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            grads[name.removeprefix("base_model.model.").replace("embedding_", "").removesuffix(".weight")] = parameter
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(grads)
    for name, parameter in model.named_parameters():
        if name in trained:
            near(parameter.grad, grads[name].grad)
    theirs.zero_grad()
    before = model(TOKENS)
    with merged(model):
        near(model(TOKENS), want)
    assert torch.equal(model(TOKENS), before) and model.up.active_adapters == names
    set_adapter(model, None)
    with merged(model, names):
        near(model(TOKENS), want)
    plain = merge_and_unload(model, names)
    assert not any(isinstance(module, LoRALayer) for module in plain.modules())
    near(plain(TOKENS), want)


def test_each_adapter_has_its_own_dropout():
    model = Net()
    for name, dropout in (("a", 0.0), ("b", 0.5)):
        apply_lora(model, 2, target_modules=["up", "wide"], lora_dropout=dropout, adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape[-1] == 2:  # B
                nn.init.normal_(parameter)
    set_adapter(model, ["a", "b"])
    torch.manual_seed(0)
    first, second = model(TOKENS), model(TOKENS)
    assert not torch.equal(first, second)
    near(model.eval()(TOKENS), model(TOKENS))
    first.sum().backward()
    assert all(model.up.lora_A[name].grad.abs().max() > 0 for name in "ab")


def test_several_are_set_and_deleted_by_name(files, tmp_path):
    model = ours(files[1])
    for wrong, message in ((["a", "x"], "adapter_name must be one of"), ("x", "adapter_name must be one of")):
        with pytest.raises(ValueError, match=message):
            set_adapter(model, wrong)
    set_adapter(model, ["a", "b"])
    twin = copy.deepcopy(model)
    near(twin(TOKENS), model(TOKENS))
    model.up.delete_adapter("a")
    assert model.up.active_adapter == "b" and twin.up.active_adapter == ["a", "b"]
    set_adapter(twin, [])
    near(twin(TOKENS), Net()(TOKENS))
    saved = apply_lora(Net(), 2, target_modules=["up"], modules_to_save=["head"], adapter_name="a")
    apply_lora(saved, 2, target_modules=["up"], modules_to_save=["head"], adapter_name="b")
    with pytest.raises(ValueError, match=r"must name one adapter that trains a copy of head; got \['a', 'b'\]"):
        set_adapter(saved, ["a", "b"])
    assert saved.up.active_adapter == "b"


def test_a_layer_that_cannot_switch_is_found_before_others_have(refuses):
    model = apply_lora(Net(), 2, target_modules=["up", "head"], adapter_name="b")
    apply_lora(model, 2, 2, target_modules=["head"], allora_eta=1.0, adapter_name="a")
    with refuses(model, r"ALLoRA adapter 'a' must act alone; got \['a', 'b'\]"):
        set_adapter(model, ["a", "b"])
    model.head.merge()
    with refuses(model, r"^head: adapter 'a' is merged, unmerge\(\) before switching; got 'b'"):
        set_adapter(model, "b")


@pytest.mark.parametrize(
    "kind, names, weights, options",
    [
        ("cat", ["a", "b", "c"], [0.7, -1.2, 2.0], {}),
        ("linear", ["a", "c"], [0.7, -1.2], {}),
        ("linear", ["b"], [-0.5], {}),
        ("svd", ["a", "b"], [0.7, -1.2], {}),
        ("svd", ["a", "b"], [1.0, 0.3], {"svd_rank": 2}),
        ("svd", ["b"], [2.0], {}),
    ],
)
def test_weighted(files, tmp_path, kind, names, weights, options):
    theirs, directory = copy.deepcopy(files[0]), files[1]
    model = ours(directory)
    before = model(TOKENS)
    add_weighted_adapter(model, names, weights, "mixed", kind, **options)
    assert torch.equal(model(TOKENS), before) and not model.up.lora_A["mixed"].requires_grad
    set_adapter(model, "mixed")
    theirs.base_model.add_weighted_adapter(names, weights, "mixed", kind, **options)
    theirs.set_adapter("mixed")
    near(model(TOKENS), theirs(TOKENS))
    save_adapter(model, tmp_path / "ours", "mixed")
    theirs.save_pretrained(tmp_path, selected_adapters=["mixed"])
    got, want = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "mixed" / WEIGHTS)
    want = {key: value for key, value in want.items() if ".lora_" in key}
    assert {key: t.shape for key, t in got.items()} == {key: t.shape for key, t in want.items()}
    if kind != "svd":
        for key in want:
            near(got[key], want[key])
    near(load_adapter(Net(), tmp_path / "ours").eval()(TOKENS), theirs(TOKENS))


def test_a_copy_of_a_module_goes_along():
    model = apply_lora(Net(), 2, target_modules=["up"], modules_to_save=["head"], adapter_name="a")
    nn.init.normal_(model.head.modules_to_save["a"].weight)
    apply_lora(model, 2, target_modules=["up"], adapter_name="b")
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "mixed")
    set_adapter(model, "mixed")
    assert torch.equal(model.head.weight, model.head.modules_to_save["a"].weight)
    assert model.head.weight is not model.head.modules_to_save["a"].weight
    apply_lora(model, 2, target_modules=["up"], modules_to_save=["head"], adapter_name="c")
    with pytest.raises(ValueError, match="must not train several copies of one module; got 2 of head"):
        add_weighted_adapter(model, ["a", "c"], [1.0, 1.0], "other")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a", "x"], [1, 1], "new"), r"adapters must be one of \['a', 'b', 'c'\]; got 'x'"),
        (([], [], "new"), "adapters must be different names, one at least"),
        ((["a", "a"], [1, 1], "new"), "adapters must be different names"),
        ((["a", "b"], [1], "new"), "weights must be 2 finite numbers"),
        ((["a", "b"], 0.5, "new"), "weights must be 2 finite numbers, one for each adapter; got 0.5"),
        ((["a", "b"], ["x", 1], "new"), r"weights must be 2 finite numbers, one for each adapter; got \['x', 1\]"),
        ((["a", "b"], "12", "new"), "weights must be 2 finite numbers, one for each adapter; got '12'"),
        ((["a", "b"], [1, float("nan")], "new"), "weights must be 2 finite numbers"),
        ((["a", "b"], [1, 1], "c"), "adapter_name must be new to the model"),
        ((["a", "b"], [1, 1], "new", "ties"), "combination_type must be one of linear, cat, svd; got 'ties'"),
        ((["a", "b"], [1, 1], "new", "linear"), r"one rank for combination_type 'linear'; got \[3, 5\]"),
        ((["a", "b"], [1, 1], "new", "svd", 0), "r must be an int >= 1; got 0"),
    ],
)
def test_wrong_weighted_arguments_change_nothing(files, refuses, arguments, message):
    model = ours(files[1])
    with refuses(model, message):
        add_weighted_adapter(model, *arguments)


def every_kind(names) -> nn.Module:
    """A model in which two adapters sit in layers of every kind, the named ones active."""
    model = Net()
    for name in ("a", "b"):
        apply_lora(model, 2, target_modules=["vectors", "up", "wide", "down", "conv"], adapter_name=name)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    set_adapter(model, names)
    return model.eval()


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("names", ["a", ["a", "b"]])
def test_every_kind_compiles_into_one_graph(names):
    model = every_kind(names)
    want = model(TOKENS)
    grads = gradients(model, want)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS)
    near(output, want)
    got = gradients(model, output)
    assert got.keys() == grads.keys() and len(got) == 5 * 2 * len(names)
    for name in grads:
        near(got[name], grads[name])


@pytest.mark.parametrize("names", ["a", ["a", "b"]])
@pytest.mark.parametrize("how", ["offloaded", "dispatched"])
def test_every_kind_is_offloaded(how, names, tmp_path):
    from accelerate import cpu_offload, dispatch_model

    here, away = every_kind(names), every_kind(names)
    cpu_offload(away) if how == "offloaded" else dispatch_model(away, {"": "cpu"}, force_hooks=True)
    with torch.no_grad():
        near(away(TOKENS), here(TOKENS))
    for model, name in ((here, "here"), (away, "away")):
        save_adapter(model, tmp_path / name, "b")
    assert (tmp_path / "away" / WEIGHTS).read_bytes() == (tmp_path / "here" / WEIGHTS).read_bytes()


def test_what_a_sum_in_a_file_would_not_be(refuses):
    """Ranks that differ in one layer alone; adapters that took themselves out of the base weight."""
    model = apply_lora(Net(), 4, target_modules=["up", "head"], adapter_name="a")
    apply_lora(model, 4, target_modules=["up", "head"], rank_pattern={"up": 2}, adapter_name="b")
    with refuses(model, r"adapters must have one rank in up for combination_type 'linear'; got \[4, 2\]"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum", "linear")
    model = apply_lora(Net(), 4, target_modules=["up"], init_lora_weights="pissa", adapter_name="a")
    with refuses(model, "must have left the base weight as it was to be combined, .*; got 'a' with .*'pissa'"):
        add_weighted_adapter(model, ["a"], [0.5], "halved")
