"""Biases of the base and of B that train with an adapter, as in PEFT: gradients, files both ways, switching."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_llama import randomise

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


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(bias="lora"), r"bias must be one of \['all', 'lora_only', 'none'\]; got 'lora' \(did you mean"),
        (dict(bias="all", target_parameters=["x"]), "bias and target_parameters exclude each other"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(bert(), **LORA | given)
