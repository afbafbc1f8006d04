"""What PEFT does to its layers it does to fused ones: each operation on a model and its fused twin, then both beside
each other."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_twins import assert_like_peft, fused_twin, peft_model, step
from safetensors.torch import load_file
from tiny_llama import TOKENS, llama, randomise

from fused_lora.peft import explain, fuse, mixed_batch, unfuse


@pytest.fixture(scope="module")
def two():
    """A model with the adapters default (active) and other."""
    model = peft_model(r=4)
    model.add_adapter("other", LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name:
                torch.nn.init.normal_(p, std=0.1)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return {"logits": model(input_ids=TOKENS, **inputs).logits}


def both_active(model):
    model.base_model.set_adapter(["default", "other"])
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def enabled_again(model):
    disabled(model).base_model.enable_adapter_layers()
    return model


def weighted(model):
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    return model


def deleted(model):
    model.set_adapter("other")
    model.delete_adapter("default")
    return model


def merged(model):
    model.merge_adapter()
    return model


def unmerged(model):
    merged(model).unmerge_adapter()
    return model


def scaled(model):
    logits(model)  # what a call has seen is not remembered
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.scale_layer(0.5)
    return model


def other(model):
    model.set_adapter("other")
    return model


def added_later(model):
    model.add_adapter("third", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("third")
    return randomise(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


OPERATIONS = (
    both_active, disabled, enabled_again, weighted, deleted, merged, unmerged, scaled, other, added_later, pickled,
    copy.deepcopy,
)  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(two, operation):
    stock, twin = operation(copy.deepcopy(two)), operation(fused_twin(two))
    assert_like_peft(logits(twin), logits(stock))
    assert list(twin.state_dict()) == list(stock.state_dict())
    assert repr(twin) == repr(stock)
    if operation not in (disabled, merged):
        assert_like_peft(step(twin), step(stock))


def test_several_active_adapters_are_one_call(two, calls):
    twin = both_active(fused_twin(two))
    logits(twin)
    assert len(calls) == len(explain(twin).of("fused")) == 14


def test_a_batch_of_several_adapters(two, monkeypatch):
    """One call a layer, with the base product in it unless the base has a hook, with PEFT's result, bf16 too, and
    PEFT's gradients; what PEFT refuses is refused in its words."""
    seen = []
    for name in ("grouped_lora_linear", "grouped_lora_update"):
        op = getattr(mixed_batch, name)
        monkeypatch.setattr(mixed_batch, name, lambda *args, op=op, **kw: seen.append(op.__name__) or op(*args, **kw))
    for dtype in (torch.float32, torch.bfloat16):
        stock = copy.deepcopy(two).to(dtype)
        twin = fused_twin(stock)
        for names, layers in ((["other", "__base__"], 4), (["default", "other"], 14), (["other", "other"], 4)):
            seen.clear()
            got, want = (logits(model, adapter_names=names) for model in (twin, stock))
            assert_like_peft(got, want, dtype=dtype)
            assert seen == ["grouped_lora_linear"] * layers
    stock = copy.deepcopy(two)
    for name, p in stock.named_parameters():
        p.requires_grad_("lora_" in name)
    for hooked in (0, 1):
        twin = fused_twin(stock)
        bases = [layer.base_layer for layer in twin.modules() if isinstance(layer, PeftLinear)]
        for base in bases[:hooked]:
            base.register_forward_hook(lambda module, args, y: y)
        seen.clear()
        got, want = (step(model, adapter_names=["default", "other"]) for model in (twin, stock))
        assert_like_peft(got, want)
        assert seen.count("grouped_lora_update") == hooked and len(seen) == 14
    for names, message in ((["other"], "Length of `adapter_names` should be"), (["other", "no"], "non-existing")):
        with pytest.raises(ValueError, match=message):
            logits(fused_twin(two), adapter_names=names)
    twin = fused_twin(two)
    twin.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        logits(twin, adapter_names=["other", "other"])


def test_merge_and_unload_gives_the_base_model(two):
    got, want = (model.merge_and_unload() for model in (fused_twin(two), copy.deepcopy(two)))
    assert not [m for m in got.modules() if isinstance(m, PeftLinear)]
    for name, t in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], t), name


def test_files_both_ways(two, tmp_path):
    fused_twin(two).save_pretrained(tmp_path / "fused")
    two.save_pretrained(tmp_path / "stock")
    for part in (".", "other"):
        ours, theirs = (load_file(tmp_path / who / part / "adapter_model.safetensors") for who in ("fused", "stock"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "fused")
    assert torch.equal(logits(stock)["logits"], logits(two)["logits"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "stock")
    fuse(again, strict=True)
    assert_like_peft(logits(again), logits(two))


def test_unfuse_is_stock_peft(two):
    twin = fused_twin(two)
    unfuse(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in two.modules()]
    assert torch.equal(logits(twin)["logits"], logits(two)["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hotswap(tmp_path, dtype):
    """A tensor scaling and padded ranks, over adapters in the base's dtype."""
    smaller = peft_model(r=2, lora_alpha=3, dtype=dtype, autocast_adapter_dtype=False)
    smaller.save_pretrained(tmp_path)
    stock = randomise(peft_model(r=4, dtype=dtype, autocast_adapter_dtype=False), seed=5)
    prepare_model_for_compiled_hotswap(stock, target_rank=8)
    twin = fused_twin(stock)
    assert len(explain(twin).of("fused")) == 14
    for swap in (False, True):
        if swap:
            for model in (stock, twin):
                hotswap_adapter(model, str(tmp_path), adapter_name="default")
        exact = step(fused_twin(stock).double())
        assert_like_peft(step(twin), step(stock), exact, dtype)


def test_several_active_adapters_of_which_one_is_dora_are_peft_s():
    model = peft_model(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    twin = both_active(fused_twin(model))
    assert {row.reason for row in explain(twin).of("peft")} == {"several adapters are active, of which one is DoRA"}
