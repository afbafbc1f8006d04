"""Layers of all kinds beside PEFT's: the same outputs, gradients and files, each adapter readable by the other side."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from torch import nn

from fused_lora.adapters import apply_lora, load_adapter, merged, save_adapter

WEIGHTS = "adapter_model.safetensors"
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def gpt2():
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))


def falcon():
    return T.FalconForCausalLM(T.FalconConfig(**SIZES))


def dispatched():
    from accelerate import dispatch_model

    llama = T.LlamaForCausalLM(T.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2))
    return dispatch_model(llama, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


def tied():
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=True))


def gemma():
    """Embeddings of a subclass that multiplies its vectors."""
    sizes = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**sizes))


class Convolutions(nn.Module):
    """Each kind of convolution, and an embedding; those of a rarer kind cannot be merged."""

    inputs = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(1))

    def __init__(self, max_norm=None, **rare):
        super().__init__()
        self.vectors = nn.Embedding(20, 8, padding_idx=3, max_norm=max_norm, scale_grad_by_freq=True)
        self.strided = nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding="same", **rare)
        self.pointwise, self.square = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.cube = nn.Conv3d(1, 2, 2)

    def forward(self, tokens):
        x = self.grouped(self.strided(self.vectors(tokens).transpose(1, 2)))
        x = self.square(self.pointwise(x.view(-1, 4, 2, x.shape[-1])))
        return self.cube(x[:, None]).tanh()


CONVOLUTIONS = [name for name, _ in Convolutions().named_children()]
NOT_MERGED = {
    "grouped": r"grouped: convolution must have one group .*; got groups=2",
    "padded otherwise": r"grouped: convolution must .* pad with zeros .*'reflect'",
    "of one length": r"vectors: max_norm must be None for a merge",
}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "gpt2": (gpt2, {}),
    "falcon": (falcon, {}),
    "dispatched": (dispatched, {}),
    "tied embeddings": (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": (tied, {"target_modules": ["lm_head", "q_proj"]}),
    "both tied": (tied, {"target_modules": ["lm_head", "embed_tokens"]}),
    "scaled embeddings": (gemma, {"target_modules": ["embed_tokens", "v_proj"]}),
    "convolutions": (Convolutions, {"target_modules": CONVOLUTIONS}),
    "grouped": (lambda: Convolutions(groups=2), {"target_modules": CONVOLUTIONS}),
    "padded otherwise": (lambda: Convolutions(padding_mode="reflect"), {"target_modules": CONVOLUTIONS}),
    "of one length": (lambda: Convolutions(max_norm=2.0), {"target_modules": CONVOLUTIONS}),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def inputs(model: nn.Module) -> torch.Tensor:
    return model.inputs if hasattr(model, "inputs") else IDS


def output(model: nn.Module) -> torch.Tensor:
    out = model(inputs(model))
    return out if isinstance(out, torch.Tensor) else out.logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the keys of PEFT's file, without its prefix."""
    model.zero_grad()
    output(model).square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            name = name.replace("lora_embedding_", "lora_")
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    return found


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[str, nn.Module, nn.Module, Path]:
    """A model with an adapter of PEFT's, the same in our layers, and PEFT's files."""
    given = {"target_modules": "all-linear", **MODELS[request.param][1]}
    theirs = peft.get_peft_model(made(request.param), peft.LoraConfig(r=4, lora_alpha=6, **given)).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return request.param, theirs, load_adapter(made(request.param), directory).eval(), directory


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.detach().abs().max().item())


def test_outputs_and_gradients(pair):
    _, theirs, ours, _ = pair
    near(output(ours), output(theirs))
    want, got = gradients(theirs), gradients(ours)
    assert got.keys() == want.keys() and len(want) > 0
    for name in want:
        near(got[name], want[name])


def test_files_both_ways(pair, tmp_path):
    name, theirs, ours, directory = pair
    save_adapter(ours, tmp_path)
    want, got = load_file(directory / WEIGHTS), load_file(tmp_path / WEIGHTS)
    want = {key: value for key, value in want.items() if ".lora_" in key}
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    again = peft.PeftModel.from_pretrained(made(name), tmp_path).eval()
    near(output(again), output(theirs))


def test_merged(pair):
    name, theirs, ours, _ = pair
    want = output(theirs)
    if name in NOT_MERGED:
        with pytest.raises(ValueError, match=NOT_MERGED[name]), merged(ours):
            pass
        near(output(ours), want)
        return
    with merged(ours):
        near(output(ours), want)
        if name != "dispatched":
            plain = made(name)
            if hasattr(plain, "lm_head"):  # where it is tied, the merged one is so no more
                plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
            plain.load_state_dict(ours.state_dict())
            near(output(plain), want)
    near(output(ours), want)


def test_the_same_layers_are_found(pair):
    name, theirs, ours, _ = pair
    fresh = apply_lora(made(name), config=theirs.peft_config["default"])
    trains = [{key for key, p in model.named_parameters() if p.requires_grad} for model in (fresh, ours)]
    assert trains[0] == trains[1]
    near(output(fresh), output(made(name)))


def test_a_copy_is_independent(pair):
    _, _, ours, _ = pair
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert (output(twin) - output(ours)).abs().max() > 1e-4
