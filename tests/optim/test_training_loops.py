"""The optimizers in other people's loops: transformers' Trainer, accelerate, GradScaler."""

import pytest
import torch
from pair_problems import Net
from tiny_llama import llama
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from fused_lora import apply_lora
from fused_lora.optim import LoRAProAdamW, LoRARite, create_loraplus_optimizer, create_riemannian_optimizer

IDS = torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(3))
MAKERS = {
    "rite": lambda model: LoRARite(model, lr=0.05),
    "pro": lambda model: LoRAProAdamW(model, lr=0.01),
    "loraplus": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.003),
    "riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def adapted(hidden=32):
    return apply_lora(llama(hidden=hidden), r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["lm_head"])


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trainer_of(make, folder, model, **more):
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **dict(save_strategy="no") | more,
    )
    optimizer = make(model)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 6)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))


def test_trainer_takes_them_and_resumes_from_its_checkpoint_bit_for_bit(make, tmp_path):
    whole = adapted()
    trainer = trainer_of(make, tmp_path, whole, save_strategy="steps", save_steps=3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = adapted()
    trainer_of(make, tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(trained(resumed), trained(whole)) and not equal(trained(adapted()), trained(whole))


def test_accelerate_accumulates_saves_and_loads(make, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted()
    model, optimizer = accelerator.prepare(model, make(model))

    def steps(first, last):
        for i in range(first, last):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=IDS[i : i + 2], labels=IDS[i : i + 2]).loss)
                optimizer.step()
                optimizer.zero_grad()

    steps(0, 4)
    accelerator.save_state(str(tmp_path))
    steps(4, 8)
    want = trained(model)
    accelerator.load_state(str(tmp_path))
    assert not equal(trained(model), want)
    steps(4, 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert equal(trained(model), want)


def test_a_grad_scaler_unscales_before_the_step(make):
    """A power of two changes no bit; a step with an overflow is left out."""
    plain, scaled = Net(), Net()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    loss = lambda model: (model(x) - x[:, :4].sin()).square().mean()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = make(plain), make(scaled)
    for _ in range(3):
        loss(plain).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        scaler.scale(loss(scaled)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        optimizers[1].zero_grad()
    assert equal(trained(plain), trained(scaled))
    scaler.scale(loss(scaled) * float("inf")).backward()
    scaler.step(optimizers[1])
    assert equal(trained(plain), trained(scaled))
