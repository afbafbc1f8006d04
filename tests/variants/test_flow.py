"""LoRA-Flow: what it equals with given weights, its gate's gradients, checkpointing, decoding, its file, bad input."""

import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import Stack, filled, gradients
from tiny_llama import TOKENS, llama
from torch import nn
from torch.nn import functional as F

from fused_lora import (
    LoRAFlow,
    apply_lora,
    link_reslora,
    load_adapter,
    lora_linear,
    merged,
    save_adapter,
    set_adapter,
    unload,
)
from fused_lora.testing import assert_close
from fused_lora.variants.flow import FlowGate

RANKS = {"zh": 3, "math": 5, "code": 3}
SCALINGS = {"zh": 2.0, "math": 3.0, "code": 0.5}


def stack(names=("zh", "math"), dtype=torch.float64, ranks=RANKS, **lora) -> nn.Module:
    """Three blocks with adapters of different scalings."""
    model = Stack().to(dtype)
    for name in names:
        apply_lora(model, ranks[name], SCALINGS[name] * ranks[name], adapter_name=name, **lora)
    return filled(model)


def rows(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def formula(model, x, gates, temperature=1.0, names=("zh", "math")):
    """The stack under a flow, in PyTorch's operators; gates: weight and bias by block."""
    for block, (weight, bias) in zip(model.layers, gates):
        w = torch.softmax(F.linear(x, weight) / temperature, -1) + bias

        def linear(layer, x, w=w):
            y = F.linear(x, layer.weight, layer.bias)
            for j, name in enumerate(names):
                if name in layer.lora_A:
                    y = y + w[..., j : j + 1] * SCALINGS[name] * (x @ layer.lora_A[name].T @ layer.lora_B[name].T)
            return y

        x = x + linear(block.down, torch.tanh(linear(block.up, x)))
    return x


def trained(flow: LoRAFlow) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The gates with values far from the start."""
    for gate in flow.gates.values():
        filled(gate, seed=7)
    return [(gate.weight, gate.bias) for gate in flow.gates.values()]


@pytest.mark.parametrize("static", [False, True])
def test_given_weights(static):
    """One-hot is the single adapter, ones are the sum, equal ones the average; removed, all is as before."""
    model, x = stack(), rows()
    set_adapter(model, "zh")
    trains = [parameter.requires_grad for parameter in model.parameters()]
    zh = model(x)
    set_adapter(model, "math")
    math = model(x)
    set_adapter(model, ["zh", "math"])
    both = model(x)
    set_adapter(model, "zh")
    average = formula(model, x, [(torch.zeros(2, 6, dtype=x.dtype), torch.zeros(2, dtype=x.dtype))] * 3)
    for weights, want in [((1, 0), zh), ((0, 1), math), (None, math), ((1, 1), both), ((0.5, 0.5), average)]:
        flow = LoRAFlow(model, ["zh", "math"], weights, static=static)
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
        flow.remove()
        flow.remove()
        assert torch.equal(model(x), zh) and [parameter.requires_grad for parameter in model.parameters()] == trains
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)


def test_a_gate_at_its_start_is_static_fusion():
    model, x = stack(), rows()
    flow = LoRAFlow(model, ["math", "zh"], [0.7, -0.2], temperature=1.3)
    y = model(x)
    flow.remove()
    flow = LoRAFlow(model, ["math", "zh"], [0.7, -0.2], static=True)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    with merged(model):  # weights that don't depend on the token are part of the matrix
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert not list(flow.parameters())


@pytest.mark.parametrize("ranks", [RANKS, dict.fromkeys(RANKS, 2)], ids=["ranks", "rank"])
@pytest.mark.parametrize("names", [("zh", "math"), ("math", "code", "zh")], ids=len)
def test_gradients_of_the_gate(ranks, names):
    """Adapters of one rank and of several, one of them in some layers only."""
    model, x = stack(("zh", "math"), ranks=ranks), rows()
    if "code" in names:
        apply_lora(model, ranks["code"], SCALINGS["code"] * ranks["code"], adapter_name="code", target_modules=["down"])
        filled(model)
    flow = LoRAFlow(model, names, temperature=1.1)
    want = formula(model, x, trained(flow), 1.1, names)
    want.square().sum().backward()
    grads, dx = gradients(model), x.grad.clone()
    assert len(grads) == 6 == len(list(flow.parameters()))
    model.zero_grad()
    x.grad = None
    y = model(x)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    y.square().sum().backward()
    torch.testing.assert_close([x.grad, gradients(model)], [dx, grads], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [RANKS, dict.fromkeys(RANKS, 4)], ids=["ranks", "rank"])
def test_back_ends(ranks, backend, monkeypatch):
    if backend.name == "cuda":
        pytest.skip("the compiled CUDA kernels take plain LoRA only")
    monkeypatch.setattr(
        "fused_lora.nn.linear.lora_linear", lambda *args, **kw: lora_linear(*args, **kw, backend=backend.name)
    )
    model, x = stack(dtype=torch.float32, ranks=ranks).to(backend.device), rows(torch.float32).detach()
    x = x.to(backend.device)
    gates = trained(LoRAFlow(model, ["zh", "math"]))

    def found(y, model):
        model.zero_grad()
        y.square().mean().backward()
        return {"y": y.detach(), "gradients": torch.cat([grad.flatten() for grad in gradients(model).values()])}

    exact = copy.deepcopy(model).double()
    doubles = [(block.lora_flow_gate.weight, block.lora_flow_gate.bias) for block in exact.layers]
    truth, same_dtype = found(formula(exact, x.double(), doubles), exact), found(formula(model, x, gates), model)
    assert_close(found(model(x), model), same_dtype, truth)


def test_trained_adapters_get_their_gradients():
    """Whoever lets them train beside the gate."""
    model, x = stack(), rows()
    gates = trained(LoRAFlow(model, ["zh", "math"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    formula(model, x, gates).square().sum().backward()
    grads = gradients(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(grads) == 30
    torch.testing.assert_close(gradients(model), grads, rtol=1e-10, atol=1e-10)


def test_a_scaling_that_is_a_tensor_is_noticed():
    model = stack()
    LoRAFlow(model, ["zh", "math"], [0.5, 0.5])
    scaling = model.layers[0].up.scaling["zh"] = torch.tensor(2.0, dtype=torch.float64)
    y = model(rows())
    scaling.mul_(2)
    assert not torch.allclose(model(rows()), y)


def test_changed_adapters_count():
    """One A and B are kept, also from inference mode, until an adapter changes in place, by assignment or by .to()."""
    model, x = stack(), rows().detach()
    gates = trained(LoRAFlow(model, ["zh", "math"]))
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    with torch.no_grad():
        model.layers[0].up.lora_A["zh"].add_(1)
    torch.testing.assert_close(model(x), formula(model, x, gates), rtol=0, atol=1e-12)
    model.load_state_dict({name: t + 0.1 for name, t in model.state_dict().items()}, assign=True)
    gates = [(block.lora_flow_gate.weight, block.lora_flow_gate.bias) for block in model.layers]
    torch.testing.assert_close(model(x), formula(model, x, gates), rtol=0, atol=1e-12)
    assert model.float()(x.float()).dtype == torch.float32


@pytest.fixture(scope="module")
def language():
    """A tiny Llama under a flow of adapters of different ranks in different layers."""
    model = llama()
    apply_lora(model, 4, 8, adapter_name="zh")
    apply_lora(model, 2, 6, ["q_proj", "down_proj"], adapter_name="math")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    flow = LoRAFlow(model, ["zh", "math"], [0.5, 0.5])
    trained(flow)
    return model, flow


def test_checkpointing_recomputes_the_same(language):
    model, flow = language

    def step():
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return gradients(model)

    model.train()
    want = step()
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(step(), want, rtol=0, atol=0)
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    assert len(want) == 4 and all(grad.abs().max() > 0 for grad in want.values())
    assert not any(hooks._frames for hooks in flow._hooks)
    model.eval()


def test_decoding_with_a_cache(language):
    model, _ = language
    arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(TOKENS[:1, :5], use_cache=True, **arguments),
        model.generate(TOKENS[:1, :5], use_cache=False, **arguments),
    )


def test_threads_have_their_own_weights(language):
    model, _ = language
    inputs = [torch.randint(128, (1, 8), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with torch.no_grad():
        want = [model(tokens).logits for tokens in inputs]
    wrong = []

    def run(n):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(model(inputs[n]).logits, want[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_pickles_and_compiled_models_flow():
    model, x = stack(), rows()
    trained(LoRAFlow(model, ["zh", "math"]))
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
        filled(twin.layers[1].lora_flow_gate, seed=8)  # its own, not the first one's
        assert torch.equal(model(x), want) and not torch.allclose(twin(x), want)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    torch.compiler.reset()


def test_a_failed_forward_leaves_nothing():
    model = stack()
    flow = LoRAFlow(model, ["zh", "math"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 7, dtype=torch.float64))
    assert not any(hooks._frames for hooks in flow._hooks)


def test_a_forward_that_does_not_begin_raises_its_own_error_alone(recwarn):
    """In our hook, which wants a tensor, and in one before it: what is called at the end does not fail beside it."""
    model = stack()
    flow = LoRAFlow(model, ["zh", "math"])
    with pytest.raises(ValueError, match="a linked block must be given a tensor; got 1 arguments without one"):
        model.layers[0]("no tensor")

    def fails(*_):
        raise KeyError("mine")

    model.layers[0].register_forward_pre_hook(fails, prepend=True)
    with pytest.raises(KeyError, match="mine"):
        model(rows())
    assert not [str(warning.message) for warning in recwarn] and not any(hooks._frames for hooks in flow._hooks)


def test_files(language, tmp_path):
    model, flow = language
    with torch.no_grad():
        want = model(TOKENS).logits
    flow.save(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items() if "lora_flow_gate" in name}
    file = load_file(tmp_path / "lora_flow.safetensors")
    assert file.keys() == {name.replace(".lora_flow_gate", "") for name in state}
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        flow.load(tmp_path)
        assert torch.equal(model(TOKENS).logits, want)
    with pytest.raises(FileNotFoundError, match="lora_flow.safetensors"):
        flow.load(tmp_path / "nowhere")
    other = stack()
    pair = LoRAFlow(other, ["zh", "math"], temperature=1.5)
    with pytest.raises(ValueError, match=r"must have layers.0.weight of shape \[2, 6\]; got None"):
        pair.load(tmp_path)
    pair.save(tmp_path)
    pair.remove()
    with pytest.raises(ValueError, match=r"must weight adapters \['math', 'zh'\]; got \['zh', 'math'\]"):
        LoRAFlow(other, ["math", "zh"]).load(tmp_path)
    again = LoRAFlow(stack(), ["zh", "math"])
    again.load(tmp_path)
    assert {gate.temperature for gate in again.gates.values()} == {1.5}
    tensors, about = load_file(tmp_path / "lora_flow.safetensors"), {"adapters": '["zh", "math"]'}
    for bad in ("0.0", "nan", "-1.0", "inf"):
        save_file(tensors, tmp_path / "lora_flow.safetensors", about | {"temperature": bad})
        with pytest.raises(ValueError, match=f"file of LoRAFlow.save; got temperature must be a number > 0; got {bad}"):
            again.load(tmp_path)
    assert {gate.temperature for gate in again.gates.values()} == {1.5}
    save_file({"a": torch.zeros(1)}, tmp_path / "lora_flow.safetensors")
    with pytest.raises(ValueError, match="must be a file of LoRAFlow.save"):
        again.load(tmp_path)
    with pytest.raises(ValueError, match="save\\(\\) needs gates"):
        pair.save(tmp_path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: LoRAFlow(m, "zh"), "adapters must be different names, one at least; got 'zh'"),
        (lambda m: LoRAFlow(m, ["zh", "zh"]), "adapters must be different names"),
        (lambda m: LoRAFlow(m, ["zh", "mth"]), r"adapters must be one of .*got 'mth' \(did you mean 'math'\?\)"),
        (lambda m: LoRAFlow(m, ["zh", "math"], [1]), "init_weights must be 2 finite numbers, one for each adapter"),
        (lambda m: LoRAFlow(m, ["zh", "math"], 0.5), "init_weights must be 2 finite numbers, .*; got 0.5"),
        (lambda m: LoRAFlow(m, ["zh", "math"], ["x", 1]), "init_weights must be 2 finite numbers, .*; got .'x', 1]"),
        (lambda m: LoRAFlow(m, ["zh", "math"], temperature=0.0), "temperature must be a number > 0; got 0.0"),
        (lambda m: LoRAFlow(m, ["zh", "math"], temperature="1"), "temperature must be a number > 0; got '1'"),
        (lambda m: (LoRAFlow(m, ["zh"]), LoRAFlow(m, ["zh"])), "LoRA-Flow and LoRA-Flow over .* exclude each other"),
        (
            lambda m: (LoRAFlow(m, ["zh"]), merged(m).__enter__()),
            r"merging and LoRA-Flow over .*zh.* exclude each other",
        ),
        (lambda m: (link_reslora(m, "block"), LoRAFlow(m, ["zh"])), "LoRA-Flow and ResLoRA's block shortcut exclude"),
        (
            lambda m: (LoRAFlow(m, ["zh"]), unload(m)),
            r"LoRA-Flow over adapters \['zh'\] must be removed, by its remove",
        ),
        *(
            (
                lambda m, names=names: (LoRAFlow(m, ["zh", "math"]), set_adapter(m, names)),
                r"LoRA-Flow over .* must be removed, by its remove\(\), before set_adapter acts on",
            )
            for names in ("math", ["zh", "math"], None)
        ),
        (
            lambda m: (LoRAFlow(m, ["zh"]), apply_lora(m, 2, adapter_name="new")),
            r"LoRA-Flow over .* must be removed, by its remove\(\), before an adapter is added to",
        ),
        (lambda m: (LoRAFlow(m, ["zh"]), m.layers[0].up.set_adapter("math"), m(rows())), "and set_adapter excludes it"),
        (lambda m: (LoRAFlow(m, ["zh"]), m.layers[0].up(rows())), "needs its layers to be called by their block"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    model = stack()
    with pytest.raises(ValueError, match=message):
        call(model)


def test_the_adapters_stay_frozen_under_a_flow():
    """With the biases of the base that train with one."""
    model = stack(("zh",), bias="all")
    apply_lora(model, 2, adapter_name="math")
    LoRAFlow(model, ["zh", "math"])
    before = {name: t.requires_grad for name, t in model.named_parameters()}
    for names in ("zh", ["zh", "math"]):
        with pytest.raises(ValueError, match="before set_adapter acts on"):
            set_adapter(model, names)
    assert before == {name: t.requires_grad for name, t in model.named_parameters()}
    assert all("lora_flow_gate" in name for name, trains in before.items() if trains)
    model(rows()).sum().backward()
    assert not any("lora_A" in name or "lora_B" in name for name, t in model.named_parameters() if t.grad is not None)


def test_an_adapter_under_a_flow_is_not_read_again(tmp_path):
    model = stack()
    save_adapter(model, tmp_path, "zh")
    filled(model, seed=9)
    LoRAFlow(model, ["zh", "math"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"LoRA-Flow over .* must be removed, by its remove\(\), before set_adapter"):
        load_adapter(model, tmp_path, "zh")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_refused_flow_changes_nothing():
    """Also where an adapter turns out to sit outside the blocks."""
    model = nn.ModuleDict({"body": Stack(), "head": nn.Linear(6, 6)})
    apply_lora(model, 2, adapter_name="zh")
    apply_lora(model, 2, adapter_name="math", target_modules=["up"])
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(
        ValueError, match="LoRA-Flow needs adapters that act in layers of the model's blocks.* got head"
    ):
        LoRAFlow(model, ["zh", "math"])
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert model["head"].active_adapter is None and model["body"].layers[0].up.active_adapter == "math"


def test_a_flow_that_fails_on_the_way_leaves_nothing(monkeypatch):
    model, x = stack(), rows()
    want, before = model(x), [(name, p.requires_grad) for name, p in model.named_parameters()]
    made = []

    def gate(*args, **kwargs):
        if made:
            raise MemoryError
        made.append(FlowGate(*args, **kwargs))
        return made[0]

    monkeypatch.setattr("fused_lora.adapters.flow.FlowGate", gate)
    with pytest.raises(MemoryError):
        LoRAFlow(model, ["zh", "math"])
    assert made and [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert torch.equal(model(x), want) and not any(block._forward_hooks for block in model.layers)


def test_tokens_that_are_not_the_blocks():
    model = stack()
    LoRAFlow(model, ["zh", "math"])
    model.layers[1].up.register_forward_pre_hook(lambda layer, args: (args[0][:, :3],))
    with pytest.raises(ValueError, match=r"needs the tokens of the block's input, \[2, 5\], in each of its layers"):
        model(rows())
