"""Models of transformers and PyTorch, tiny and random: "all-linear" adapts what PEFT's adapts, the outputs and the
gradients are PEFT's, files go both ways."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from fused_lora import apply_lora, load_adapter, save_adapter
from fused_lora.nn import LoRALayer
from fused_lora.nn.experts import pattern_name
from fused_lora.nn.modules_to_save import ModuleToSave

SIZE = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SIZE | dict(num_key_value_heads=2, pad_token_id=0)
IMAGES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
TOKENS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
SOUND = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))


@dataclass
class Case:
    """A model, its inputs, the task type that PEFT needs, ours sees by itself, and what PEFT cannot adapt, or would in
    vain."""

    make: Callable[[], nn.Module]
    inputs: dict
    task_type: str | None = None
    exclude: tuple[str, ...] = ()


def of(name, inputs=None, task_type=None, exclude=(), **fields):
    """A model of transformers by its class's name and its configuration's fields."""
    kind = getattr(hf, name)
    return Case(lambda: kind(kind.config_class(**fields)), inputs or dict(input_ids=TOKENS), task_type, exclude)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

    def forward(self, x):
        return self.layer(x)


CASES = {
    "llama": of("LlamaForCausalLM", **GROUPED),
    "qwen2": of("Qwen2ForCausalLM", **GROUPED),
    "qwen3": of("Qwen3ForCausalLM", **GROUPED, head_dim=8),
    "gemma2": of("Gemma2ForCausalLM", **GROUPED, head_dim=8),
    "gemma3": of("Gemma3ForCausalLM", **GROUPED, head_dim=8),
    "mistral": of("MistralForCausalLM", **GROUPED),
    "phi3": of("Phi3ForCausalLM", **GROUPED),
    "gpt2": of("GPT2LMHeadModel", vocab_size=96, n_embd=32, n_layer=2, n_head=4),
    "falcon": of("FalconForCausalLM", **SIZE, new_decoder_architecture=False),
    "neox": of("GPTNeoXForCausalLM", **SIZE),
    "opt": of("OPTForCausalLM", **SIZE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32),
    "bloom": of("BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "t5": of(
        "T5ForConditionalGeneration",
        dict(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :5]),
        **dict(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    ),
    "bert-sequences": of("BertForSequenceClassification", task_type="SEQ_CLS", **SIZE, num_labels=3),
    "bert-tokens": of("BertForTokenClassification", task_type="TOKEN_CLS", exclude=("classifier",), **SIZE),
    "bert-answers": of("BertForQuestionAnswering", task_type="QUESTION_ANS", exclude=("qa_outputs",), **SIZE),
    "roberta-sequences": of("RobertaForSequenceClassification", task_type="SEQ_CLS", **SIZE),
    "llama-sequences": of("LlamaForSequenceClassification", task_type="SEQ_CLS", **GROUPED),
    "vit": of("ViTModel", dict(pixel_values=PIXELS), **IMAGES),
    "vit-images": of("ViTForImageClassification", dict(pixel_values=PIXELS), "SEQ_CLS", **IMAGES),
    "clip": of(
        "CLIPModel",
        dict(input_ids=TOKENS, pixel_values=PIXELS),
        text_config=SIZE | dict(max_position_embeddings=32, projection_dim=16, eos_token_id=2),
        vision_config=IMAGES | dict(projection_dim=16),
        projection_dim=16,
    ),
    "whisper": of(
        "WhisperForConditionalGeneration",
        dict(input_features=SOUND, decoder_input_ids=TOKENS[:, :5]),
        **dict(vocab_size=96, d_model=32, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64),
        **dict(encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=64, max_source_positions=16),
        **dict(max_target_positions=16, pad_token_id=0, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2),
    ),
    "mixtral": of("MixtralForCausalLM", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": of(
        "Qwen3MoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "deepseek": of(
        "DeepseekV3ForCausalLM",
        **GROUPED | dict(num_key_value_heads=4),
        **dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32),
        **dict(first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8),
        **dict(qk_nope_head_dim=8, n_shared_experts=1),
    ),
    # An input that needs a gradient: without, the encoder layer's fused path passes by PEFT's adapters.
    "encoder": Case(Encoder, dict(x=torch.randn(2, 5, 16).requires_grad_()), exclude=("out_proj",)),
}


@dataclass
class Pair:
    """A model with an adapter of PEFT's on it that acts, and one of ours that read PEFT's file."""

    case: Case
    theirs: nn.Module
    ours: nn.Module
    directory: str


def plain(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    case, directory = CASES[request.param], tmp_path_factory.mktemp("adapter")
    given = dict(r=3, lora_alpha=6, target_modules="all-linear", exclude_modules=list(case.exclude))
    config = peft.LoraConfig(**given, task_type=case.task_type)
    theirs = peft.get_peft_model(plain(case), config).eval()
    g = torch.Generator().manual_seed(4)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.1
    theirs.save_pretrained(directory)
    return Pair(case, theirs, load_adapter(plain(case), directory), directory)


def outputs(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    got = model(**inputs)
    got = [got] if isinstance(got, torch.Tensor) else list(got.values())
    return [t for t in got if isinstance(t, torch.Tensor) and t.is_floating_point()]


def loss(model: nn.Module, inputs: dict) -> torch.Tensor:
    """One number that every output is in, unlike for each element."""
    trained = [t for t in outputs(model, inputs) if t.requires_grad]
    return sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in trained)


def adapted_by_peft(model: nn.Module) -> set[str]:
    found = set()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found.add(pattern_name(name, module))
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            found.add(f"all of {name}")
    return found


def adapted_by_us(model: nn.Module) -> set[str]:
    layers = {pattern_name(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer)}
    return layers | {f"all of {name}" for name, m in model.named_modules() if isinstance(m, ModuleToSave)}


def key(name: str) -> str:
    """A parameter's name as in the file."""
    name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    return name.replace(".default.weight", "").replace(".default", "")


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss(model, inputs).backward()
    return {key(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_is_peft_s(pair):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'all-linear' leaves out .* as in PEFT")  # DeepSeek's dense layers
        model = apply_lora(plain(pair.case), r=3, lora_alpha=6)
    want = adapted_by_peft(pair.theirs)
    assert len(want) >= 2 and adapted_by_us(model) == want
    trained = {key(name): p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {key(name): p.shape for name, p in pair.theirs.named_parameters() if p.requires_grad}


def test_outputs_and_gradients_are_peft_s(pair):
    models = (plain(pair.case), pair.theirs, pair.ours)
    base, want, got = ([t.detach() for t in outputs(model, pair.case.inputs)] for model in models)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(want, base, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    wanted, found = gradients(pair.theirs, pair.case.inputs), gradients(pair.ours, pair.case.inputs)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-6, msg=name
            )


def test_the_file_goes_back_to_peft(pair, tmp_path):
    save_adapter(pair.ours, tmp_path)
    ours, theirs = (load_file(f"{where}/adapter_model.safetensors") for where in (tmp_path, pair.directory))
    assert {name: t.tolist() for name, t in ours.items()} == {name: t.tolist() for name, t in theirs.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected).*keys")
        again = peft.PeftModel.from_pretrained(plain(pair.case), tmp_path).eval()
    assert adapted_by_peft(again) == adapted_by_peft(pair.theirs)
    torch.testing.assert_close(outputs(again, pair.case.inputs), outputs(pair.theirs, pair.case.inputs))


def mamba():
    torch.manual_seed(0)
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4)
    )


def test_mamba_is_adapted_where_its_layers_are_called():
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.get_peft_model(mamba(), peft.LoraConfig(target_modules="all-linear"))
    left = r"'all-linear' leaves out x_proj of MambaMixer, dt_proj of MambaMixer, out_proj of MambaMixer: code there"
    with pytest.warns(UserWarning, match=left):
        ours = apply_lora(mamba())
    assert adapted_by_us(ours) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}
    assert all(grad is not None for grad in gradients(ours, dict(input_ids=TOKENS)).values())
    with pytest.raises(ValueError, match="target_modules must leave out out_proj of MambaMixer: code there reads"):
        apply_lora(mamba(), target_modules=["in_proj", "out_proj"])
