"""ResLoRA: shortcuts against their formulas and autograd, merging, checkpointing, bad input."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from stacks import Stack, filled, gradients
from torch import nn

from fused_lora import (
    apply_lora,
    delete_adapter,
    link_reslora,
    lora_linear,
    merge_and_unload,
    merged,
    set_adapter,
    unload,
)
from fused_lora.testing import assert_close

KINDS = [("block", 1), ("block", 2), ("block", -1), ("input", 1), ("middle", 1), ("middle", 2), ("middle", -1)]
SCALING = 3.0


def stack(blocks: int = 4, dropout: float = 0.0, dtype=torch.float64, sizes=(6, 10)) -> nn.Module:
    return filled(apply_lora(Stack(blocks, *sizes).to(dtype), r=2, lora_alpha=2 * SCALING, lora_dropout=dropout))


def rows(dtype=torch.float64, shape=(5, 6)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def formula(model: nn.Module, x: torch.Tensor, kind: str, pre_num: int) -> torch.Tensor:
    """The linked stack by the paper's equations, in PyTorch's operators."""
    seen: dict[str, list[torch.Tensor]] = {"up": [], "down": []}

    def linear(leaf, x):
        n = len(seen[leaf])
        layers = [getattr(block, leaf) for block in model.layers[: n + 1]]
        A, B = ([getattr(layer, name)["default"] for layer in layers] for name in ("lora_A", "lora_B"))
        seen[leaf].append(x)
        taken = range(0 if pre_num < 0 else max(0, n - pre_num), n + 1)
        update = {
            "input": lambda: (x + seen[leaf][max(0, n - 1)]) @ A[n].T @ B[n].T,
            "block": lambda: sum(x @ A[k].T @ B[k].T for k in taken),
            "middle": lambda: sum(seen[leaf][k] @ A[k].T for k in taken) @ B[n].T,
        }[kind]()
        return F.linear(x, layers[n].weight, layers[n].bias) + SCALING * update

    for _ in model.layers:
        x = x + linear("down", torch.tanh(linear("up", x)))
    return x


@pytest.mark.parametrize("kind, pre_num", KINDS)
def test_forward_and_gradients_are_the_formulas(kind, pre_num):
    model, x = stack(), rows()
    want = formula(model, x, kind, pre_num)
    want.square().sum().backward()
    grads, dx = gradients(model), x.grad.clone()
    model.zero_grad()
    x.grad = None
    link_reslora(model, kind, pre_num)
    y = model(x)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    y.square().sum().backward()
    torch.testing.assert_close([x.grad, gradients(model)], [dx, grads], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, pre_num", KINDS)
def test_back_ends_and_dtypes(kind, pre_num, backend, monkeypatch):
    if backend.name == "cuda" and kind != "block":
        pytest.skip("the compiled CUDA kernels take plain LoRA only")
    monkeypatch.setattr(
        "fused_lora.nn.linear.lora_linear", lambda *args, **kw: lora_linear(*args, **kw, backend=backend.name)
    )
    model, x = stack(3, dtype=torch.float32, sizes=(24, 40)), rows(torch.float32, (64, 24)).detach()
    for parameter in model.parameters():
        # Larger weights let each layer amplify the rounding errors of those before it: two runs of PyTorch, by the
        # reference back end and by the formula, then differ in their errors by more than the factor of the limit.
        parameter.data *= 0.3
    model, x = model.to(backend.device), x.to(backend.device)

    def found(y, model):
        model.zero_grad()
        y.square().mean().backward()
        return {"y": y.detach(), "gradients": torch.cat([grad.flatten() for grad in gradients(model).values()])}

    exact = copy.deepcopy(model).double()
    truth, same_dtype = (found(formula(m, x.to(m.layers[0].up.weight.dtype), kind, pre_num), m) for m in (exact, model))
    link_reslora(model, kind, pre_num)
    assert_close(found(model(x), model), same_dtype, truth)


@pytest.mark.parametrize("kind", ["input", "block", "middle"])
def test_no_layers_before_is_lora(kind):
    model, x = stack(), rows()
    want = model(x)
    handle = link_reslora(model, kind, 0)
    assert torch.equal(model(x), want)
    handle.remove()


@pytest.mark.parametrize("kind, pre_num", KINDS)
def test_removed_is_lora(kind, pre_num):
    model, x = stack(), rows()
    want = model(x)
    handle = link_reslora(model, kind, pre_num)
    assert not torch.allclose(model(x), want)
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), want)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)


@pytest.mark.parametrize("kind, pre_num", KINDS)
def test_checkpointing_recomputes_the_same(kind, pre_num):
    """With dropout, and with two forwards before the backwards, as gradient accumulation over a loss of both has it."""
    model, x = stack(dropout=0.5), rows()
    link_reslora(model, kind, pre_num)

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(x).square().sum() + model(0.5 * x).square().sum()
        loss.backward()
        return gradients(model)

    want = step()
    model.reentrant = False
    torch.testing.assert_close(step(), want, rtol=0, atol=0)
    model.reentrant = True
    if kind == "block":
        torch.testing.assert_close(step(), want, rtol=0, atol=0)
    else:
        with pytest.raises(ValueError, match="input and middle shortcuts .* exclude use_reentrant=True"):
            step()


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("kind", ["input", "middle"])
def test_a_layer_before_that_was_not_called_is_named(kind, left_out):
    """Nor does what an earlier layer has handed on stand for it."""
    model = stack()
    link_reslora(model, kind)
    block = model.layers[left_out]
    block.forward = lambda x: x + block.down(torch.tanh(x[:, :1].expand(-1, 10)))
    name, before = (f"layers.{n}.up" for n in (left_out + 1, left_out))
    words = f"ResLoRA's {kind} shortcut of {name} takes what {before} computes, which must be called in every forward"
    with pytest.raises(ValueError, match=words):
        model(rows())
    del block.forward
    assert torch.isfinite(model(rows())).all()


@pytest.mark.parametrize("kind", ["input", "middle"])
def test_nothing_outlives_the_forward(kind):
    model, alive = stack(), []
    link_reslora(model, kind)
    for block in model.layers:
        block.up.register_forward_pre_hook(lambda layer, args: alive.append(weakref.ref(args[0])))
        block.up.register_forward_hook(lambda layer, args, y: alive.append(weakref.ref(y)))
    with pytest.raises(ValueError, match="must have shape"):  # a forward that fails half-way leaves nothing either
        model(torch.randn(2, 7, dtype=torch.float64))
    y = model(rows())
    assert len(alive) >= 8 and any(ref() is not None for ref in alive)
    del y
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("pre_num", [1, -1])
def test_the_block_shortcut_merges_exactly(pre_num):
    model, x = stack(), rows()
    handle = link_reslora(model, "block", pre_num)
    want, weights = model(x), [block.up.weight.clone() for block in model.layers]
    found = handle.merge()
    assert found.exact and found.factors["layers.0.up"] == [] and found.factors["layers.1.up"] == [1.0]
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must be unmerged before ResLoRA is removed"):
        handle.remove()
    handle.unmerge()
    assert all(torch.equal(block.up.weight, weight) for block, weight in zip(model.layers, weights))
    with merged(model):
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="ResLoRA's block shortcut must be removed, by its remove"):
        unload(model)
    torch.testing.assert_close(merge_and_unload(model)(x), want, rtol=0, atol=1e-12)


class Shrinking(nn.Module):
    """Blocks whose layers see a third of what the block before saw."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 10)

    def forward(self, x):
        return x / 3, self.proj(x)


class Row(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Shrinking() for _ in range(3))

    def forward(self, x):
        outputs = []
        for block in self.layers:
            x, y = block(x)
            outputs.append(y)
        return torch.stack(outputs)


def test_the_input_shortcut_merges_exactly_where_inputs_are_multiples():
    model = filled(apply_lora(Row().double(), r=2, lora_alpha=6))
    x = rows()
    handle = link_reslora(model, "input")
    want = model(x)
    found = handle.merge("input", [x.detach(), {"x": 2 * x.detach()}])
    assert not found.exact
    assert [found.factors[f"layers.{n}.proj"][0] for n in range(3)] == pytest.approx([1.0, 3.0, 3.0])
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)


def test_lossy_merges():
    """Factors and weights by hand, the base weights as they were afterwards."""
    model = stack(4)
    x, up = rows().detach(), [block.up for block in model.layers]
    before = [layer.weight.clone() for layer in up]
    BA = [SCALING * layer.lora_B["default"] @ layer.lora_A["default"] for layer in up]
    handle = link_reslora(model, "input")
    found = handle.merge("weights")
    norms = [layer.weight.norm().item() for layer in up]
    wanted = [1.0, 1.0, norms[0] / norms[1], norms[1] / norms[2]]
    assert [found.factors[f"layers.{n}.up"][0] for n in range(4)] == pytest.approx(wanted)
    for layer, W, update, factor in zip(up, before, BA, wanted):
        torch.testing.assert_close(layer.weight, W + (1 + factor) * update, rtol=0, atol=1e-12)
    handle.unmerge()
    handle.remove()
    handle = link_reslora(model, "middle", 2)
    found = handle.merge("weights")
    norms = [layer.weight.norm().item() for layer in up]
    assert found.factors["layers.3.up"] == pytest.approx([norms[1] / norms[2], norms[0] / norms[2]])
    A = [layer.lora_A["default"] for layer in up]
    total = A[3] + norms[1] / norms[2] * A[2] + norms[0] / norms[2] * A[1]
    torch.testing.assert_close(up[3].weight, before[3] + SCALING * up[3].lora_B["default"] @ total, rtol=0, atol=1e-12)
    handle.unmerge()
    seen = []
    for layer in up:
        layer.register_forward_pre_hook(lambda layer, args: seen.append((args[0] @ layer.lora_A["default"].T).norm()))
    model.train()
    found = handle.merge("input", [x])
    h = [norm.item() for norm in seen]
    assert model.layers[0].training and found.factors["layers.2.up"] == pytest.approx([h[1] / h[2], h[0] / h[2]])
    torch.testing.assert_close(up[1].weight, before[1] + (1 + h[0] / h[1]) * BA[1], rtol=0, atol=1e-12)
    handle.unmerge()
    assert all(torch.equal(layer.weight, W) for layer, W in zip(up, before))


def test_other_shapes_begin_a_new_chain():
    model = Stack(3)
    model.layers[1].up, model.layers[1].down = nn.Linear(6, 8), nn.Linear(8, 6)
    model = filled(apply_lora(model.double(), r=2, lora_alpha=6, rank_pattern={"layers.2.down": 1}))
    want = model(rows())
    handle = link_reslora(model, "block", -1)
    assert torch.equal(model(rows()), want) and set(map(len, handle.merge().factors.values())) == {0}


def test_copies_and_compiled_models_are_linked():
    for kind in ("block", "input", "middle"):
        model, x = stack(2), rows()
        handle = link_reslora(model, kind)
        want, twin = model(x), copy.deepcopy(model)
        handle.remove()
        assert torch.equal(twin(x), want) and not torch.allclose(model(x), want)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(twin, backend="aot_eager", fullgraph=True)(x), want)
    torch.compiler.reset()


def test_inputs_that_are_written_to_are_noticed():
    model = stack(2)
    link_reslora(model, "input")
    model.layers[0].down.register_forward_hook(lambda layer, args, y: print(args[0].mul_(2).shape))
    with torch.no_grad(), pytest.raises(ValueError, match="input shortcut needs inputs that nothing writes to"):
        model(rows())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: link_reslora(m, "output"), "shortcut must be one of input, block, middle; got 'output'"),
        (lambda m: link_reslora(m, "input", 2), "pre_num must be 0 or 1 with shortcut 'input'; got 2"),
        (lambda m: link_reslora(m, "block", -2), "pre_num must be an int >= -1; got -2"),
        (lambda m: link_reslora(m, "middle", True), "pre_num must be an int >= -1; got True"),
        (lambda m: link_reslora(Stack()), "ResLoRA needs adapters that act in .* got no adapter active"),
        (
            lambda m: link_reslora(m.layers[0]),
            "ResLoRA needs adapters that act in layers of the model's blocks.*got up",
        ),
        (
            lambda m: link_reslora(m).merge(),
            "mode must be 'input' or 'weights', which are lossy, with shortcut 'input'",
        ),
        (lambda m: link_reslora(m, "block").merge("weights"), "mode must be 'exact' with shortcut 'block'"),
        (lambda m: link_reslora(m).merge("best"), "mode must be one of exact, input, weights; got 'best'"),
        (lambda m: link_reslora(m).merge("input", [rows()], 0), "window must be an int >= 1; got 0"),
        (lambda m: link_reslora(m).merge("input"), "batches must be given for mode 'input' and no other; got 0"),
        (lambda m: (link_reslora(m), link_reslora(m)), "ResLoRA and ResLoRA's input shortcut exclude each other"),
        (lambda m: (link_reslora(m), m.layers[0].up.merge()), "merging exactly and ResLoRA's input shortcut exclude"),
        (lambda m: (link_reslora(m), m.layers[0].up(rows())), "input shortcut needs its layers to be called by their"),
        (lambda m: (m.layers[0].up.merge(), link_reslora(m)), r"layers.0.up must be unmerged before ResLoRA"),
        (lambda m: (link_reslora(m, "block"), delete_adapter(m, "default")), "must be removed, by its remove"),
        (lambda m: (link_reslora(m), m.layers[1](rows())), "the very tensor that the block before has returned"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    model = stack(2)
    with pytest.raises(ValueError, match=message):
        call(model)


class HalfCalled(Shrinking):
    """A block of two layers of which the forward calls one."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(6, 10)


def test_a_merge_that_fails_leaves_nothing_merged(monkeypatch):
    """Where no batch reaches a layer, and whatever else is raised."""
    model = Row()
    model.layers = nn.ModuleList(HalfCalled() for _ in range(2))
    filled(apply_lora(model.double(), r=2, lora_alpha=6))
    handle = link_reslora(model, "input")
    layers = [layer for block in model.layers for layer in (block.proj, block.spare)]
    with pytest.raises(ValueError, match="batches must reach every layer that is linked; got none .* layers.0.spare"):
        handle.merge("input", [rows().detach()])
    assert not any(layer.merged for layer in layers)

    def fails():
        raise MemoryError

    monkeypatch.setattr(layers[-1], "merge", fails)
    with pytest.raises(MemoryError):
        handle.merge("weights")
    assert not any(layer.merged for layer in layers)


def test_another_active_adapter_is_refused():
    model = stack(2)
    apply_lora(model, r=2, adapter_name="other")
    set_adapter(model, "default")
    handle = link_reslora(model, "block")
    for call, what in (
        (lambda: set_adapter(model, "other"), "set_adapter acts on"),
        (lambda: set_adapter(model, None), "set_adapter acts on"),
        (lambda: apply_lora(model, r=2, adapter_name="third"), "an adapter is added to"),
    ):
        with pytest.raises(ValueError, match=f"ResLoRA's block shortcut must be removed, by its remove.*before {what}"):
            call()
    set_adapter(model, "default")  # which acts
    model(rows())
    model.layers[1].up.set_adapter("other")
    with pytest.raises(ValueError, match="acts instead of adapter 'default', and set_adapter excludes it.*got adapter"):
        model(rows())
    handle.remove()
    model(rows())
