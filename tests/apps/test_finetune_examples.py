"""Fine-tuning on examples: the loss is the answers', the curve is PEFT's and transformers' Trainer's, a run resumes,
and what cannot be done is said before anything is written."""

import json

import pytest
import torch
from finetune_runs import FILES, rows_of
from torch.nn import functional as F

from fused_lora import apply_lora, data, save_adapter
from fused_lora.finetune import checkpoint, job, loop
from fused_lora.rows import IGNORED

LETTERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def pairs(tiny_model, tmp_path_factory):
    """(model directory, file of prompts and completions of several lengths)."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"{i} is ", "completion": " ".join(LETTERS[int(d)] for d in str(i))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_model, str(path)


def peft_batches(settings, tokenizer):
    """What the Trainer gets: the run's order of the rows, each made anew by the tokenizer, prompts and filling -100."""
    train, _ = data.read(settings.data, (), "text")
    rows = []
    for number in data.shuffled(
        len(train), 0, settings.steps * settings.batch_size * settings.grad_accum, settings.seed
    ):
        example = train[number]
        prompt, answer = (tokenizer(t)["input_ids"] for t in (example.prompt, example.completion + "<eos>"))
        rows.append(dict(input_ids=prompt + answer, labels=[IGNORED] * len(prompt) + answer))
    return rows


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return dict(input_ids=padded("input_ids", 256), labels=padded("labels", IGNORED), attention_mask=mask)


def peft_model(settings, adapter, dtype):
    import peft

    model, tokenizer = job.load_model(settings.model, dtype, "cpu")
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True), tokenizer


def trainer_curve(settings, adapter, output):
    from transformers import Trainer, TrainingArguments

    model, tokenizer = peft_model(settings, adapter, torch.float32)
    arguments = TrainingArguments(
        output,
        learning_rate=settings.lr,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        lr_scheduler_type=settings.schedule,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=peft_batches(settings, tokenizer), data_collator=collate)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {name: [row[key] for row in rows] for name, key in (("loss", "loss"), ("grad_norm", "grad_norm"))}, model


def exact_curve(settings, adapter):
    """The same in fp64, written out."""
    model, tokenizer = peft_model(settings, adapter, torch.float64)
    model.train()
    rows, found = peft_batches(settings, tokenizer), {"loss": [], "grad_norm": []}
    trained = [p.requires_grad_(True) for n, p in model.double().named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    size = settings.batch_size * settings.grad_accum
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * {"constant": 1.0, "linear": 1 - step / settings.steps}[settings.schedule]
        batch = rows[step * size : (step + 1) * size]
        sums = [
            F.cross_entropy(
                model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double(),
                torch.tensor(row["labels"][1:]),
                reduction="sum",
            )
            for row in batch
        ]
        loss = sum(sums) / sum(label != IGNORED for row in batch for label in row["labels"][1:])
        optimizer.zero_grad()
        loss.backward()
        found["grad_norm"].append(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item())
        found["loss"].append(loss.item())
        optimizer.step()
    return found, model


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_curve_is_that_of_peft_and_trainer(pairs, run, settings_of, tmp_path, schedule):
    """Loss, gradient norm and the trained adapter are as near to fp64 as PEFT's in transformers' Trainer."""
    settings = settings_of(pairs, schedule=schedule, warmup=0, lr=3e-3, steps=8)
    start, _ = job.load_model(settings.model, torch.float32, "cpu")
    torch.manual_seed(settings.seed)
    apply_lora(start, settings.lora())
    save_adapter(start, tmp_path / "start")
    run(settings, tmp_path / "out")
    ours = {name: [row[name] for row in rows_of(tmp_path / "out")[1:]] for name in ("loss", "grad_norm")}
    exact, exact_model = exact_curve(settings, tmp_path / "start")
    theirs, their_model = trainer_curve(settings, tmp_path / "start", tmp_path / "trainer")
    for name in ("loss", "grad_norm"):
        truth = torch.tensor(exact[name], dtype=torch.float64)
        error, same = ((torch.tensor(c[name], dtype=torch.float64) - truth).abs().max() for c in (ours, theirs))
        assert len(ours[name]) == 8 and error <= 2 * same + 4 * torch.finfo(torch.float32).eps * truth.abs().max(), name
    our_model, _ = peft_model(settings, tmp_path / "out", torch.float32)
    of = [checkpoint.trained(model) for model in (our_model, their_model, exact_model)]
    assert len(of[0]) == 28
    # the mean of all elements: where a gradient is near zero, Adam makes its rounding as large as a step
    values = [torch.cat([of_one[name].detach().double().flatten() for name in of[2]]) for of_one in of]
    error, same = ((value - values[2]).abs().mean() for value in values[:2])
    assert error <= 2 * same + torch.finfo(torch.float32).eps * values[2].abs().mean()
    assert ours["loss"][-1] < ours["loss"][0]


def test_prompts_and_filling_teach_nothing(pairs):
    """A padded pass has the gradient of its rows alone, and the loss of their answers."""
    model, tokenizer = job.load_model(pairs[0], torch.float64, "cpu")
    model.requires_grad_(False)
    apply_lora(model, 4, 8)
    for parameter in checkpoint.trained(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    blocks = data.to_blocks(data.read_documents((pairs[1],), "text")[8:12], tokenizer, 64)
    total = loop.loss_sum(model, blocks)
    found = torch.autograd.grad(total, list(checkpoint.trained(model).values()))
    wanted = 0
    for i in range(8, 12):
        prompt, answer = (tokenizer(t)["input_ids"] for t in (f"{i} is ", " ".join(LETTERS[int(d)] for d in str(i))))
        answer = [*answer, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        wanted = wanted + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    for one, other in zip(found, torch.autograd.grad(wanted, list(checkpoint.trained(model).values())), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_on_examples_resumes_bit_for_bit(pairs, run, settings_of, tmp_path):
    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 5:
            raise Killed

    settings = settings_of(pairs, batch_size=3)
    run(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        run(settings, tmp_path / "killed", save_every=3, tick=kill)
    run(settings, tmp_path / "killed", resume=True)
    for name in FILES[:3]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_the_sample_goes_on_from_a_prompt(pairs, settings_of, tmp_path):
    summary = job.finetune(settings_of(pairs, steps=3), tmp_path / "out", say=lambda line: None)
    assert summary["prompt"] in [f"{i} is " for i in range(40)]


def test_what_is_refused_leaves_nothing_behind(pairs, refused, tmp_path, monkeypatch):
    path = tmp_path / "bad.jsonl"
    options = ["--model", pairs[0], "--device", "cpu", "--output", tmp_path / "out", "--data", path]
    good = json.dumps({"prompt": "a", "completion": "b"})
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    for line, message in (
        ('{"prompt": "a"', "line 2: must be JSON"),
        ('{"prompt": "a", "completion": 1}', "line 2: prompt and completion must be strings"),
        (json.dumps({"prompt": "a" * 300, "completion": "b"}), "line 2: must have at most --seq-len tokens, 256"),
        (chat, "line 2: messages must have a tokenizer with a chat template"),
    ):
        path.write_text(f"{good}\n{line}\n")
        assert f"{path}, {message}" in refused(2, "finetune", *options)
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(2, "finetune", "--model", pairs[0], "--data", pairs[1], "--output", tmp_path / "out")
    assert "environment variable RANK expected" in line and not (tmp_path / "out").exists()


def test_cut_and_packing_on_the_command_line(pairs, call, tmp_path):
    quick = [
        "--model",
        pairs[0],
        "--data",
        pairs[1],
        "--device",
        "cpu",
        "--steps",
        "2",
        "--warmup",
        "0",
        "--prompt",
        "the",
    ]
    call("finetune", *quick, "--seq-len", "12", "--cut", "--packing", "--output", tmp_path / "out")
    settings = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    assert settings["cut"] is True and settings["packing"] is True
