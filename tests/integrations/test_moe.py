"""Mixtures of experts: the update on each expert's tokens is PEFT's update of all experts' weights, in every model."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lora import apply_lora, load_adapter, merge_and_unload, merged, save_adapter, set_adapter
from fused_lora.nn.experts import LoRAParameter
from fused_lora.peft import explain, fuse, unfuse

SIZE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZE |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DEEPSEEK = dict(n_routed_experts=4, moe_intermediate_size=16, n_group=2, topk_group=1, first_k_dense_replace=1)
DEEPSEEK |= dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
MODELS = {  # name: what its configuration has beside SIZE and the two experts of a token
    "Mixtral": dict(num_local_experts=4),
    "Qwen3Moe": dict(num_experts=4, head_dim=8, moe_intermediate_size=16),
    "GptOss": dict(num_local_experts=4, head_dim=8),  # biases, transposed weights, gate and up interleaved
    "Olmoe": dict(num_experts=4),
    "DeepseekV3": DEEPSEEK,
    "Phimoe": dict(num_local_experts=4),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def model(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SIZE | MODELS[name], num_experts_per_tok=2)
    return getattr(hf, f"{name}ForCausalLM")(config).to(dtype).eval()


def with_peft(base, targets=EXPERTS, **lora):
    """PEFT's model with an adapter that looks trained, on the experts alone."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets, **lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g).to(p.dtype) / 8
        p.requires_grad_("lora_" in name or name.endswith((".gate.weight", "router.weight", "embed_tokens.weight")))
    return model


def step(model, **inputs):
    """The logits and the gradients of adapters, routers and embeddings, by the names that PEFT's model has."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS, **inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | {n.removeprefix("base_model.model."): grad for n, grad in grads.items()}


def assert_near(got, want, tolerance=2e-5):
    assert got.keys() == want.keys()
    for name, t in got.items():
        torch.testing.assert_close(t, want[name], rtol=0, atol=tolerance * want[name].abs().max().item(), msg=name)


@pytest.fixture(scope="module", params=MODELS)
def twins(request):
    """The name, PEFT's model and what it computes; nobody changes it."""
    model_ = with_peft(model(request.param))
    return request.param, model_, step(model_)


def adapted(name, theirs, tmp_path):
    """Our model with the adapter that PEFT's has, by its file, and the same other parameters training."""
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(model(name), tmp_path)
    trains = {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}
    for n, p in ours.named_parameters():
        p.requires_grad_(n in trains or "lora_" in n)
    return ours


def parameters(model):
    return [module for module in model.modules() if isinstance(module, LoRAParameter)]


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_fused_it_is_peft_s(twins, implementation):
    _, theirs, want = twins
    fused = copy.deepcopy(theirs)
    fused.config._experts_implementation = implementation
    ways = fuse(fused)
    assert len(ways) == len(ways.of("update")) and "sorted by expert" in str(explain(fused))
    assert_near(step(fused), want)
    assert repr(fused) == repr(theirs) and list(fused.state_dict()) == list(theirs.state_dict())
    unfuse(fused)
    assert "fuse(model) has not been called" in str(explain(fused))


def test_ours_is_peft_s_and_files_go_both_ways(twins, tmp_path):
    name, theirs, want = twins
    ours = adapted(name, theirs, tmp_path / "theirs")
    assert parameters(ours) and not any(layer.why_copied() for layer in parameters(ours))
    assert_near({n.replace(".default", ".default.weight"): t for n, t in step(ours).items()}, want)
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(model(name), tmp_path / "ours")
    assert_near({"logits": back(TOKENS).logits.detach()}, {"logits": want["logits"]})
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    with merged(ours):
        assert_near({"logits": ours(TOKENS).logits.detach()}, {"logits": want["logits"]})
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    plain = merge_and_unload(ours)
    assert_near({"logits": plain(TOKENS).logits.detach()}, {"logits": want["logits"]})


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operators make, views aside."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t._is_view():
                self.made.add(tuple(t.shape))
        return out


def test_no_expert_s_weight_is_made(twins):
    _, theirs, _ = twins
    fused, shapes = copy.deepcopy(theirs), {}
    fuse(fused)
    layer = next(m for n, m in theirs.named_modules() if n.endswith("experts"))
    weights = {tuple(getattr(layer.get_base_layer(), key).shape) for key in ("gate_up_proj", "down_proj")}
    weights |= {(E, N, K) for E, K, N in weights}
    for key, one in (("fused", fused), ("PEFT", theirs)):
        with Shapes() as seen:
            one(input_ids=TOKENS, labels=TOKENS).loss.backward()
        shapes[key] = seen.made & weights
        one.zero_grad()
    assert shapes["PEFT"] and not shapes["fused"]


@pytest.fixture(scope="module")
def mixtral():
    """PEFT's Mixtral, nobody changes it."""
    return with_peft(model("Mixtral"))


def fused_twin(theirs):
    twin = copy.deepcopy(theirs)
    fuse(twin)
    return twin


@pytest.mark.parametrize("targets", [EXPERTS[:1], EXPERTS[1:]])
def test_one_of_the_two_parameters(targets):
    theirs = with_peft(model("Mixtral"), targets)
    fused = fused_twin(theirs)
    assert len(explain(fused).of("update")) == 2
    assert_near(step(fused), step(theirs))


def test_several_adapters_and_none(mixtral):
    theirs = copy.deepcopy(mixtral)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("other", config)
    fused = fused_twin(theirs)
    for one in (theirs, fused):
        one.base_model.set_adapter(["default", "other"])
    assert_near(step(fused), step(theirs))
    with fused.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(fused(TOKENS).logits, theirs(TOKENS).logits)
        assert "none of its adapters acts" in str(explain(fused))


def test_half_precision_is_as_near_to_the_truth_as_peft(mixtral):
    for autocast in (False, True):
        theirs = copy.deepcopy(mixtral)
        if not autocast:
            theirs = theirs.bfloat16()
        exact, fused = step(fused_twin(theirs).double()), fused_twin(theirs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, want = step(fused), step(theirs)
        for name, t in got.items():
            ours, peers = ((u.double() - exact[name]).norm() for u in (t, want[name]))
            assert ours <= 2 * peers, f"{name} {autocast}: {ours:.2e} over 2 * {peers:.2e}"


def test_experts_without_tokens_have_zero_gradients(mixtral):
    fused = fused_twin(mixtral)
    for name, p in fused.named_parameters():
        if name.endswith("gate.weight"):
            p.data = p.data - 1e3 * torch.eye(4)[:, :1] * p.data.sign()[:1]
    layer = fused.base_model.model.model.layers[0].mlp
    layer.gate.register_forward_hook(lambda gate, args, out: (*out[:2], out[2].clamp(min=1)))
    grads = step(fused)
    A = grads["model.layers.0.mlp.experts.lora_A.default.weight"].view(4, 3, -1)
    B = grads["model.layers.0.mlp.experts.lora_B.default.weight"].view(32, 3, 4)
    assert not A[0].any() and not B[:, :, 0].any() and A[1:].any() and B[:, :, 1:].any()


def test_checkpointing_compiling_and_generating(mixtral):
    fused = fused_twin(mixtral)
    want = step(fused)
    experts = fused.base_model.model.model.layers[0].mlp
    forward = experts.forward
    experts.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    assert_near(step(fused), want, 1e-6)
    del experts.forward
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(fused, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    got = {n.removeprefix("_orig_mod.base_model.model."): t for n, t in step(compiled).items()}
    assert_near(got, want, 1e-5)
    assert "grouped_linear" in graphs[0].print_readable(print_output=False)
    tokens = [one.generate(input_ids=TOKENS[:1], max_new_tokens=6, do_sample=False) for one in (fused, mixtral)]
    assert torch.equal(*tokens)


def hooked(experts):
    experts.register_forward_hook(lambda *_: None)


def trained(experts):
    experts.down_proj.requires_grad_(True)


def spread(experts):
    experts._is_expert_parallel = True


def of_sonic(experts):
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation = "sonicmoe"


@pytest.mark.parametrize(
    "change, reason, runs",
    [
        (hooked, "it has hooks", True),
        (trained, "its down_proj trains", True),
        (spread, "its experts lie on several devices", False),
        (of_sonic, "its experts implementation is 'sonicmoe'", False),
    ],
)
def test_what_is_left_to_the_model_s_own_forward(mixtral, tmp_path, change, reason, runs):
    fused, ours = fused_twin(mixtral), adapted("Mixtral", mixtral, tmp_path)
    theirs, layer = fused.base_model.model.model.layers[0].mlp.experts, ours.model.layers[0].mlp.experts
    change(theirs.get_base_layer())
    change(layer.module)
    assert reason in explain(fused).of("peft")[0].reason and reason in layer.why_copied()
    if runs:  # the others need a GPU or several processes
        want = mixtral(TOKENS).logits.detach()
        for one in (fused, ours):
            assert_near({"logits": one(TOKENS).logits.detach()}, {"logits": want})


def test_a_router_and_experts_of_other_classes_stay(tmp_path):
    base = model("Mixtral")
    apply_lora(base, r=2, target_modules=[], target_parameters=["gate.weight", *EXPERTS])
    reasons = [layer.why_copied() for layer in parameters(base)]
    assert reasons.count(None) == 4 and reasons.count("it is no experts class of transformers' interface") == 2
    base(input_ids=TOKENS, labels=TOKENS).loss.backward()
    set_adapter(base, None)
    assert torch.equal(base(TOKENS).logits, model("Mixtral")(TOKENS).logits)
