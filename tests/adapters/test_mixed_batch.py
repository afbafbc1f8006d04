"""Many adapters in one batch: equal to a loop over the adapters, also in training and generation; strict; light."""

import pytest
import torch
from tiny_llama import llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_lora
from fused_lora import adapters_per_sample, adapters_per_token, apply_lora, delete_adapter, set_adapter
from fused_lora.nn import mixed_batch
from fused_lora.nn.mixed_batch import Mixed, Segments

NAMES = ["a", "b", "c", "d"]
BATCH = ["b", "__base__", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with adapters of several ranks, scalings, kinds and targets; d is DoRA, only c has a head."""
    model = llama(hidden=32)
    given = dict(
        a=dict(r=4, lora_alpha=8),
        b=dict(r=2, lora_alpha=1, target_modules=["q_proj", "down_proj"], use_rslora=True),
        c=dict(r=7, target_modules=["q_proj", "v_proj", "embed_tokens"], modules_to_save=["lm_head"]),
        d=dict(r=3, target_modules=["q_proj", "gate_proj"], use_dora=True),
    )
    generator = torch.Generator().manual_seed(1)
    for name, config in given.items():
        apply_lora(model, config=fused_lora.LoraConfig(**config), adapter_name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    set_adapter(model, "a")
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (6, 9), generator=torch.Generator().manual_seed(2))


def one_by_one(model, tokens, names):
    """Each sample with its adapter active."""
    outs = []
    for sample, name in zip(tokens, names):
        set_adapter(model, None if name == "__base__" else name)
        outs.append(model(sample[None]).logits)
    set_adapter(model, "a")
    return torch.cat(outs)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mixed_batch_is_a_loop_over_its_samples(model, tokens):
    want = one_by_one(model, tokens, BATCH)
    with adapters_per_sample(model, BATCH):
        same(model(tokens).logits, want)
        with adapters_per_sample(model, ["a"] * 6):  # inside another
            same(model(tokens).logits, one_by_one_within(model, tokens))
        same(model(tokens).logits, want)
    same(model(tokens, adapter_names=BATCH).logits, want)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    same(model(tokens[order], adapter_names=[BATCH[i] for i in order]).logits, want[order])
    assert not any(isinstance(module, Mixed) for module in model.modules())
    same(model(tokens).logits, model(tokens, adapter_names=["a"] * 6).logits)


def test_no_names_are_no_batch(model, tokens):
    for call in (lambda: model(tokens, adapter_names=[]), lambda: adapters_per_sample(model, []).__enter__()):
        with pytest.raises(ValueError, match="adapter_names must have a name for each sample; got none"):
            call()


def one_by_one_within(model, tokens):
    return torch.cat([model(sample[None], adapter_names=["a"]).logits for sample in tokens])


@torch.no_grad()
def test_adapters_by_token(model, tokens):
    """With all tokens of a sample alike it is a mixed batch of samples; one token's adapter changes no earlier one."""
    names = ["d", "b", "a", "c"]
    ids = torch.tensor([names.index(name) if name in names else -1 for name in BATCH])[:, None].expand(6, 9)
    want = one_by_one(model, tokens, BATCH)
    with adapters_per_token(model, ids, names):
        same(model(tokens).logits, want)
    other = ids.clone()
    other[:, 5:] = torch.randint(-1, 4, (6, 4), generator=torch.Generator().manual_seed(3))
    with adapters_per_token(model, other, names):
        mixed = model(tokens).logits
    same(mixed[:, :5], want[:, :5])
    assert (mixed[:, 6:] - want[:, 6:]).abs().max() > 1e-2


def test_a_linear_layer_by_token_is_a_loop_over_its_rows():
    """Random ids with -1 and an adapter without a token: results and gradients, which are zero for that adapter."""
    torch.manual_seed(0)
    layer, ids = fused_lora.LoRALinear(12, 10, r=3, adapter_name="a").double(), torch.randint(-1, 2, (4, 5))
    for name, r in (("b", 2), ("empty", 4)):
        layer.add_adapter(name, r, adapter_dtype=torch.float64)
    for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
        nn.init.normal_(parameter).requires_grad_()
    names, x = ["a", "b", "empty"], torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.lora_A.values(), *layer.lora_B.values()]
    dy = torch.randn(4, 5, 10, dtype=torch.float64)
    with adapters_per_token(nn.Sequential(layer), ids, names):
        y = layer(x)
        grads = torch.autograd.grad(y, leaves, dy)
    rows = []
    for i, row in zip(ids.flatten(), x.reshape(20, 12)):
        layer.active_adapter = None if i < 0 else names[i]
        rows.append(layer(row))
    want = torch.stack(rows).view(4, 5, 10)
    torch.testing.assert_close(y, want)
    expected = torch.autograd.grad(want, leaves, dy, allow_unused=True)
    torch.testing.assert_close(grads, tuple(torch.zeros_like(t) if e is None else e for t, e in zip(leaves, expected)))


def test_it_trains_as_one_by_one(model, tokens):
    """The gradients of every adapter of a batch."""
    batch = [name for name in BATCH if name != "__base__"]
    trained = [p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    before = [p.requires_grad for p in trained]
    model.train()
    try:
        results = []
        for mixed in (True, False):
            for parameter in trained:
                parameter.requires_grad_()
                parameter.grad = None
            if mixed:
                model(tokens[:5], adapter_names=batch).logits.square().mean().backward()
            else:
                for sample, name in zip(tokens, batch):
                    set_adapter(model, name)
                    (model(sample[None]).logits.square().mean() / 5).backward()
            results.append([p.grad for p in trained])
        for got, want in zip(*results):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        assert sum(grad is not None for grad in results[0]) == len(trained)
    finally:
        set_adapter(model, "a")
        model.eval()
        for parameter, needed in zip(trained, before):
            parameter.requires_grad_(needed)
            parameter.grad = None


def test_checkpointing_recomputes_inside_the_context(model, tokens):
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    try:
        with pytest.raises(ValueError, match="adapter_names and gradient checkpointing exclude each other"):
            model(tokens, adapter_names=BATCH)
        set_adapter(model, ["a", "b"])
        grads = []
        for checkpointed in (True, False):
            if not checkpointed:
                model.gradient_checkpointing_disable()
            model.zero_grad()
            with adapters_per_sample(model, ["a", "b"] * 3):
                model(tokens).logits.square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*grads)
    finally:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        set_adapter(model, "a")
        model.eval()


@torch.no_grad()
def test_generation(model, tokens):
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = []
    for sample, name in zip(tokens, BATCH):
        set_adapter(model, None if name == "__base__" else name)
        alone.append([model.generate(sample[None], **options, num_beams=beams) for beams in (1, 2)])
    set_adapter(model, "a")
    for beams in (1, 2):
        got = model.generate(tokens, adapter_names=BATCH, num_beams=beams, **options)
        assert torch.equal(got, torch.cat([each[beams - 1] for each in alone]))
    with adapters_per_sample(model, BATCH):
        assert torch.equal(model.generate(tokens, **options), torch.cat([each[0] for each in alone]))


def test_bad_input_is_named(model, tokens):
    with pytest.raises(ValueError, match=r"adapter_names must be one of .*; got 'e'"):
        model(tokens, adapter_names=["a"] * 5 + ["e"])
    with pytest.raises(ValueError, match=r"adapter_names must be one of .*; got 'base' \(did you mean '__base__'\?\)"):
        adapters_per_sample(model, ["base"]).__enter__()
    with pytest.raises(ValueError, match=r"adapter_names must have one name for each of the 6 samples .*; got 5"):
        model(tokens, adapter_names=["a"] * 5)
    with pytest.raises(ValueError, match="adapter_names must be a list of names; got 'a'"):
        model(tokens, adapter_names="a")
    with pytest.raises(ValueError, match=r"adapter_ids must be in \[-1, 2\), places in adapter_names; got 2"):
        adapters_per_token(model, torch.full((6, 9), 2), ["a", "b"]).__enter__()
    with pytest.raises(ValueError, match="adapter_ids must be an int64 or int32 tensor; got torch.float32"):
        adapters_per_token(model, torch.zeros(6, 9), ["a", "b"]).__enter__()
    wrong = pytest.raises(ValueError, match=r"adapter_ids must have the leading dimensions of an input \[6, 9, 32\]")
    with wrong, adapters_per_token(model, torch.zeros(6, 8, dtype=torch.int64), ["a"]):
        model(tokens)
    with pytest.raises(ValueError, match="adapter_names must be different adapters"):
        adapters_per_token(model, torch.zeros(6, 9, dtype=torch.int64), ["a", "a"]).__enter__()
    layer = model.model.layers[0].self_attn.q_proj
    layer.merge()
    with pytest.raises(ValueError, match=r"q_proj must be unmerged for several adapters in a batch; got 'a' merged"):
        model(tokens, adapter_names=BATCH)
    layer.unmerge()
    assert not any(isinstance(module, Mixed) for module in model.modules())


@torch.no_grad()
def test_merging_in_a_mixed_batch_is_refused(model, tokens):
    """Else the rows of every adapter would get the merged one, too."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    words = r"merging and a batch of several adapters exclude each other; got \['a'\]"
    with adapters_per_sample(model, BATCH):
        with pytest.raises(ValueError, match=words):
            model.model.layers[0].self_attn.q_proj.merge()
        with pytest.raises(ValueError, match=words), fused_lora.merged(model):
            pass
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with fused_lora.merged(model):
        pass


def test_other_adapters_within_a_mixed_batch_are_refused(model, tokens, tmp_path):
    fused_lora.save_adapter(model, tmp_path, "a")
    within = {
        "set_adapter": lambda: fused_lora.set_adapter(model, "a"),
        "adding an adapter": lambda: fused_lora.apply_lora(model, r=2, adapter_name="new"),
        "reading an adapter": lambda: fused_lora.load_adapter(model, tmp_path, "a"),
        "disable_adapter": lambda: fused_lora.disable_adapter(model).__enter__(),
        "taking an adapter off": lambda: fused_lora.delete_adapter(model, "a"),
    }
    with fused_lora.adapters_per_sample(model, ["a"] * 6):
        want = model(tokens).logits
        for what, call in within.items():
            words = (
                rf"{what} and adapters_per_sample or adapters_per_token exclude each other.*; got a batch of \['a'\]"
            )
            with pytest.raises(ValueError, match=words):
                call()
        assert torch.equal(model(tokens).logits, want)


def test_magnitudes_alone_are_refused():
    model = fused_lora.apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), r=0, use_dora=True)
    with pytest.raises(
        ValueError, match="0: a batch of several adapters excludes DoRA of rank 0; got adapter 'default'"
    ):
        fused_lora.adapters_per_sample(model, ["default"]).__enter__()


def test_adapters_come_and_go_while_serving(tokens):
    """Nothing of a deleted adapter stays behind, and one of the same name is another."""
    model = apply_lora(llama(hidden=32), r=2, adapter_name="a").eval()
    for seed in (0, 1):
        torch.manual_seed(seed)
        apply_lora(model, r=3, adapter_name="b", init_lora_weights=False)
        want = one_by_one(model, tokens[:2], ["b", "a"])
        same(model(tokens[:2], adapter_names=["b", "a"]).logits, want)
        delete_adapter(model, "b")
        with pytest.raises(ValueError, match="got 'b'"):
            model(tokens[:2], adapter_names=["b", "a"])
        assert not any(".b" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_a_thousand_adapters_share_the_base(tokens):
    """Their memory is that of their own tensors, and a batch of some costs none of the others' a look."""
    model = llama(hidden=32)
    base = {name: p.data_ptr() for name, p in model.named_parameters()}
    targets = ["q_proj"]
    layers = []
    for i in range(1000):
        if i == 0:
            apply_lora(model, r=8, target_modules=targets, adapter_name="0")
            layers = [m for m in model.modules() if isinstance(m, fused_lora.LoRALinear)]
        else:
            for layer in layers:
                layer.add_adapter(str(i), r=8)
    for i in (7, 700, 999):
        for layer in layers:
            nn.init.normal_(layer.lora_B[str(i)], std=0.1)
    now = {name.replace("base_layer.", ""): p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    assert now == base
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert own == 1000 * len(layers) * 8 * (32 + 32)
    model.eval()
    batch = ["700", "7", "__base__", "999", "7", "0"]
    want = one_by_one_layers(model, layers, tokens, batch)
    same(model(tokens, adapter_names=batch).logits, want)


def one_by_one_layers(model, layers, tokens, names):
    """Switched past set_adapter, which looks at all thousand."""
    outs = []
    for sample, name in zip(tokens, names):
        for layer in layers:
            layer.active_adapter = None if name == "__base__" else name
        outs.append(model(sample[None]).logits)
    return torch.cat(outs)


def test_a_thousand_switches_leave_the_weight_as_it_was():
    """Switching, and merging and unmerging, among three adapters over bf16, bit for bit; switching makes no tensor."""
    layer = fused_lora.LoRALinear(24, 20, r=4, adapter_name="0", dtype=torch.bfloat16)
    for i in (1, 2):
        layer.add_adapter(str(i), r=4)
    for B in layer.lora_B.values():
        nn.init.normal_(B)
    weight, at = layer.weight.detach().clone(), layer.weight.data_ptr()
    own = [p.data_ptr() for p in layer.parameters()]
    for i in range(1000):
        layer.set_adapter(str(i % 3))
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight, weight) and layer.weight.data_ptr() == at
    with torch.profiler.profile(profile_memory=True) as seen:
        layer.set_adapter("0")
    assert not [event for event in seen.events() if event.self_cpu_memory_usage > 0]
    assert [p.data_ptr() for p in layer.parameters()] == own


def test_segments_are_found_once_for_all_layers(model, tokens, monkeypatch):
    made = []
    monkeypatch.setattr(mixed_batch, "Segments", lambda *given: made.append(given) or Segments(*given))
    names, tokens = ["b", "a"] * 3, tokens[:, :7]  # a batch that no other test has
    with torch.inference_mode():
        model(tokens, adapter_names=names)
    assert 1 <= len(made) <= 3  # what holds both, one of them, or tokens without a dimension K
    model(tokens, adapter_names=names).logits.sum().backward()  # of segments that inference mode has found
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("look", ["fake", "export", "another default device"])
def test_who_looks_at_a_batch_first_leaves_nothing_behind(look):
    """Fake tensors, and those of another device, are not remembered for the calls that follow."""
    model = nn.Sequential(nn.Linear(8, 8))
    names = [f"{look} {n}" for n in range(2)]  # no other test has made their segments
    for name in names:
        apply_lora(model, r=2, target_modules=["0"], adapter_name=name)
    x = torch.randn(2, 3, 8)

    def mixed(x):
        with adapters_per_sample(model, names[::-1]):
            return model(x)

    class Mixing(nn.Module):
        def forward(self, x):
            return mixed(x)

    if look == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert mixed(mode.from_tensor(x)).shape == x.shape
    elif look == "export":
        torch.export.export(Mixing(), (x,), strict=False)
    else:
        with torch.device("meta"):
            mixed(x)
    torch.testing.assert_close(mixed(x), model[0].base()(x))  # B is zero
