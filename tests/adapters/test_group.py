"""Grouped projections: the same as alone, whatever happens between the calls; what is found; nothing is kept."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from stacks import gradients
from tiny_llama import TOKENS, llama, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora
from fused_lora import apply_lora, merge_and_unload, set_adapter
from fused_lora.backends import cpu, pick
from fused_lora.nn import LoRALinear
from fused_lora.nn.grouped import GroupedLoRALinear
from fused_lora.ops.reference import PLAIN
from fused_lora.ops.schema import request_of

ATTENTION = ["q_proj", "k_proj", "v_proj"]


class Three(nn.Module):
    """Three projections of one x; `between` acts on x after the first."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 10), nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.between = lambda x: x

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        return q, self.k(x), self.v(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.three = nn.Linear(6, 6), Three()

    def forward(self, x):
        return torch.cat(self.three(torch.tanh(self.first(x))), dim=-1)


def rows() -> torch.Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()


def net(dropout: float = 0.0, grouped: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(apply_lora(Net(), r=2, lora_alpha=6, lora_dropout=dropout, rank_pattern={"three.k": 3}))
    if grouped:
        assert fused_lora.group(model, rows()) == [["three.q", "three.k", "three.v"]]
    return model.train()


def step(model, x=None):
    """y, dx and the gradients of one step."""
    torch.manual_seed(1)
    model.zero_grad()
    x = rows() if x is None else x
    y = model(x)
    y.square().mean().backward()
    return {"y": y.detach(), "dx": x.grad, **gradients(model)}


def calls(model) -> list[int]:
    """Counts the group's Functions among the nodes of a forward's graph."""
    names, seen, ahead = [], set(), [model(rows()).grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            ahead += [following for following, _ in node.next_functions]
    return names.count("_ProjectionsBackward")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_as_alone(dropout):
    """Values and masks bit for bit, dx up to the order of its sums; what is frozen has no gradient."""
    model, alone = net(dropout), net(dropout, grouped=False)
    assert calls(model) == 1 and calls(alone) == 0
    got, want = step(model), step(alone)
    assert torch.equal(got["y"], want["y"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for frozen in ("three.q.lora_A.default", "three.k.lora_B.default", "first.lora_A.default", "first.lora_B.default"):
        for each in (model, alone):
            each.get_parameter(frozen).requires_grad_(False)
        got, want = step(model, rows().detach()), step(alone, rows().detach())
        assert got.keys() == want.keys() and got["dx"] is None
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dx_is_added_in_the_layers_own_plan(monkeypatch):
    seen, real = [], cpu.backward_onto
    monkeypatch.setattr(cpu, "backward_onto", lambda *given: seen.append(given[-1]) or real(*given))
    model = net()
    step(model)
    q = model.three.q
    usual = pick("auto", request_of(rows(), q.weight, q.lora_A["default"], PLAIN)).plan
    assert seen == [usual] * 2


@pytest.fixture(scope="module")
def language():
    model = randomise(apply_lora(llama(), r=4, lora_dropout=0.1))
    twin = copy.deepcopy(model)
    return model, twin, fused_lora.group(model)


def test_groups_of_a_llama(language):
    model, _, groups = language
    parts = [[f"model.layers.{n}.self_attn.{name}" for name in ATTENTION] for n in (0, 1)]
    parts += [[f"model.layers.{n}.mlp.{name}" for name in ("gate_proj", "up_proj")] for n in (0, 1)]
    assert sorted(groups) == sorted(parts) and fused_lora.group(model) == []
    assert not any(module.training for module in model.modules())


def test_a_llama_trains_the_same_under_checkpointing(language):
    model, twin, _ = language

    def losses(model):
        model.train()
        torch.manual_seed(2)
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        model.eval()
        return gradients(model)

    want = losses(twin)
    torch.testing.assert_close(losses(model), want, rtol=1e-4, atol=1e-6)
    for each in (model, twin):
        each.enable_input_require_grads()
    for reentrant in (False, True):
        for each in (model, twin):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(losses(model), losses(twin), rtol=1e-4, atol=1e-6)
    for each in (model, twin):
        each.gradient_checkpointing_disable()
        each.disable_input_require_grads()


def written(x):
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.parametrize("between", [lambda x: x.clone(), written], ids=["another", "written"])
def test_another_x_is_computed_alone(between):
    model, alone = net(), net(grouped=False)
    for each in (model, alone):
        each.three.between = between
        each.first.requires_grad_(False)  # what is written to must have been saved for no gradient
        for layer in (each.three.q, each.three.k, each.three.v):
            layer.lora_A.requires_grad_(False)
    got, want = step(model, rows().detach()), step(alone, rows().detach())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    model.three.between = alone.three.between = lambda x: x
    assert calls(model) == 0  # and so it stays


def _scaled_factor(model):
    with torch.no_grad():
        model.three.k.lora_A["default"].mul_(3)


def _other_data(model):
    A = model.three.k.lora_A["default"]
    A.data = A.data * 3


def _other_parameter(model):
    lora_A = model.three.k.lora_A
    lora_A["default"] = nn.Parameter(lora_A["default"].detach() * 3)


CHANGES = {
    "a factor in place": _scaled_factor,
    "a factor's memory": _other_data,
    "a factor replaced": _other_parameter,
    "the base": lambda model: model.three.k.weight.mul_(2),
    "load_state_dict": lambda model: model.load_state_dict({key: 2 * t for key, t in model.state_dict().items()}),
    "the scaling": lambda model: model.three.k.scaling.update(default=7.0),
    "the active adapter": lambda model: set_adapter(model, None),
    "merged": lambda model: model.three.k.merge(),
    "eval": lambda model: model.eval(),
    "a base that trains": lambda model: model.three.k.weight.requires_grad_(True),
    "a scaling that trains": lambda model: model.three.k.scaling.update(default=torch.tensor(3.0, requires_grad=True)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_layer_that_was_changed_computes_anew(how):
    """After the first layer has computed for it, of the same x."""
    found = []
    for grouped in (True, False):
        model, x = net(dropout=0.5 if how == "eval" else 0.0, grouped=grouped), rows()
        model.three.q(x)
        with torch.no_grad():
            CHANGES[how](model)
        y = model.three.k(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, gradients(model.three.k)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_pre_hook_that_changes_a_layer_acts():
    found = []
    for grouped in (True, False):
        model = net(grouped=grouped)
        model.three.k.register_forward_pre_hook(lambda layer, args: layer.scaling.update(default=7.0))
        found.append(step(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_copy_needs_nothing_that_is_ready():
    """Which belongs to a graph, and such tensors cannot be copied."""
    model, x = net(), rows()
    model.three.q(x)
    twin = copy.deepcopy(model)
    assert not twin.three.q.projections._ready and torch.equal(twin.three.k(x), model.three.k(x))
    pickle.dumps(twin.three.q)


def test_an_x_that_wants_a_gradient_by_now_gets_it():
    found = []
    for grouped in (True, False):
        model, x = net(grouped=grouped), rows().detach()
        model.three.q(x)
        model.three.k(x.requires_grad_()).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_hooks_and_parts_that_are_not_used():
    """A pre-hook that gives one layer another x, an output hook, an output that nothing uses."""
    model, alone = net(), net(grouped=False)
    for each in (model, alone):
        each.three.v.register_forward_hook(lambda layer, args, y: y.detach())
        each.three.k.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    torch.testing.assert_close(step(model), step(alone), rtol=1e-5, atol=1e-6)


def test_who_computes_alone():
    x = rows()
    model = net()
    with torch.no_grad():
        want = model(x)
    assert torch.equal(model(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model) == 0
    with torch.inference_mode():
        assert torch.equal(model(x), want)

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Listening():
        assert calls(model) == 0
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    torch.compiler.reset()
    assert calls(copy.deepcopy(model).double().float()) == 1
    apply_lora(model, r=2, adapter_name="second", target_modules=["k"])
    assert calls(model) == 0  # "second" sits in one of them only
    set_adapter(model, ["default", "second"])
    assert calls(model) == 0
    set_adapter(model, "default")
    assert calls(model) == 1


class Autocast(Three):
    """The second projection is called under autocast."""

    def forward(self, x):
        q = self.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = self.k(x)
        assert k.dtype is torch.bfloat16
        return q, k.float(), self.v(x)


def test_a_part_under_autocast_is_as_alone():
    model, alone = net(), net(grouped=False)
    for each in (model, alone):
        each.three.__class__ = Autocast
    torch.testing.assert_close(step(model), step(alone), rtol=1e-5, atol=1e-6)
    assert calls(model) == 0  # from then on


class Frozen(Three):
    """The second projection is called without gradients."""

    def forward(self, x):
        q = self.q(x)
        with torch.no_grad():
            k = self.k(x)
        return q, k, self.v(x)


def test_a_part_without_gradients_has_none():
    found = []
    for grouped in (True, False):
        model = net(grouped=grouped)
        model.three.__class__ = Frozen
        found.append(step(model))
    torch.testing.assert_close(*found)


def test_backward_again_and_batched_backward():
    model, alone = net(), net(grouped=False)
    for each in (model, alone):
        x = rows()
        (dx,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
        dx.square().sum().backward()
        each.found = x.grad, gradients(each)
        x = rows()
        y = each(x)
        each.batched = torch.autograd.grad(y, x, torch.stack([y, 2 * y]).detach(), is_grads_batched=True)
    torch.testing.assert_close(model.found, alone.found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.batched, alone.batched, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept():
    """Neither after a forward that leaves a layer out, nor after one that fails half-way."""
    model, alive = net(), []
    model.three.q.register_forward_hook(lambda layer, args, y: alive.append(weakref.ref(args[0])))
    model.three.forward = lambda x: (model.three.q(x),)
    model(rows()).sum().backward()
    model.three.forward = lambda x: (model.three.q(x), model.three.k(x) @ x)
    with pytest.raises(RuntimeError):
        model(rows())
    gc.collect()
    assert len(alive) == 2 and not any(ref() for ref in alive)
    assert not model.three.q.projections._ready


def test_threads():
    model = net()
    inputs = [torch.randn(3, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    want, wrong = [model(x) for x in inputs], []

    def run(n):
        for _ in range(50):
            if not torch.equal(model(inputs[n]), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and calls(model) == 1


def test_ungrouped_copies_and_pickles():
    model, x = net(), rows()
    want = model(x)
    for twin in (copy.deepcopy(model), copy.deepcopy(model)):
        assert calls(twin) == 1 and twin.three.q.projections is not model.three.q.projections
        fused_lora.ungroup(twin)
        assert not any(isinstance(module, GroupedLoRALinear) for module in twin.modules())
        assert not twin.three._forward_hooks and torch.equal(twin(x), want) and calls(model) == 1
    three = pickle.loads(pickle.dumps(model.three.q))
    assert type(three) is GroupedLoRALinear
    plain = merge_and_unload(model)
    torch.testing.assert_close(plain(x), want)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="model must have LoRA adapters on linear layers to be grouped"):
        fused_lora.group(Net(), rows())
    with pytest.raises(ValueError, match="inputs must be given for a model that has no dummy_inputs"):
        fused_lora.group(net(grouped=False))
    model = apply_lora(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), r=2)
    assert fused_lora.group(model, rows()) == [] and all(type(model[n]) is LoRALinear for n in (0, 2))
