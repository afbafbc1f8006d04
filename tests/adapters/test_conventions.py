"""Heads and experts: what a configuration leaves to the model, as PEFT and transformers have it."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as hf
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from tiny_llama import randomise
from torch import nn

from fused_lora import LoraConfig, LoRALinear, apply_lora, load_adapter, merged, save_adapter, set_adapter
from fused_lora.adapters.unload import merge_and_unload, unload
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.modules_to_save import ModuleToSave

SIZE = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TOKENS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def bert(kind="ForSequenceClassification"):
    torch.manual_seed(0)
    return getattr(hf, f"Bert{kind}")(hf.BertConfig(**SIZE)).eval()


def moe(**fields):
    torch.manual_seed(0)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, num_key_value_heads=2)
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZE, **experts, **fields)).eval()


def in_full(model):
    return [name for name, module in model.named_modules() if isinstance(module, ModuleToSave | ModulesToSaveWrapper)]


def parameters(model):
    """The ranks of adapted parameters, by their names."""
    return {pattern_name(n, m): m.r["default"] for n, m in model.named_modules() if isinstance(m, LoRAParameter)}


def test_peft_s_own_targets_where_its_config_names_none():
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    ours = apply_lora(bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    layers = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {name for name, module in ours.named_modules() if isinstance(module, LoRALinear)} == layers
    assert len(layers) == 4 and in_full(ours) == ["classifier"]
    with pytest.raises(ValueError, match=r"config: target_modules must be a list or a regular expression; got None"):
        apply_lora(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2))


@pytest.mark.parametrize("kind, head", [("SequenceClassification", "classifier"), ("QuestionAnswering", "qa_outputs")])
@pytest.mark.parametrize("by", ["class", "task_type", "peft"])
def test_a_new_head_is_trained_and_saved(kind, head, by, tmp_path):
    task_type = {"classifier": "SEQ_CLS", "qa_outputs": "QUESTION_ANS"}[head]
    model = bert(f"For{kind}")
    if by == "class":
        apply_lora(model, r=2)
    elif by == "task_type":
        apply_lora(model, r=2, target_modules=["query", "value"], task_type=task_type)
    else:
        apply_lora(model, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type=task_type))
    assert in_full(model) == [head]
    randomise(model)
    save_adapter(model, tmp_path)
    again = load_adapter(bert(f"For{kind}"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(f"For{kind}"), tmp_path).eval()
    assert in_full(theirs) == [f"base_model.model.{head}"] and theirs.active_peft_config.task_type == task_type
    want = model(TOKENS)[0]
    assert torch.equal(again(TOKENS)[0], want)
    torch.testing.assert_close(theirs(TOKENS)[0], want)


@pytest.mark.parametrize(
    "arguments", [{"exclude_modules": ["classifier"]}, {"modules_to_save": ["classifier"]}, {"task_type": "CAUSAL_LM"}]
)
def test_what_is_said_of_the_head_holds(arguments):
    model = apply_lora(bert(), r=2, **arguments)
    assert in_full(model) == (["classifier"] if "modules_to_save" in arguments else [])
    assert isinstance(model.classifier, LoRALinear) == ("task_type" in arguments)


def test_a_head_that_stays_frozen_is_named():
    with pytest.warns(UserWarning, match=r"classifier: the head of BertFor.* stays frozen .* task_type='SEQ_CLS' or"):
        apply_lora(bert(), r=2, target_modules=["query"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(bert(), r=2, target_modules=["query", "classifier"])
        apply_lora(bert(), r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
        model = apply_lora(bert(), r=2)
        apply_lora(model, r=2, target_modules=["query"], adapter_name="other", task_type="SEQ_CLS")
    assert in_full(model) == ["classifier"]


V4 = ["q_proj", "gate_proj", "up_proj", "down_proj"]  # what everybody names


@pytest.mark.parametrize(
    "targets", [V4, [*V4, "gate"], r".*\.(q_proj|gate_proj|up_proj|down_proj)", ["q_proj", "down_proj"], ["gate"]]
)
def test_names_of_layers_that_were_fused_mean_the_experts_as_in_peft(targets, tmp_path):
    theirs = peft.get_peft_model(moe(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    ours = apply_lora(moe(), r=2, lora_alpha=6, target_modules=targets)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trained[0] == trained[1] > 0
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(moe(), tmp_path)
    assert parameters(loaded) == parameters(ours)
    torch.testing.assert_close(loaded(TOKENS).logits, theirs.eval()(TOKENS).logits)


def test_an_expert_s_layers_in_some_blocks():
    model = apply_lora(moe(), r=2, layers_to_transform=[1])
    names = [name for name, m in model.named_modules() if isinstance(m, LoRALinear | LoRAParameter)]
    assert names and all(".layers.1." in name for name in names)
    model = apply_lora(moe(), r=2, target_modules=r".*\.1\..*\.(gate_proj|up_proj|down_proj)")
    assert parameters(model) == {
        "model.layers.1.mlp.experts.gate_up_proj": 4,
        "model.layers.1.mlp.experts.down_proj": 2,
    }
    model = apply_lora(moe(), r=2, exclude_modules=["experts"])
    assert parameters(model) == {f"model.layers.{i}.mlp.gate.weight": 2 for i in range(2)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"target_modules": ["gate_proj"]},
            r"name all of \['gate_proj', 'up_proj'\] or none, .* one parameter, gate_up",
        ),
        ({"lora_dropout": 0.1}, r"lora_dropout must be 0 with target_parameters, a parameter such as .* got 0.1"),
        (
            {"target_parameters": ["gate_up"]},
            r"target_parameters must be one of .*'experts.down_proj', .*; got 'gate_up'",
        ),
        ({"target_parameters": ["norm.weight"]}, r"target_parameters: model.norm: weight must be .* two or three dim"),
    ],
)
def test_refusals_change_nothing(arguments, message, refuses):
    model = moe()
    with refuses(model, message):
        apply_lora(
            model, **{"target_modules": ["q_proj"], **arguments} if "lora_dropout" not in arguments else arguments
        )


def test_several_adapters_on_experts(refuses):
    model = apply_lora(moe(), r=2, target_parameters=["experts.down_proj"], target_modules=[])
    apply_lora(model, r=3, target_parameters=["experts.down_proj"], target_modules=["q_proj"], adapter_name="other")
    randomise(model)
    one = model(TOKENS).logits
    with torch.no_grad(), merged(model):
        torch.testing.assert_close(model(TOKENS).logits, one)
        assert model.state_dict().keys() == moe().state_dict().keys()
    set_adapter(model, None)
    assert torch.equal(model(TOKENS).logits, moe()(TOKENS).logits) and not torch.equal(one, model(TOKENS).logits)
    with refuses(
        model, r"must name the same parameters of model\.layers\.0\.mlp\.experts as the adapters that are there"
    ):
        apply_lora(model, target_parameters=["experts.gate_up_proj"], target_modules=[], adapter_name="third")


def test_a_model_with_adapted_experts_is_saved_and_made_plain(tmp_path):
    model = randomise(apply_lora(moe(), r=2))
    want, plain = model(TOKENS).logits, moe()(TOKENS).logits
    model.save_pretrained(tmp_path)  # with its base, which came from nowhere
    again = hf.Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, want)
    merge_and_unload(copied := copy.deepcopy(model))
    torch.testing.assert_close(copied(TOKENS).logits, want)
    unload(model)
    assert torch.equal(model(TOKENS).logits, plain)
    for left in (copied, model):
        assert left.state_dict().keys() == moe().state_dict().keys()


def test_deepseek_s_dense_layers_are_written_so_that_peft_reads_them(tmp_path):
    def model():
        torch.manual_seed(0)
        fields = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32)
        fields |= dict(first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8)
        config = hf.DeepseekV3Config(**SIZE, **fields, num_key_value_heads=4, qk_nope_head_dim=8, n_shared_experts=1)
        return hf.DeepseekV3ForCausalLM(config).eval()

    given = LoraConfig(r=2, target_parameters=["layers.0.mlp.up_proj.weight", "shared_experts.down_proj.weight"])
    given = LoraConfig(**{**vars(given), "target_modules": ["o_proj"], "rank_pattern": {"mlp.up_proj.weight": 3}})
    ours = randomise(apply_lora(model(), given))
    assert type(ours.model.layers[0].mlp.up_proj) is LoRALinear and ours.model.layers[0].mlp.up_proj.r == {"default": 3}
    save_adapter(ours, tmp_path)
    want = ours(TOKENS).logits
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model(), tmp_path).eval()(TOKENS).logits, want)
    assert torch.equal(load_adapter(model(), tmp_path)(TOKENS).logits, want)


def test_a_head_that_an_older_peft_wrote_without_saying_so(tmp_path):
    """Its configuration had the task type alone. A file that has no head leaves the model's as it is."""
    model = randomise(apply_lora(bert(), r=2, target_modules=["query"], task_type="SEQ_CLS"))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["modules_to_save"] == ["classifier"]
    path.write_text(json.dumps(fields | {"modules_to_save": None}))
    again = load_adapter(bert(), tmp_path)
    assert in_full(again) == ["classifier"] and torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS)[0], again(TOKENS)[0])
    load_adapter(again, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(weights).items() if "classifier" not in key}, weights)
    assert in_full(load_adapter(bert(), tmp_path)) == []
