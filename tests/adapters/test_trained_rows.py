"""trainable_token_indices and ensure_weight_tying: PEFT's numbers and files, and what else adapters do."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_llama import TOKENS, llama, randomise
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from fused_lora import (
    LoraConfig,
    adapters_per_sample,
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_and_unload,
    merged,
    save_adapter,
    set_adapter,
    unload,
)
from fused_lora.distributed import ColwiseLoRA, RowwiseLoRA
from fused_lora.peft import fuse
from fused_lora.testing import tolerance

ROWS = [5, 1, 30, 127]
EMBEDDING = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def base(tie=True, dtype=torch.float32):
    return llama(dtype, tie, hidden=16)


def peft_model(tie, dtype=torch.float32, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(get_peft_model(base(tie, dtype), PeftConfig(r=2, target_modules=["q_proj"], **config))).eval()


def adapted(tie=True, seed=1, **config):
    config = {"trainable_token_indices": ROWS} | config
    return randomise(apply_lora(base(tie), r=2, target_modules=["q_proj"], **config), seed)


def outcome(model):
    """The logits and every gradient but LoRA's, by its own values."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach()} | {
        n.removeprefix("base_model.model.").partition(".token_adapter")[0].partition(".modules_to_save")[0]: g
        for n, g in grads.items()
        if "lora_" not in n
    }


def assert_same(got, peer, exact=None):
    assert got.keys() == peer.keys()
    for name, t in got.items():
        want = peer[name].double() if exact is None else exact[name].double()
        limit = 4 * torch.finfo(torch.float32).eps * want.abs().max().item() * 16
        limit = limit if exact is None else tolerance(peer[name], want)
        assert t.dtype == peer[name].dtype and (t.double() - want).abs().max().item() <= limit, name


GIVEN = {
    "list": (ROWS, {"model.embed_tokens": ROWS}),
    "name": ({"embed_tokens": ROWS}, {"model.embed_tokens": ROWS}),
    "other rows of the head": ({"embed_tokens": ROWS, "lm_head": [2, 3]},) * 2,
    "same rows of the head": ({"embed_tokens": ROWS, "lm_head": ROWS},) * 2,
    "head alone": ({"lm_head": ROWS}, {"lm_head": ROWS}),
}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("given", GIVEN)
def test_numbers_and_files_are_peft_s(given, tie, tmp_path):
    theirs = peft_model(tie, trainable_token_indices=GIVEN[given][0])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(base(tie), tmp_path / "theirs").eval()
    expected = outcome(theirs)
    assert_same(outcome(ours), expected)
    assert all(len(t) < 128 for name, t in expected.items() if name != "logits")
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = PeftModel.from_pretrained(base(tie), tmp_path / "ours", is_trainable=True).eval()
    assert_same(outcome(back), expected)
    fuse(back)
    assert_same(outcome(back), expected)
    with merged(ours):
        assert torch.allclose(ours(TOKENS).logits, expected["logits"], atol=2e-6)
    with disable_adapter(ours):
        assert torch.equal(ours(TOKENS).logits, base(tie)(TOKENS).logits)


@pytest.mark.parametrize("given", [[0, 1, 7], {"embed_tokens": [0, 1, 7]}], ids=["all", "not the head"])
def test_an_embedding_that_is_four_modules(given, tmp_path):
    """The encoder's and the decoder's have its weight, and the head."""
    shape = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=128, decoder_start_token_id=0)

    def t5():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0)).eval()

    config = PeftConfig(r=2, target_modules=["q"], trainable_token_indices=given)
    theirs = randomise(get_peft_model(t5(), config)).eval()
    theirs.save_pretrained(tmp_path)
    assert_same(outcome(load_adapter(t5(), tmp_path).eval()), outcome(theirs))


def test_half_precision_trains_fp32_rows_as_peft_does(tmp_path):
    models = [peft_model(True, dtype, trainable_token_indices=ROWS) for dtype in (torch.bfloat16, torch.float32)]
    models[0].save_pretrained(tmp_path)
    models[1].double()
    models[1].base_model.model.load_state_dict(models[0].base_model.model.state_dict())
    exact, peer = outcome(models[1]), outcome(models[0])
    assert_same(outcome(load_adapter(base(True, torch.bfloat16), tmp_path).eval()), peer, exact)


def test_merge_and_unload_keeps_tied_weights_tied(tmp_path):
    for given, tied in ((ROWS, True), ({"embed_tokens": ROWS, "lm_head": [2, 3]}, False)):
        model = adapted(trainable_token_indices=given)
        logits = model(TOKENS).logits
        twin = merge_and_unload(copy.deepcopy(model))
        assert type(twin.lm_head) is nn.Linear and twin.state_dict().keys() == base().state_dict().keys()
        assert (twin.lm_head.weight is twin.model.embed_tokens.weight) is twin.config.tie_word_embeddings is tied
        torch.testing.assert_close(twin(TOKENS).logits, logits)
        with merged(model):
            model.save_pretrained(tmp_path / str(tied))
        if tied:
            torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "True")(TOKENS).logits, logits)
        assert torch.equal(model(TOKENS).logits, logits)
        assert torch.equal(unload(model)(TOKENS).logits, base()(TOKENS).logits)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_adapters_each_with_rows_or_a_copy_of_its_own():
    model = adapted()
    first = model(TOKENS).logits
    apply_lora(model, 2, target_modules=["v_proj"], adapter_name="b", trainable_token_indices={"embed_tokens": [9]})
    second = randomise(model, 2)(TOKENS).logits
    apply_lora(model, 2, target_modules=["v_proj"], adapter_name="full", modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"must name one adapter that trains a copy of model.embed_tokens; got .*'b'"):
        set_adapter(model, ["default", "b"])
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS).logits, first)
    add_weighted_adapter(model, ["b"], [1.0], "sum")
    set_adapter(model, "sum")
    torch.testing.assert_close(model(TOKENS).logits, second)
    rows = [model.get_submodule(name).modules_to_save["sum"] for name in ("model.embed_tokens", "lm_head")]
    assert rows[0].module is model.model.embed_tokens.original_module and rows[1]._outside[1] is rows[0]
    with adapters_per_sample(model, ["default", "b"]):
        mixed = model(TOKENS).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    for name in ("sum", "b", "full"):
        delete_adapter(model, name)
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS).logits, first)


def test_trainer_s_checkpoint_and_a_pickled_copy(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "checkpoint-1")
    values = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert "model.embed_tokens.modules_to_save.default.token_adapter.trainable_tokens_delta" in values
    twin = adapted(seed=2)
    twin.load_state_dict(values, strict=False)
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    torch.save(model, tmp_path / "whole")
    assert torch.equal(torch.load(tmp_path / "whole", weights_only=False)(TOKENS).logits, model(TOKENS).logits)
    again = load_adapter(model, tmp_path / "checkpoint-1")  # over the adapter of this name
    assert torch.equal(again(TOKENS).logits, twin(TOKENS).logits)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "not tied"])
def test_the_vocabulary_that_was_resized_for_the_rows(tie, tmp_path):
    """PEFT writes both embeddings then, and tied rows twice."""
    base(tie).save_pretrained(tmp_path / "base")

    def resized():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(140)
        return model

    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs = get_peft_model(resized(), PeftConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 139]))
        randomise(theirs).eval().save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert f"base_model.model.{EMBEDDING.replace('trainable_tokens_delta', 'base_layer.weight')}" in stored
    ours = load_adapter(resized(), tmp_path / "adapter").eval()
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)
    with pytest.raises(ValueError, match="must be below 128, the rows of model.embed_tokens .resize the vocabulary"):
        load_adapter(base(tie), tmp_path / "adapter")


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_copy_of_a_tied_module_is_tied(names, tmp_path):
    theirs = peft_model(True, modules_to_save=list(names), ensure_weight_tying=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(base(), tmp_path / "theirs").eval()
    expected = outcome(theirs)
    assert_same(outcome(ours), expected)
    fresh = adapted(trainable_token_indices=None, modules_to_save=names, ensure_weight_tying=True)
    assert fresh.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight is not fresh.lm_head.original_module.weight
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    back = PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True).eval()
    assert_same(outcome(back), expected)
    plain = merge_and_unload(ours)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.tie_word_embeddings


REFUSED = {
    "beyond the vocabulary": (dict(trainable_token_indices=[128]), "must be below 128, the rows of model.embed_tokens"),
    "twice": (dict(trainable_token_indices=[1, 1]), "must be a list of different int >= 0"),
    "negative": (dict(trainable_token_indices={"embed_tokens": [-1]}), "must be a list of different int >= 0"),
    "none": (dict(trainable_token_indices=[]), "must be a list of different int >= 0"),
    "no such module": (
        dict(trainable_token_indices={"embed_token": [1]}),
        r"must be one of \['embed_tokens'\]; got 'embed_token' \(did you mean 'embed_tokens'",
    ),
    "no rows": (dict(trainable_token_indices={"model.norm": [1]}), "model.norm: a module must be an nn.Embedding or"),
    "also in full": (
        dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
        "modules_to_save and trainable_token_indices must not overlap; got model.embed_tokens",
    ),
    "also adapted": (
        dict(trainable_token_indices=[1], target_modules=["q_proj", "embed_tokens"]),
        "trainable_token_indices and target_modules must not overlap; got model.embed_tokens in the first",
    ),
    "an adapted head": (
        dict(trainable_token_indices=[1], target_modules=["q_proj", "lm_head"]),
        "must not overlap; got lm_head, tied to model.embed_tokens, in the first and lm_head in the second",
    ),
    "different rows to be tied": (
        dict(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True),
        r"exclude each other; got model.embed_tokens: \[1\] and lm_head: \[2\]",
    ),
    "tied targets": (
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        "ensure_weight_tying must be False with a tied module among target_modules: PEFT trains its factors twice",
    ),
    "no bool": (dict(ensure_weight_tying=1), "ensure_weight_tying must be a bool; got 1"),
}


@pytest.fixture(scope="module")
def plain():
    return base()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case, plain, refuses):
    config, message = REFUSED[case]
    with refuses(plain, message):
        apply_lora(plain, 2, **{"target_modules": ["q_proj"]} | config)


def test_what_changes_under_rows_is_refused(tmp_path, refuses):
    model = adapted()
    with pytest.raises(TypeError, match="Old embeddings are of type .*ModuleToSave"):
        model.resize_token_embeddings(160)
    save_adapter(adapted(trainable_token_indices=[3]), tmp_path)
    with refuses(model, r"exists with trainable_token_indices=\{'model.embed_tokens': \[5, 1, 30, 127\]\}; got"):
        load_adapter(model, tmp_path)
    taken = apply_lora(base(), 2, target_modules=["embed_tokens"])
    with refuses(taken, "must name modules without adapters; got model.embed_tokens"):
        apply_lora(taken, 2, target_modules=["q_proj"], trainable_token_indices=[1], adapter_name="b")
    with refuses(model, "must not be trained in full, as modules_to_save, or by rows, by another adapter"):
        apply_lora(model, 2, target_modules=["embed_tokens"], adapter_name="b")


def test_tensor_parallelism_is_refused():
    for style in (ColwiseLoRA(), RowwiseLoRA()):
        with pytest.raises(ValueError, match="must not be trained by rows to be split; got one with trainable_token"):
            style._apply(adapted().lm_head, None)


def test_nothing_tied_is_said_and_a_config_is_carried_over():
    with pytest.warns(UserWarning, match="ensure_weight_tying: no other module has the weight"):
        apply_lora(base(False), 2, modules_to_save=["lm_head"], ensure_weight_tying=True)
    for config in (LoraConfig(trainable_token_indices=ROWS), PeftConfig(trainable_token_indices=ROWS)):
        model = apply_lora(base(), config)
        assert model.model.embed_tokens.modules_to_save["default"].rows == ROWS
