"""Biases of the base and of B that train with an adapter, as in PEFT: gradients, files both ways, switching."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_llama import randomise
from torch import nn

import fused_lora
from fused_lora import apply_lora, load_adapter, save_adapter, set_adapter
from fused_lora.adapters.holders import file_keys, live_keys

SIZE = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
INPUTS = dict(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1]))
LORA = dict(r=2, lora_alpha=6, target_modules=["query", "dense"], task_type="SEQ_CLS")


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZE, max_position_embeddings=16)
    ).eval()


def peft_model(**lora):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(get_peft_model(bert(), PeftConfig(**LORA | lora))).eval()


def in_file(name: str) -> str:
    """The key in a file of a parameter of PEFT's model."""
    return name.replace(".default", "").replace(".modules_to_save", "")


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and every gradient by the parameter's name."""
    model.zero_grad()
    out = model(**INPUTS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(scope="module", params=["all", "lora_only"])
def saved(request, tmp_path_factory):
    """PEFT's model and where it is saved."""
    directory = tmp_path_factory.mktemp(request.param)
    model = peft_model(bias=request.param)
    model.save_pretrained(directory)
    return model, directory, request.param


def test_biases_of_the_base_are_peft_s(saved, tmp_path):
    """Read, trained, written and read by PEFT again; base models that were not adapted get the biases from the file."""
    theirs, directory, which = saved
    ours = load_adapter(bert(), directory).eval()
    (y, got), (want_y, want) = step(ours), step(theirs)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    live = dict(zip(live_keys(ours, "default"), file_keys(ours, "default")))
    got = {live[name]: grad for name, grad in got.items()}
    want = {in_file(name): grad for name, grad in want.items()}
    assert got.keys() == want.keys() and any(".bias" in name for name in got)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.1 * p.requires_grad
    save_adapter(ours, tmp_path)
    files = [load_file(path / "adapter_model.safetensors").keys() for path in (tmp_path, directory)]
    assert files[0] == {key for key in files[1] if "original_module" not in key and "modules_to_save" not in key}
    again = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert again.peft_config["default"].bias == which
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_adapter(ours, directory)), logits(theirs), rtol=1e-4, atol=1e-5)


def test_biases_train_with_their_adapter_alone(tmp_path):
    """What another adapter trains, what switching off leaves, and that a base that is saved keeps its biases."""
    model = apply_lora(bert(), **LORA, bias="lora_only").eval()
    biases = {
        n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad and "classifier" not in n
    }
    assert biases == {n for n, p in model.named_parameters() if n.endswith(("query.bias", "dense.bias"))}
    apply_lora(model, 2, target_modules=["query"], adapter_name="other")
    assert not any(model.get_parameter(name).requires_grad for name in biases)
    set_adapter(model, "default")
    assert all(model.get_parameter(name).requires_grad for name in biases)
    for bias in ("all", "lora_only"):
        with pytest.raises(
            ValueError, match=f"bias must be 'none' for all adapters but one; got '{bias}' beside .'def"
        ):
            apply_lora(model, 2, target_modules=["query"], adapter_name="third", bias=bias)
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).fill_(0.5)
    words = "biases that trained with an adapter stay as trained"
    with pytest.warns(UserWarning, match=words), fused_lora.disable_adapter(model):
        want = logits(model)
    model.save_pretrained(tmp_path)  # a folder of the base and the adapter
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(base.get_parameter(name), model.get_parameter(name)) for name in biases)
    with fused_lora.merged(model):
        y = logits(model)
    torch.testing.assert_close(y, logits(model))
    torch.testing.assert_close(logits(fused_lora.unload(model)), want)


def trains(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_frozen_when_their_adapter_goes(bias):
    """PEFT leaves them training."""

    def adapted():
        model = apply_lora(bert(), **LORA, bias=bias)
        apply_lora(model, 2, target_modules=["query"], adapter_name="other")
        set_adapter(model, "default")
        assert any(name.endswith(".bias") for name in trains(model))
        return model

    assert not trains(fused_lora.unload(adapted())) and not trains(fused_lora.merge_and_unload(adapted()))
    model = adapted()
    with pytest.warns(UserWarning, match="no adapter of the model is active now, nor trains"):
        fused_lora.delete_adapter(model, "default")
    assert not trains(model)
    model = adapted()
    set_adapter(model, ["default", "other"])
    fused_lora.delete_adapter(model, "default")
    assert trains(model) and all(".other" in name for name in trains(model))


class Net(nn.Module):
    """A linear layer, one that is called for its hook, a convolution, and a linear layer without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.hooked, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x):
        return self.last(self.conv(torch.tanh(self.hooked(torch.tanh(self.first(x)))[:, None]))[:, 0])


def biased(dtype=torch.float32, **lora):
    """PEFT's model of Net with a bias of every B."""
    config = PeftConfig(r=2, lora_alpha=6, target_modules=["first", "hooked", "conv", "last"], lora_bias=True, **lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(get_peft_model(Net().to(dtype), config))


def in_net(x, model):
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return y.detach(), {in_file(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_biases_of_b_are_peft_s(tmp_path):
    """Files both ways, y and gradients, alone, among several, merged."""
    theirs, x = biased(), torch.randn(5, 6)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(Net(), tmp_path / "theirs")
    (y, got), (want_y, want) = in_net(x, ours), in_net(x, theirs)
    torch.testing.assert_close(y, want_y)
    live = dict(zip(live_keys(ours, "default"), file_keys(ours, "default")))
    got = {live[name]: ours.get_parameter(name).grad for name in live}
    assert got.keys() == want.keys() and sum(key.endswith("lora_B.bias") for key in got) == 4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(Net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), y)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    load_adapter(ours, tmp_path / "theirs", "twice")
    set_adapter(ours, ["default", "twice"])
    theirs.load_adapter(tmp_path / "theirs", "twice")
    theirs.base_model.set_adapter(["default", "twice"])
    torch.testing.assert_close(ours(x), theirs(x))
    set_adapter(ours, "default")
    with pytest.raises(ValueError, match="last: adapter 'default' has lora_bias, which only a base with"):
        fused_lora.merge_and_unload(ours)
    ours.last.delete_adapter("default")
    y, kept = ours(x), {name: p.clone() for name, p in ours.named_parameters()}
    with fused_lora.merged(ours):
        torch.testing.assert_close(ours(x), y)
        assert not any("lora" in key for key in ours.state_dict())
        ours.double().float()
    assert all(torch.equal(p, kept[name]) for name, p in ours.named_parameters()) and torch.equal(ours(x), y)
    apply_lora(ours, 2, target_modules=["first"], use_dora=True, adapter_name="dora")
    with pytest.raises(ValueError, match="first: lora_bias and DoRA exclude each other in one merge; got adapters"):
        fused_lora.merge_and_unload(ours, ["default", "dora"])


def test_biases_of_b_in_half_precision_and_at_the_start():
    """As near to the truth as PEFT's, whose sums are rounded elsewhere; a fresh one is zero, or random as in PEFT."""
    theirs, x = biased(torch.bfloat16), torch.randn(5, 6).bfloat16()
    config = PeftConfig(r=2, lora_alpha=6, target_modules=["first", "hooked", "conv", "last"], lora_bias=True)
    ours = apply_lora(Net().bfloat16(), config)
    torch.testing.assert_close(ours(x), Net().bfloat16()(x), rtol=0, atol=0.02)
    assert all(not layer.lora_bias["default"].any() for layer in (ours.first, ours.hooked, ours.conv, ours.last))
    names = ("first", "hooked", "conv", "last")
    for mine, peer in ((getattr(ours, name), getattr(theirs.base_model.model, name)) for name in names):
        values = peer.lora_A.default.weight, peer.lora_B.default.weight, peer.lora_B.default.bias
        for tensor, value in zip(mine.own_tensors("default"), values, strict=True):
            tensor.data.copy_(value)
    exact = biased(torch.float64)
    exact.load_state_dict(theirs.state_dict())
    want = exact(x.double())
    assert (ours(x) - want).abs().max() <= 2 * (theirs(x) - want).abs().max() + 0.01 * want.abs().max()
    layer = apply_lora(Net(), 4, target_modules=["first"], lora_bias=True, init_lora_weights=False).first
    assert 0.1 < layer.lora_bias["default"].abs().max() <= 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(bias="lora"), r"bias must be one of \['all', 'lora_only', 'none'\]; got 'lora' \(did you mean"),
        (dict(bias="all", target_parameters=["x"]), "bias and target_parameters exclude each other"),
        (dict(lora_bias=True, use_dora=True), "lora_bias and use_dora exclude each other; got both"),
        (dict(lora_bias=True, init_lora_weights="gaussian"), "lora_bias must be False with init_lora_weights='g"),
        (dict(lora_bias=True, target_modules=["word_embeddings"]), "lora_bias needs a linear layer; got True for"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(bert(), **LORA | given)
