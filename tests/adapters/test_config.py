"""LoraConfig: PEFT's rules for names, checked against PEFT's own functions; PEFT's object in the place of ours."""

import random
import re

import pytest
from peft import IA3Config, get_peft_model
from peft import LoraConfig as PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from fused_lora import LoraConfig, LoRALinear, apply_lora
from fused_lora.config import NamePatterns, matches
from fused_lora.layer_config import LayerConfig

PLAIN = ("layers.0.q", "layers.1.q", "layers.10.q", "layers11q", "xlayers.1.q", "a.layers.1.q", "q", "a-b.q", "aXb.q")


def oracle(keys, name):
    """The key that PEFT takes, or None."""
    key = get_pattern_key(keys, name)
    return key if key in keys else None


@pytest.mark.parametrize(
    "keys",
    [
        ["q"],
        ["layers.1.q", "q"],
        ["q", "layers.1.q"],
        ["layers.1.q", "layers11q"],  # a dot stands for any character
        [r"layers\.1\.q", "layers.1.q"],
        [r"^layers\.1\.q", "^layers.0.q", "^q"],
        [r"layers\.\d+\.q", "layers.1.q"],
        ["layers.1.q", r"layers\.\d+\.q"],
        [r".*\.q", "q"],
        ["^q|k", "q$", "[q]"],
        ["a-b.q", "a.b.q", r"a\-b\.q"],
        ["", "layers.", ".q", "..q", "ers.1.q"],
        [r"(a|layers)\.1\.(?P<x>q)", "(layers).1.q"],
    ],
)
def test_the_first_key_that_fits_decides_as_in_peft(keys):
    patterns = NamePatterns(keys)
    for name in PLAIN:
        fitting = [keys[index] for index in patterns.fitting(name)]
        assert fitting == [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
        assert (fitting or [None])[0] == oracle(keys, name)


def test_random_keys_and_names_as_in_peft():
    chance = random.Random(0)

    def name():
        return ".".join("".join(chance.choices("ab1_-", k=chance.randint(1, 2))) for _ in range(chance.randint(1, 4)))

    for _ in range(300):
        keys = list(dict.fromkeys(chance.choice(("", "^")) + chance.choice((str, re.escape))(name()) for _ in range(6)))
        patterns = NamePatterns(keys)
        for key in [name() for _ in range(20)] + [key.lstrip("^").replace("\\", "") for key in keys]:
            fitting = [keys[index] for index in patterns.fitting(key)]
            assert (fitting or [None])[0] == oracle(keys, key), (keys, key)


def test_targets_match_as_in_peft():
    for targets in (["q", "1.k"], {"q", "1.k"}, r".*\.(q|k)"):
        for name in ("q", "a.q", "aq", "0.1.k", "01.k", "1.k", "a.q.b"):
            want = (
                bool(re.fullmatch(targets, name))
                if isinstance(targets, str)
                else any(name == target or name.endswith(f".{target}") for target in targets)
            )
            assert matches(targets, name) == want


class Blocks(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for _ in range(blocks)]
        )


def test_hundreds_of_patterns_are_read_once(monkeypatch):
    names = [name for name, module in Blocks(100).named_modules() if type(module) is nn.Linear]
    config = LoraConfig(target_modules=names, rank_pattern={name: 1 + i % 7 for i, name in enumerate(names)})
    compiled = []
    monkeypatch.setattr(re, "compile", lambda *args: compiled.append(args))
    for i, name in enumerate(names):
        assert config.layer(name) == LayerConfig(r=1 + i % 7) and config.targets(name)
    assert not compiled


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q"], "use_rslora": True, "lora_dropout": 0.25},
        {"target_modules": r".*\.(q|k)", "exclude_modules": ["blocks.1.k"]},
        {"target_modules": ["q", "k"], "rank_pattern": {"blocks.1.q": 2}, "alpha_pattern": {"k": 3}},
        {"target_modules": ["q"], "modules_to_save": ["k"]},
        {"target_modules": ["q", "blocks.0.k"], "layers_to_transform": 1, "layers_pattern": "blocks"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
        {"target_modules": [], "target_parameters": ["q.weight", "blocks.2.k.weight"], "rank_pattern": {"q.weight": 3}},
        {"target_modules": "all-linear"},
    ],
)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_ours_peft_s_and_keywords_say_the_same(fields, by_keyword):
    def layout(model):
        return [
            (name, tuple(p.shape), p.requires_grad, m.scaling if isinstance(m, LoRALinear) else None)
            for name, m in model.named_modules()
            for p in m.parameters(recurse=False)
        ] + [(name, m.lora_dropout) for name, m in model.named_modules() if isinstance(m, LoRALinear)]

    configs = [LoraConfig(**fields), PeftConfig(**fields)]
    models = [apply_lora(Blocks(), config=c) if by_keyword else apply_lora(Blocks(), c) for c in configs]
    assert layout(models[0]) == layout(models[1])
    assert layout(apply_lora(Blocks(), **fields)) == layout(models[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "0.k"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q", "blocks.0.k"], "layers_to_transform": 1, "layers_pattern": "blocks"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
        {"target_modules": ["q", "k"], "exclude_modules": ["2.k", "blocks.0.q"]},
        {"target_modules": ["k"], "target_parameters": ["q.weight"], "rank_pattern": {"q.weight": 3}},
    ],
)
def test_the_layers_are_peft_s(fields):
    peft = get_peft_model(nn.ModuleDict({"model": Blocks()}), PeftConfig(**fields)).base_model.model
    want = {name.rpartition(".lora_A")[0]: m.weight.shape for name, m in peft.named_modules() if ".lora_A." in name}
    ours = apply_lora(nn.ModuleDict({"model": Blocks()}), **fields)
    assert {n: m.lora_A["default"].shape for n, m in ours.named_modules() if isinstance(m, LoRALinear)} == want


def test_layer_0_is_a_layer_too():
    """As an int, with a pattern of names that others have, too."""
    net = nn.ModuleDict({tower: nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})]) for tower in ("text", "vision")})
    theirs = PeftConfig(r=2, target_modules=["q"], layers_to_transform=0, layers_pattern="text")
    model = apply_lora(net, theirs)
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == ["text.0.q"]


def test_all_linear_takes_numbers_of_layers_too():
    model = apply_lora(Blocks(), layers_to_transform=[0, 2], layers_pattern="blocks")
    assert {n for n, m in model.named_modules() if isinstance(m, LoRALinear)} == {
        f"blocks.{i}.{name}" for i in (0, 2) for name in "qk"
    }


def test_positions_as_before():
    layer = apply_lora(Blocks(), 4, 6, ["q"], 0.5, True).blocks[0]["q"]
    assert layer.r == {"default": 4} and layer.lora_dropout == {"default": 0.5} and layer.scaling == {"default": 3.0}


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (PeftConfig(target_modules=["q"], alora_invocation_tokens=[1]), {}, r"alora_invocation_tokens is not"),
        (PeftConfig(target_modules=["q"], init_lora_weights="eva"), {}, r"init_lora_weights must .* needs batches"),
        (PeftConfig(), {}, r"config: target_modules must be a list or a regular expression; got None"),
        (IA3Config(target_modules=["q"]), {}, r"config: peft_type must be 'LORA'; got 'IA3'"),
        (PeftConfig(target_modules=["p"]), {}, r"target_modules must be one of \['k', 'q'\]; got 'p'"),
        (LoraConfig(), {"lora_alpha": 16}, r"config and lora_alpha exclude each other; got both, lora_alpha=16"),
        (LoraConfig(), {"r": 4}, r"config and r exclude each other; got both, r=4"),
        ({"r": 4}, {}, r"config must be a LoraConfig, fused_lora's or PEFT's; got a dict"),
    ],
)
def test_what_is_no_plain_lora_is_refused(config, arguments, message):
    model = Blocks()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, config=config, **arguments)
    assert all(p.requires_grad for p in model.parameters())


def test_a_config_keeps_copies_of_what_it_was_given():
    targets, ranks = ["q"], {"q": 2}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("k"), ranks.update(q=3)
    assert config.target_modules == ["q"] and config.rank_pattern == {"q": 2}
    assert LoraConfig(target_modules=("q", "k"), modules_to_save={"b", "a"}).modules_to_save == ["a", "b"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 2**31}, r"r must be at most 2147483647; got a number of 32 bits"),
        ({"lora_alpha": 10**400}, r"lora_alpha must be a finite number; got a number of 1329 bits"),
        ({"lora_alpha": float("inf")}, r"lora_alpha must be a finite number; got inf"),
        ({"rank_pattern": {"(q": 2}}, r"rank_pattern key must be a regular expression; got '\(q'"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform must be an int or a list of int; got \['0'\]"),
        ({"layers_pattern": "h"}, r"layers_pattern must be None without layers_to_transform; got 'h'"),
        ({"layers_pattern": [1], "layers_to_transform": 1}, r"layers_pattern must be a non-empty str or a list"),
        ({"layers_pattern": "(", "layers_to_transform": 1}, r"layers_pattern must be a regular expression; got '\('"),
        ({"target_modules": "q|k", "layers_to_transform": 1}, r"layers_to_transform must be None where target_modules"),
        ({"task_type": "SEQ_CLAS"}, r"task_type must be one of .*; got 'SEQ_CLAS' \(did you mean 'SEQ_CLS'\?\)"),
        ({"target_parameters": "weight"}, r"target_parameters must be a list of non-empty str; got 'weight'"),
        ({"modules_to_save": ["("]}, r"modules_to_save entry must be a regular expression; got '\('"),
    ],
)
def test_values_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)
