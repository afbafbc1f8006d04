"""A plain loop of accelerate with models of apply_lora."""

import pytest
import torch
from tiny_llama import llama, randomise
from torch.utils.data import DataLoader

from fused_lora import apply_lora, load_adapter, save_adapter

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
from accelerate import Accelerator, cpu_offload, dispatch_model  # noqa: E402

IDS = torch.randint(0, 128, (16, 8), generator=torch.Generator().manual_seed(3))
CPU = dict(cpu=True)


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its settings for the process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def adapted(seed=0):
    torch.manual_seed(seed)
    return apply_lora(llama(), r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1, modules_to_save=["lm_head"])


def steps(accelerator, model, optimizer, data, n):
    """Losses of n batches."""
    losses = []
    for _, batch in zip(range(n), data):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepared(batch_size=2, **settings):
    accelerator = Accelerator(**CPU, **settings)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(IDS, batch_size))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_trains_and_unwraps_to_an_adapter_folder(precision, tmp_path):
    accelerator, model, optimizer, data = prepared(mixed_precision=precision)
    losses = steps(accelerator, model.train(), optimizer, data, 8)
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and sum(losses[-2:]) < sum(losses[:2])
    whole = accelerator.unwrap_model(model)
    whole.name_or_path = "a base on the hub"
    whole.save_pretrained(tmp_path, is_main_process=True, state_dict=accelerator.get_state_dict(model))
    save_adapter(whole, tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    assert not (tmp_path / "model.safetensors").exists()
    got = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(got(IDS).logits, whole.eval()(IDS).logits.float(), atol=0.05, rtol=0)


def test_accumulation_is_the_larger_batch():
    got, want = [], []
    for batch_size, every, into in ((2, 4, got), (8, 1, want)):
        accelerator, model, optimizer, data = prepared(batch_size, gradient_accumulation_steps=every)
        steps(accelerator, model.eval(), optimizer, data, 8)  # eval: no dropout, gradients all the same
        into += [p.detach().clone() for p in model.parameters() if p.requires_grad]
        accelerator.free_memory()
        fresh = accelerate.state.AcceleratorState
        fresh._reset_state(reset_partial_state=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_save_state_and_load_state_resume_exactly(tmp_path):
    accelerator, model, optimizer, data = prepared()
    steps(accelerator, model.train(), optimizer, data, 3)
    accelerator.save_state(str(tmp_path))
    want = steps(accelerator, model, optimizer, data, 3)
    randomise(model, seed=5)
    accelerator.load_state(str(tmp_path))
    assert steps(accelerator, model, optimizer, data, 3) == want


@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
def test_models_spread_after_they_were_adapted(how, tmp_path):
    model = randomise(adapted()).eval()
    want = model(IDS).logits.detach()
    save_adapter(model, tmp_path / "before")
    if how == "dispatched":
        places = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        model = dispatch_model(model, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
    else:
        model = cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want)
    model.name_or_path = "a base on the hub"
    model.save_pretrained(tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        before, after = ((tmp_path / name / file).read_bytes() for name in ("before", "after"))
        assert file.endswith("json") or before == after
