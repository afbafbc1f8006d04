"""torch.compile of whole models with adapters: one graph, few compilations, the values and gradients of eager."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny_llama import randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import LoRALinear, apply_lora, merged, set_adapter
from fused_lora.backends import cpu
from fused_lora.peft import fuse
from fused_lora.testing import WHOLE_MODEL, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def base(layers=1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, vocab_size=64, max_position_embeddings=64))


def adapted(layers=1) -> LlamaForCausalLM:
    return randomise(apply_lora(base(layers), 4, 8)).train()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) * 7 % 64


def grads(model: nn.Module, call, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step through `call`, which runs the model."""
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **trained}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Grows by a name with each call of the CPU back end, which stands behind the operators and eager mode alike."""
    made: list[str] = []

    def watched(name, function, *args):
        made.append(name)
        return function(*args)

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, partial(watched, name, getattr(cpu, name)))
    return made


def test_a_training_step_is_one_graph_for_all_lengths(calls):
    """No graph break (fullgraph raises at one), two compilations for three lengths, eager's gradients, our kernels."""
    model = adapted()
    exact = copy.deepcopy(model).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (8, 12, 9):
        ids = tokens(length)
        calls.clear()
        got = grads(model, compiled, ids)
        assert calls == ["forward"] * 7 + ["backward"] * 7
        assert_close(got, grads(model, model, ids), grads(exact, exact, ids), WHOLE_MODEL)
    assert counter.frame_count <= 2


def test_without_gradients_adapters_are_switched_disabled_and_merged():
    """One compilation for each adapter, one for the base model, one for merged weights, and none twice."""
    model = randomise(apply_lora(adapted(), 3, adapter_name="other"), 2).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, ids, seen = torch.compile(model, fullgraph=True, backend=counter), tokens(8), {}
    with torch.no_grad():
        for name in ("default", "other", None, "default", None, "other", "default"):
            set_adapter(model, name)
            got = compiled(ids).logits
            torch.testing.assert_close(got, model(ids).logits)
            seen[name] = got
        assert counter.frame_count == 3
        assert all((seen["default"] - seen[name]).abs().max() > 0.1 for name in ("other", None))
        for _ in range(2):
            with merged(model):
                torch.testing.assert_close(compiled(ids).logits, seen["default"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(ids).logits, seen["default"])
    assert counter.frame_count == 4


def test_a_tensor_as_scaling_changes_without_a_compilation():
    model = adapted()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, ids, losses = torch.compile(model, fullgraph=True, backend=counter), tokens(8), set()
    for value in (0.5, 1.0, 2.0):
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.scaling["default"] = torch.tensor(value)
        got, want = grads(model, compiled, ids), grads(model, model, ids)
        torch.testing.assert_close(got, want)
        losses.add(got["loss"].item())
    assert counter.frame_count == 1 and len(losses) == 3


def test_blocks_compiled_in_place_share_one_compilation():
    """Regional compilation, as accelerate does it."""
    model, ids = adapted(layers=2), tokens(8)
    want = grads(model, model, ids)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(grads(model, model, ids), want)
    assert counter.frame_count <= 2  # the first block's x needs no gradient


def test_a_model_of_peft_compiles_as_ours(calls):
    model = randomise(get_peft_model(base(), PeftConfig(r=4, target_modules="all-linear"))).train()
    ids = tokens(8)
    twin = copy.deepcopy(model).double()
    exact = grads(twin, twin, ids)
    stock = grads(model, model, ids)
    fuse(model, strict=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got = grads(model, compiled, ids)
    assert calls == ["forward"] * 7 + ["backward"] * 7
    assert_close(got, stock, exact, WHOLE_MODEL)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
            with model.disable_adapter():
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert counter.frame_count == 3


def test_autocast():
    model, ids = adapted(), tokens(8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (grads(model, call, ids) for call in (compiled, model))
    torch.testing.assert_close(got, want)


def test_checkpointing_inside_the_graph_draws_dropout_s_mask_again():
    """y is linear in A with the mask fixed, so <y, dy> = <A, dA> iff forward, recomputation and backward draw one
    mask."""
    layer = randomise(LoRALinear(16, 8, r=4, lora_dropout=0.5, bias=False))
    with torch.no_grad():
        layer.weight.zero_()
    x, A = torch.randn(6, 16), layer.lora_A["default"]
    run = torch.compile(partial(checkpoint, layer, use_reentrant=False), fullgraph=True, backend="aot_eager")
    y, dy = run(x), torch.randn(6, 8)
    y.backward(dy)
    torch.testing.assert_close((y * dy).sum(), (A * A.grad).sum(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(run(x), run(x))


def test_reduce_overhead():
    """Inductor; its CUDA graphs are for GPUs, on a CPU the mode runs without."""
    model, x = randomise(LoRALinear(16, 8, r=4)), torch.randn(6, 16)
    exact = copy.deepcopy(model).double()

    def step(layer, run, x):
        loss = run(x).square().mean()
        return {
            "loss": loss.detach(),
            **dict(zip("AB", torch.autograd.grad(loss, [layer.lora_A["default"], layer.lora_B["default"]]))),
        }

    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    assert_close(step(model, compiled, x), step(model, model, x), step(exact, exact, x.double()))
