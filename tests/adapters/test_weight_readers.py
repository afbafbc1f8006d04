"""Code that reads a layer's weight itself: nn.TransformerEncoder calls the layers instead, any other code is found in
the source and the target refused."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora.adapters import apply_lora, load_adapter, merged, save_adapter, set_adapter
from fused_lora.adapters.weight_readers import reader_of
from fused_lora.nn import LoRALinear


def trained(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.eval()


def encoder(norm_first=False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()


@pytest.fixture
def no_fast_path():
    """Runs a call of nn.TransformerEncoder layer by layer."""

    def run(model, *args, **kwargs):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    yield run
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": ["layers.1.linear2"]}, {"target_modules": ["linear1"], "modules_to_save": ["norm2"]}],
)
def test_transformer_encoder_acts_in_eval_mode(lora, padded, norm_first, no_fast_path):
    model, x = trained(apply_lora(encoder(norm_first), 2, **lora)), torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        want = no_fast_path(model, x, src_key_padding_mask=mask)
        base = no_fast_path(encoder(norm_first), x, src_key_padding_mask=mask)
        keep = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
        assert (want - base)[keep].abs().max() > 1e-2
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], want[keep])
        with merged(model):
            torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], want[keep])
        set_adapter(model, None)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], base[keep])


def test_a_loaded_adapter_acts_in_transformer_encoder_too(tmp_path):
    model, x = trained(apply_lora(encoder(), 2)), torch.randn(2, 5, 16)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(encoder(), tmp_path)(x), model(x))


def test_encoders_without_adapters_keep_their_fast_path():
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(16, 2)})
    apply_lora(model, target_modules=["head"])
    assert all(layer.activation_relu_or_gelu for layer in model["encoder"].layers)


def test_multihead_attention_is_no_target():
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 2)})
    with pytest.raises(ValueError, match=r"target attention\.out_proj: .* got .*NonDynamicallyQuantizableLinear"):
        apply_lora(attention, target_modules=["out_proj"])
    with pytest.raises(ValueError, match="target attention: .* got torch.nn.MultiheadAttention: target_parameters can"):
        apply_lora(attention, target_modules=["attention"])
    with pytest.raises(ValueError, match=r"must leave out attention\.out_proj\.weight, which nn.MultiheadAtt"):
        apply_lora(attention, target_parameters=["out_proj.weight"])
    with pytest.warns(UserWarning, match="'all-linear' leaves out out_proj of MultiheadAttention: code there reads"):
        apply_lora(attention)
    assert not isinstance(attention["attention"].out_proj, LoRALinear)


def test_the_input_projection_of_multihead_attention_is_a_parameter():
    torch.manual_seed(0)
    layer, x = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)}), torch.randn(2, 5, 16)
    layer = trained(apply_lora(layer, 2, 6, target_modules=[], target_parameters=["attention.in_proj_weight"]))
    adapted, plain = layer["attention"], nn.MultiheadAttention(16, 2, batch_first=True).eval()
    plain.load_state_dict(adapted.base_layer.state_dict())
    with torch.no_grad():
        plain.in_proj_weight += 3 * adapted.lora_B["default"] @ adapted.lora_A["default"]
        torch.testing.assert_close(adapted(x, x, x)[0], plain(x, x, x)[0])  # the fused path of eval mode
    y = adapted(x, x, x)[0]
    torch.testing.assert_close(y, plain(x, x, x)[0])
    y.sum().backward()
    assert all(adapted_tensor.grad.any() for adapted_tensor in adapted.own_tensors("default"))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)


class Functional(Layers):
    def forward(self, x):
        return F.linear(self.proj(x), self.out.weight, self.out.bias)


class ByMethod(Layers):
    def forward(self, x):
        return self._finish(self.proj(x))

    def _finish(self, h):
        return h @ self.out.weight.T


class Inherits(ByMethod):
    pass


class FromAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layers()])

    def forward(self, x):
        for layer in self.layers:
            x = layer.proj(x) @ layer.out.weight.T
        return x


class Harmless(Layers):
    """Reads that are no use of the values, and a read outside forward."""

    def forward(self, x):
        if self.out.weight is not None and isinstance(self.out.weight, torch.Tensor):
            x = x.to(self.out.weight.dtype).to(self.out.weight.device).view(-1, self.out.weight.shape[1])
        return self.out(self.proj(x)) + torch.finfo(self.out.weight.dtype).tiny + self.out.weight.size(0) * 0

    def norm(self):
        return self.out.weight.norm()


class OtherLayer(Layers):
    """Its own `out` is read; another one of that name is called."""

    def __init__(self):
        super().__init__()
        self.side = nn.ModuleDict({"out": nn.Linear(4, 4)})

    def forward(self, x):
        return self.side["out"](self.proj(x)) @ self.out.weight


@pytest.mark.parametrize("kind", [Functional, ByMethod, Inherits, FromAbove])
@pytest.mark.parametrize("inside", [False, True])
def test_targets_that_are_read_are_refused(kind, inside):
    model = nn.Sequential(kind()) if inside else kind()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for arguments in ({"target_modules": ["out"]}, {"target_modules": ["proj", "out"]}):
        with pytest.raises(
            ValueError, match=rf"target_modules must leave out out of {kind.__name__}: code there reads"
        ):
            apply_lora(model, **arguments)
        assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    with pytest.warns(UserWarning, match=rf"'all-linear' leaves out out of {kind.__name__}: code there reads"):
        apply_lora(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert adapted and all(name.endswith("proj") for name in adapted)


def test_a_forward_put_on_the_object_is_read():
    def fused_loss(self, x):
        return self.proj(x) @ self.out.weight.T

    model = Harmless()
    model.forward = types.MethodType(fused_loss, model)  # as kernels for the cross entropy do
    with pytest.raises(ValueError, match="must leave out out of Harmless"):
        apply_lora(model, target_modules=["out"])


@pytest.mark.parametrize("kind, targets", [(Harmless, ["out"]), (OtherLayer, ["side.out"]), (Functional, ["proj"])])
def test_what_is_called_is_served(kind, targets):
    model = trained(apply_lora(kind(), 2, target_modules=targets))
    x = torch.randn(3, 4)
    want = model(x)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            layer.lora_B["default"].zero_()
    assert not torch.equal(model(x), want)


def test_a_copied_module_may_be_read():
    model = trained(apply_lora(Functional(), 2, target_modules=["proj"], modules_to_save=["out"]))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), model.out.current()(model.proj(x)))


MODELS = {  # of transformers: what their code reads, and what it only seems to
    "mamba.modeling_mamba.MambaMixer": ({"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
    "mamba2.modeling_mamba2.Mamba2Mixer": ({"out_proj"}, {"in_proj"}),
    "wavlm.modeling_wavlm.WavLMAttention": ({"q_proj", "k_proj", "v_proj", "out_proj"}, set()),
    "jamba.modeling_jamba.JambaMambaMixer": ({"dt_proj"}, {"in_proj", "x_proj", "out_proj"}),
    "mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": ({"dense", "decoder"}, {"transform.dense"}),
    "t5.modeling_t5.T5DenseGatedActDense": (set(), {"wi_0", "wi_1", "wo"}),
    "llama.modeling_llama.LlamaForCausalLM": (set(), {"lm_head"}),
    "bloom.modeling_bloom.BloomAttention": (set(), {"dense", "query_key_value"}),
}


@pytest.mark.parametrize("path", MODELS)
def test_known_readers_of_transformers(path):
    import importlib

    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    holder = kind.__new__(kind)
    nn.Module.__init__(holder)
    holder.pretraining_tp, holder.slow_but_exact = 1, True
    read, called = MODELS[path]
    assert {target for target in read | called if reader_of(target, [("", holder)])} == read
    if "Bloom" in name:
        holder.pretraining_tp = 2
        assert reader_of("dense", [("", holder)]) == name
