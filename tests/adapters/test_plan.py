"""Which modules get an adapter, and that a refused call names the cause and leaves the model as it was."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_llama import llama, randomise
from torch import nn

from fused_lora.adapters import apply_lora, load_adapter, merge_and_unload, merged, save_adapter, set_adapter
from fused_lora.nn import LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_saved_targets_select_no_other_module(tmp_path):
    class Block(nn.Module):
        def __init__(self, deep):
            super().__init__()
            self.q, self.inner = nn.Linear(8, 8), (Block(False) if deep else None)

        def forward(self, x):
            return self.q(x) if self.inner is None else self.inner(self.q(x))

    torch.manual_seed(0)
    model, plain = Block(True), Block(True)
    plain.load_state_dict(model.state_dict())
    randomise(apply_lora(model, r=2, target_modules=r"q"))  # 'q' as a list would take inner.q too
    save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        "base_model.model.q.lora_A.weight",
        "base_model.model.q.lora_B.weight",
    }
    x = torch.randn(3, 8)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    assert torch.equal(load_adapter(plain, tmp_path)(x), model(x))


@pytest.mark.parametrize("targets", ["all-linear", ["first"], ["second.0"]])
def test_shared_module_is_replaced_once_in_both_places(targets, tmp_path):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
            self.second = nn.Sequential(self.first, nn.ReLU())

        def forward(self, x):
            return self.second(self.first(x))

    model = randomise(apply_lora(Twins(), r=2, target_modules=targets))
    assert isinstance(model.first, LoRALinear) and model.second[0] is model.first
    save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        "base_model.model.first.lora_A.weight",
        "base_model.model.first.lora_B.weight",
    }
    x, config = torch.randn(3, 8), json.loads((tmp_path / CONFIG).read_text())
    for names in (config["target_modules"], ["second.0"], ["first", "second.0"]):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "target_modules": names}))
        assert torch.equal(load_adapter(Twins(), tmp_path)(x), model(x))


def test_compiled_model_saves_without_the_wrapper_s_names(tmp_path):
    model = apply_lora(llama(), target_modules=["q_proj"])
    save_adapter(torch.compile(model), tmp_path / "compiled")
    save_adapter(model, tmp_path / "eager")
    assert load_file(tmp_path / "compiled" / WEIGHTS).keys() == load_file(tmp_path / "eager" / WEIGHTS).keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules must be one of \[.*'q_proj'.*\]; got 'q_prj' \(did you mean 'q_proj'\?\)",
        ),
        ({"target_modules": ["q_proj", "vproj"]}, r"got 'vproj' \(did you mean 'v_proj'\?\)"),
        ({"target_modules": "q_proj"}, r"regular expression for the whole name .*; got 'q_proj', which finds none"),
        ({"target_modules": "(q_proj"}, r"target_modules must be a regular expression; got '\(q_proj'"),
        ({"target_modules": []}, r"got \[\], which finds none"),
        ({"target_modules": None}, r"target_modules must be a list"),
        ({"target_modules": ["mlp"]}, r"target model\.layers\.0\.mlp: linear must be a linear layer.*; got .*LlamaMLP"),
        (
            {"modules_to_save": ["lm_heads"]},
            r"modules_to_save must be one of .* got 'lm_heads' \(did you mean 'lm_head'\?\)",
        ),
        ({"target_modules": ["proj"]}, r"target_modules must be one of .*; got 'proj'"),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["layers"]},
            r"must name modules with a forward; got model\.layers, a ModuleList",
        ),
        ({"modules_to_save": "lm_head"}, r"modules_to_save must be a list of non-empty str; got 'lm_head'"),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["m_head"]},
            r"must not overlap; got lm_head in the first and lm_head in the second",
        ),
        ({"rank_pattern": {"q_prj": 2}}, r"a key of rank_pattern must be one of .* got 'q_prj'"),
        ({"rank_pattern": {"q_proj": 0}}, r"r must be an int >= 1; got 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"lora_alpha must be a finite number; got 'x'"),
        ({"rank_pattern": [2]}, r"rank_pattern must be a dict"),
        ({"r": 0}, r"r must be an int >= 1; got 0"),
        ({"lora_dropout": 1.5}, r"lora_dropout must be a number in \[0, 1\); got 1.5"),
        ({"use_rslora": "yes"}, r"use_rslora must be a bool; got 'yes'"),
        ({"adapter_name": "a.b"}, r"adapter_name must be .* without dots"),
        ({"adapter_name": "taken"}, r"adapter_name must be new to the model, which has \['taken'\]; got 'taken'"),
        (
            {"adapter_name": "new", "modules_to_save": ["mlp"], "target_modules": ["k_proj"]},
            r"without adapters in them; got model\.layers\.0\.mlp",
        ),
    ],
)
def test_apply_refuses_and_changes_nothing(arguments, message, refuses):
    model = llama()
    if "name" in "".join(arguments):
        apply_lora(model, target_modules=["q_proj", "up_proj"], adapter_name="taken")
    with refuses(model, message):
        apply_lora(model, **arguments)


def test_a_module_that_one_adapter_trains_in_full_is_no_other_s_target(tmp_path, refuses):
    save_adapter(apply_lora(llama(), target_modules=["q_proj", "lm_head"]), tmp_path)
    model = apply_lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    for call in (
        lambda: apply_lora(model, target_modules=["q_proj", "lm_head"], adapter_name="other"),
        lambda: load_adapter(model, tmp_path, "other"),
    ):
        with refuses(model, r"target lm_head: module must not be trained in full.*; got one that \['default'\] train"):
            call()
    apply_lora(model, adapter_name="other")  # "all-linear" leaves the head out


def test_changes_while_merged_are_refused(tmp_path, refuses):
    model = randomise(apply_lora(llama(), target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    apply_lora(model, target_modules=["v_proj"], adapter_name="other")
    set_adapter(model, "default")
    model.model.layers[0].self_attn.q_proj.merge()
    for call in (
        lambda: set_adapter(model, "other"),
        lambda: apply_lora(model, adapter_name="third"),
        lambda: load_adapter(model, tmp_path),
        lambda: merged(model).__enter__(),
    ):
        with refuses(model, r"model\.layers\.0\.self_attn\.q_proj.* merged"):
            call()


def test_unknown_adapters_are_named(refuses):
    model = apply_lora(llama(), adapter_name="german", target_modules=["q_proj"])
    for call in (
        lambda: set_adapter(model, "germn"),
        lambda: save_adapter(model, "/nonexistent", "germn"),
        lambda: merged(model, "germn").__enter__(),
    ):
        with refuses(model, r"must be one of \['german'\]; got 'germn' \(did you mean 'german'\?\)"):
            call()
    with refuses(model, "adapter_name must be a name, a list of names or None; got 3"):
        set_adapter(model, 3)
    set_adapter(model, None)
    with refuses(model, "while no adapter is active; got None"), merged(model):
        pass


def test_a_model_without_adapters_is_named(refuses):
    model = llama()
    calls = (lambda: set_adapter(model, "a"), lambda: merged(model).__enter__(), lambda: merge_and_unload(model, "a"))
    for call in calls:
        with refuses(model, "model must have adapters.*got"):
            call()
    for call in (lambda: apply_lora("model"), lambda: set_adapter("model", "a"), lambda: merged(3).__enter__()):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module; got a (str|int)"):
            call()


def test_a_name_that_excludes_nothing_is_said():
    with pytest.warns(UserWarning, match=r"exclude_modules=\['q_prj'\] excludes no module"):
        apply_lora(llama(), exclude_modules=["q_prj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(llama(), exclude_modules=["q_proj"])


def test_layers_that_are_not_there_are_named(refuses):
    model = llama()
    with refuses(model, r"layers_to_transform must be numbers of layers.*got \[7\], which leaves none"):
        apply_lora(model, layers_to_transform=[7])


@pytest.mark.parametrize("name", ["/tmp/evil", "a/b", "a\\b", "a\0"])
def test_a_name_is_a_folder_s(name, refuses):
    """Several active adapters are saved a folder each."""
    model = llama()
    with refuses(model, "adapter_name must be a non-empty str without dots and slashes"):
        apply_lora(model, adapter_name=name)


def test_an_empty_directory_is_no_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="directory must be the path of a folder; got an empty one"):
        save_adapter(apply_lora(llama()), "")
    assert not any(tmp_path.iterdir())
