"""Rows of a weight that an adapter trains: as the module with the whole weight, without a copy or a gradient of it."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.nn.trained_rows import TrainedRows
from fused_lora.testing import assert_close

V, D, ROWS = 12, 6, [7, 0, 3]
TOKENS = torch.tensor([[0, 3, 3, 7, 11], [1, 2, 7, 0, 5]])


class Scaled(nn.Embedding):
    """As transformers scales an embedding."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = torch.tensor(3.0)

    def forward(self, tokens):
        return super().forward(tokens) * self.embed_scale.to(self.weight.dtype)


class Offset(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens + 1)


MODULES = {
    "embedding": lambda: nn.Embedding(V, D),
    "padding among the rows": lambda: nn.Embedding(V, D, padding_idx=3),
    "padding elsewhere": lambda: nn.Embedding(V, D, padding_idx=5),
    "scaled": lambda: Scaled(V, D, padding_idx=0),
    "head": lambda: nn.Linear(D, V, bias=False),
    "head with a bias": lambda: nn.Linear(D, V),
}


def made(kind):
    torch.manual_seed(0)
    wrapper = ModuleToSave(MODULES[kind]())
    rows = wrapper.add_adapter("default", ROWS)
    wrapper.set_adapter("default")
    delta = rows.token_adapter["trainable_tokens_delta"]
    assert torch.equal(delta, wrapper.original_module.weight[ROWS])
    nn.init.normal_(delta)
    return wrapper, rows, delta


def run(call, x, *leaves):
    y = call(x)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y) * torch.arange(1.0, y.shape[-1] + 1).to(y.dtype))
    return {"y": y.detach(), **{f"grad {i}": grad for i, grad in enumerate(grads)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_as_the_module_with_the_rows_in_its_weight(kind, dtype):
    wrapper, _, delta = made(kind)
    wrapper.original_module.to(dtype)
    embeds = isinstance(wrapper.original_module, nn.Embedding)
    x = TOKENS if embeds else torch.randn(2, 5, D).to(dtype).requires_grad_()

    def reference(kind_of):
        module, leaf = copy.deepcopy(wrapper.original_module).to(kind_of), delta.detach().clone().requires_grad_()
        start = x if embeds else x.detach().to(kind_of).requires_grad_()

        def call(x):
            weight = module.weight.index_copy(0, torch.tensor(ROWS), leaf.to(dtype).to(kind_of))
            return functional_call(module, {"weight": weight}, (x,))

        return run(call, start, leaf, *([] if embeds else [start]))

    got = run(wrapper, x, delta, *([] if embeds else [x]))
    assert_close(got, reference(dtype), reference(torch.float64))
    assert torch.equal(wrapper.weight.detach()[ROWS], delta.to(dtype)) and wrapper.original_module.weight.grad is None
    compiled = torch.compile(wrapper, backend="aot_eager", fullgraph=True) if dtype is torch.float32 else wrapper
    assert torch.equal(compiled(x), wrapper(x))
    wrapper.set_adapter(None)
    assert torch.equal(wrapper(x), wrapper.original_module(x)) and not delta.requires_grad


def test_merging_gives_tied_modules_one_weight_and_the_old_one_back():
    wrapper, rows, delta = made("embedding")
    before, plain = wrapper.original_module.weight, wrapper.original_module.weight.clone()
    head = nn.Linear(D, V, bias=False)
    head.weight = before
    follower = ModuleToSave(head)
    tied = follower.add_adapter("default", ROWS, tied_to=rows)
    follower.set_adapter("default")
    assert not list(tied.parameters()) and follower.state_dict().keys() == {"original_module.weight"}
    x = torch.randn(3, D)
    expected = wrapper(TOKENS), follower(x)
    for each in (follower, wrapper):
        each.merge()
    assert follower.plain().weight is wrapper.plain().weight is not before and torch.equal(before, plain)
    assert torch.equal(wrapper(TOKENS), expected[0]) and torch.allclose(follower(x), expected[1], atol=1e-6)
    assert wrapper.state_dict().keys() == {"weight"} and torch.equal(wrapper.state_dict()["weight"][ROWS], delta)
    wrapper.half().float(), follower.float()  # reaches what is set aside
    for each in (wrapper, follower):
        each.unmerge()
    assert wrapper.original_module.weight is head.weight and torch.equal(head.weight, plain.half().float())


def test_a_copy_of_the_whole_copies_what_is_outside_with_it():
    wrapper, _, _ = made("embedding")
    twin = copy.deepcopy(wrapper)
    assert twin.modules_to_save["default"].module is twin.original_module
    assert torch.equal(twin(TOKENS), wrapper(TOKENS))


def test_what_it_cannot_serve_is_refused():
    for module, message in (
        (nn.Embedding(V, D, max_norm=1.0), "without max_norm, scale_grad_by_freq and sparse"),
        (nn.Embedding(V, D, sparse=True), "without max_norm, scale_grad_by_freq and sparse"),
        (nn.Embedding(V, D, scale_grad_by_freq=True), "without max_norm"),
        (Offset(V, D), "must have a forward of nn.Embedding or a scaled one"),
        (nn.LayerNorm(D), "must be an nn.Embedding or nn.Linear; got a LayerNorm"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainedRows.check_module(module)
    wrapper, _, delta = made("embedding")
    wrapper.check_mergeable(["default"])
    nn.init.constant_(delta, torch.inf)
    with pytest.raises(ValueError, match="trainable_tokens_delta must be finite to be merged"):
        wrapper.check_mergeable(["default"])


def test_the_weight_gets_no_gradient_and_no_copy():
    """The result's own size aside, nothing of the vocabulary's size is made."""
    wrapper, _, _ = made("head")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = wrapper(torch.randn(2, D, requires_grad=True))
    weights = [t for t in saved if t.shape in ((V, D), (D, V))]
    assert weights and all(t.data_ptr() == wrapper.original_module.weight.data_ptr() for t in weights)
    y.sum().backward()
