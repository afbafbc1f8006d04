"""MergeSchedule: what a merge keeps, what it starts afresh, and what it refuses."""

import copy

import pytest
import torch
from tiny_llama import llama, randomise
from torch import nn

from fused_lora import LoraConfig, apply_lora, delete_adapter, load_adapter, merged, optim, unload
from fused_lora.schedules import MergeSchedule

IDS = torch.arange(24).view(2, 12)


def small(dtype=torch.float32, bias=False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48, bias), nn.Tanh(), nn.Linear(48, 24, bias)).to(dtype)


def qwen():
    """With biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2)).eval()


def adapted(r=4, dtype=torch.float32, **options) -> nn.Sequential:
    torch.manual_seed(1)
    return apply_lora(small(dtype), r, 2 * r, target_modules=["0", "2"], **options)


def factors(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, steps, schedule=None, optimizer=None, scheduler=None, lr=0.05, first=0):
    """Steps on data that the step's number decides."""
    optimizer = optimizer or torch.optim.AdamW(factors(model), lr=lr)
    dtype = model[0].weight.dtype
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x, want = torch.randn(16, 32, generator=g, dtype=dtype), torch.randn(16, 24, generator=g, dtype=dtype)
        loss = (model(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step(optimizer, scheduler)
    return optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_a_merge_keeps_the_output_and_clears_the_optimizer_s_state(momentum):
    model = randomise(apply_lora(llama(), 4, 8))
    schedule = MergeSchedule(model, every=3, momentum=momentum)
    optimizer = torch.optim.AdamW(factors(model), lr=0.01)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert not schedule.step(optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        before, layer = model(IDS).logits, model.model.layers[0].mlp.up_proj
        weight, update = (
            layer.weight.clone(),
            layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"],
        )
        assert schedule.step(optimizer)
        after = model(IDS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6 * before.abs().max().item())
    torch.testing.assert_close(layer.weight, weight + (1 - momentum) * update, rtol=0, atol=1e-6)
    now = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(now, momentum * update, rtol=0, atol=1e-6)
    assert len(optimizer.state) == 0 and all(parameter.grad is None for parameter in factors(model))
    assert not layer.weight.requires_grad
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values()) and len(optimizer.state) == len(factors(model))


def test_drop_discards_the_share_that_is_not_merged():
    model = randomise(adapted())
    weight, layer = model[0].weight.detach().clone(), model[0]
    update = (layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]).detach()
    MergeSchedule(model, every=1, momentum=0.25, momentum_mode="drop").step(torch.optim.SGD(factors(model), lr=0.1))
    torch.testing.assert_close(layer.weight, weight + 0.75 * update, rtol=0, atol=1e-6)
    assert not layer.lora_B["default"].any() and layer.lora_A["default"].any()


def test_the_rank_of_the_whole_update_grows_with_the_stages():
    model = adapted(r=3)
    start = model[0].weight.detach().double().clone()
    schedule = MergeSchedule.periodic(model, every=6, reset_scheduler=False)
    optimizer = None
    for j in (1, 2, 3):
        optimizer = train(model, 6, schedule, optimizer, first=6 * j)
        rank = torch.linalg.matrix_rank(model[0].weight.double() - start, rtol=1e-4)
        assert rank == 3 * j, "above one adapter's from the second stage on"


def test_without_a_knot_training_is_lora_s_bit_for_bit():
    plain, chained = adapted(), adapted()
    train(plain, 5)
    train(chained, 5, MergeSchedule.chain(chained, knots=[6]))
    for want, got in zip(plain.parameters(), chained.parameters(), strict=True):
        assert torch.equal(want, got)


def test_ranks_step_down_at_the_knots():
    model, x = adapted(r=8), torch.randn(5, 32)
    schedule = MergeSchedule.chain(model, knots=[2, 4], ranks=[8, 4, 2])
    optimizer = train(model, 1, schedule)
    sizes = [sum(parameter.numel() for parameter in factors(model))]
    for knot in (2, 4):
        with torch.no_grad():
            before = model(x)
        assert schedule.step(optimizer)
        sizes.append(sum(parameter.numel() for parameter in factors(model)))
        torch.testing.assert_close(model(x), before)
        train(model, 1, schedule, optimizer, first=knot)
    assert sizes == [8 * (32 + 48 + 48 + 24), 4 * 152, 2 * 152]
    assert model[0].scaling["default"] == 16 / 2 and model[0].lora_A["default"].shape == (2, 32)
    assert {id(p) for p in factors(model)} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) == set(factors(model)) and model[0].lora_B["default"].any()


def test_a_change_of_rank_may_be_the_optimizer_s_own_affair():
    model, seen = adapted(r=4), []

    def rebuild(optimizer, replaced):
        seen.append(replaced)
        optimizer.param_groups[0]["params"] = factors(model)

    optimizer = train(model, 1, MergeSchedule(model, knots=[1], ranks=[4, 2], rebuild_optimizer=rebuild))
    assert [old.shape[0] for old in seen[0] if old.shape[1] == 32] == [4] and len(seen[0]) == 4
    assert all(any(new is p for p in factors(model)) for new in seen[0].values())
    train(model, 2, optimizer=optimizer)
    assert model[2].lora_B["default"].any()


@pytest.mark.parametrize(
    "kind", [dict(every=3), dict(every=3, momentum=0.5, warmup=2), dict(knots=[4, 7], ranks=[4, 2, 3], export="stack")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [2, 4, 8])
def test_a_run_that_stops_resumes_bit_for_bit(kind, dtype, stop, tmp_path):
    def begin():
        model = adapted(dtype=dtype, lora_dropout=0.2)
        schedule = MergeSchedule(model, reset_scheduler=True, **kind)
        optimizer = torch.optim.AdamW(factors(model), lr=0.05)
        return model, schedule, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def go_on(run, steps, first=0):
        model, schedule, optimizer, scheduler = run
        train(model, steps, schedule, optimizer, scheduler, first=first)

    torch.manual_seed(3)
    whole = begin()
    go_on(whole, 10)
    torch.manual_seed(3)
    stopped = begin()
    go_on(stopped, stop)
    model, schedule, optimizer, scheduler = stopped
    schedule.save(tmp_path / "schedule.safetensors")
    adapter = {key: t.clone() for key, t in model.state_dict().items() if "lora_" in key}
    state = copy.deepcopy((adapter, optimizer.state_dict(), scheduler.state_dict())), torch.get_rng_state()
    torch.rand(9)
    resumed = model, schedule, optimizer, scheduler = begin()
    schedule.load(tmp_path / "schedule.safetensors", optimizer)
    (adapter, optimizer_state, scheduler_state), rng = state
    model.load_state_dict(adapter, strict=False)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    torch.set_rng_state(rng)
    go_on(resumed, 10 - stop, stop)
    for want, got in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(want, got)
    want, got = whole[1].state_dict(), resumed[1].state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)


def test_a_state_of_before_the_first_merge_is_refused_after_one():
    model = randomise(adapted())
    schedule = MergeSchedule(model, every=1)
    before = schedule.state_dict()
    train(model, 1, schedule)
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match="load it over the original model; got a state of before, and 1 merges done"):
        schedule.load_state_dict(before)
    assert schedule.merges == 1 and torch.equal(model[0].weight, weight)


def test_a_state_without_masters_replaces_those_of_the_schedule():
    """The next merge goes on from the loaded weights."""
    plain, other = adapted(dtype=torch.bfloat16), adapted(dtype=torch.bfloat16)
    saved, schedule = MergeSchedule(plain, every=1, master=False), MergeSchedule(other, every=1)
    train(plain, 1, saved)
    train(other, 3, schedule, lr=0.5)
    schedule.load_state_dict(saved.state_dict())
    schedule.merge(torch.optim.SGD(factors(other), lr=0.1))  # a fresh adapter changes nothing
    assert torch.equal(other[0].weight, plain[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_keeps_what_rounding_loses(dtype):
    """Sixty small merges: each far below the weight's last bit, together far above it."""

    def error(master):
        model = adapted(dtype=dtype)
        schedule, layer = MergeSchedule(model, every=1, master=master, reset_optimizer=False), model[0]
        exact = layer.weight.detach().double().clone()
        g = torch.Generator().manual_seed(5)
        for _ in range(60):
            with torch.no_grad():
                layer.lora_B["default"].copy_(torch.rand(48, 4, generator=g) * 2e-5)
                layer.lora_A["default"].copy_(torch.rand(4, 32, generator=g))
                exact += layer.scaling["default"] * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
            schedule.step()
        return (layer.weight - exact).abs().max().item(), (exact - exact.to(dtype)).abs().max().item()

    with_master, rounding = error(True)
    assert with_master <= 1.01 * rounding
    assert error(False)[0] > 2 * with_master


@pytest.mark.parametrize("momentum", [0.0, 0.4])
def test_the_stack_is_a_plain_adapter_on_the_original_base(momentum, tmp_path):
    import peft
    from safetensors.torch import load_file

    model = apply_lora(llama(), 2, 8, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    schedule = MergeSchedule(randomise(model), every=2, momentum=momentum, export="stack")
    optimizer = torch.optim.AdamW(factors(model), lr=0.01)
    for step in range(1, 6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(optimizer)
        rng = torch.get_rng_state()
        schedule.save_stack(tmp_path / str(step))
        assert torch.equal(rng, torch.get_rng_state())
    assert not [name for name, _ in model.named_parameters() if "stack" in name]
    want = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "5")
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(load_adapter(llama(), tmp_path / "5")(IDS).logits, want, rtol=0, atol=1e-5)
    ranks = [
        len(next(t for key, t in load_file(tmp_path / str(n) / "adapter_model.safetensors").items() if "lora_A" in key))
        for n in range(1, 6)
    ]
    assert ranks == ([2, 2, 4, 4, 6] if momentum == 0 else [2, 4, 4, 6, 6]), "a fresh adapter is left out"


def test_the_stack_holds_the_biases_that_train_and_no_start_of_the_weights(tmp_path):
    model = randomise(apply_lora(qwen(), 2, bias="lora_only", target_modules=["q_proj", "up_proj"]))
    schedule = MergeSchedule(model, every=1, export="stack")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.add_(1.0)
    schedule.step(torch.optim.SGD(factors(model), lr=0.0))
    schedule.save_stack(tmp_path)
    torch.testing.assert_close(load_adapter(qwen(), tmp_path)(IDS).logits, model(IDS).logits)
    model = apply_lora(llama(), 2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="export must be 'weights' with init_lora_weights='pissa'.*; got 'stack' and"):
        MergeSchedule(model, every=1, export="stack")
    MergeSchedule(model, every=1)


def scheduled(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = torch.optim.lr_scheduler
    made = {
        "lambda": lambda: rates.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "cosine": lambda: rates.CosineAnnealingLR(optimizer, 7),
        "step": lambda: rates.StepLR(optimizer, 2, 0.5),
        "one cycle": lambda: rates.OneCycleLR(optimizer, 1.0, total_steps=12),
        "sequence": lambda: rates.SequentialLR(
            optimizer, [rates.LinearLR(optimizer, 0.1, total_iters=3), rates.CosineAnnealingLR(optimizer, 6)], [3]
        ),
        "sequence of warm restarts": lambda: rates.SequentialLR(
            optimizer,
            [rates.LinearLR(optimizer, 0.1, total_iters=3), rates.CosineAnnealingWarmRestarts(optimizer, 2, 2)],
            [3],
        ),
        "sequence in a chain": lambda: rates.ChainedScheduler(
            [
                rates.SequentialLR(
                    optimizer, [rates.ConstantLR(optimizer, 0.1, 3), rates.ExponentialLR(optimizer, 0.8)], [3]
                ),
                rates.ExponentialLR(optimizer, 0.9),
            ]
        ),
        "chained": lambda: rates.ChainedScheduler(
            [rates.ConstantLR(optimizer, 0.1, 3), rates.ExponentialLR(optimizer, 0.9)]
        ),
    }
    return optimizer, made[kind]()


SCHEDULERS = ("lambda", "cosine", "step", "one cycle", "sequence", "chained", "sequence of warm restarts")


@pytest.mark.parametrize("kind", (*SCHEDULERS, "sequence in a chain"))
@pytest.mark.parametrize("after", [2, 5])
def test_a_scheduler_starts_again(kind, after):
    def rates(optimizer, scheduler, steps):
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    fresh = rates(*scheduled(kind), 6)
    optimizer, scheduler = scheduled(kind)
    rates(optimizer, scheduler, after)
    model = adapted()
    MergeSchedule(model, every=1, reset_scheduler=True).step(optimizer, scheduler)
    assert scheduler.get_last_lr() == pytest.approx(fresh[:1])
    assert rates(optimizer, scheduler, 6) == pytest.approx(fresh)


def test_a_warm_up_follows_each_merge_and_no_scheduler_sees_it():
    model = adapted()
    optimizer = torch.optim.SGD(factors(model), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    schedule = MergeSchedule.relora(model, every=4, warmup=3)
    taken, seen = [], []
    schedule.attach(optimizer)
    optimizer.register_step_pre_hook(lambda optimizer, *a: taken.append(optimizer.param_groups[0]["lr"]))
    for _ in range(10):
        model(torch.ones(32)).sum().backward()
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step(optimizer, scheduler)
    assert seen == pytest.approx([0.9**step for step in range(1, 11)])
    share = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]
    assert taken == pytest.approx([share[step] * 0.9**step for step in range(10)])


@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_a_step_that_fails_in_a_warm_up_leaves_the_learning_rate(scheduled):
    """Whether a scheduler, which takes the place of `optimizer.step`, is made before the warm-up or after."""
    model = adapted()
    optimizer = torch.optim.SGD(factors(model), lr=1.0)
    schedule, made = MergeSchedule.relora(model, every=1, warmup=4), []

    def scheduler():
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    made += [scheduler()] if scheduled == "before" else []
    schedule.attach(optimizer)
    made += [scheduler()] if scheduled == "after" else []
    taken = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append(optimizer.param_groups[0]["lr"]))

    def fails():
        raise MemoryError

    model(torch.ones(32)).sum().backward()
    optimizer.step()
    schedule.step(optimizer)
    with pytest.raises(MemoryError):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["lr"] == 1.0
    model(torch.ones(32)).sum().backward()
    optimizer.step()
    made[0].step()
    assert taken == [1.0, 0.25, 0.25] and optimizer.param_groups[0]["lr"] == 0.5


def test_the_trainer_merges_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trainer(steps, **more):
        torch.manual_seed(7)
        model = apply_lora(llama(), 2, 4, target_modules=["q_proj", "down_proj"])
        schedule = MergeSchedule.periodic(model, every=2, warmup=2)
        arguments = dict(max_steps=steps, save_steps=3, per_device_train_batch_size=1, report_to=[], use_cpu=True)
        arguments |= dict(disable_tqdm=True, learning_rate=0.01, lr_scheduler_type="linear", warmup_steps=1)
        data = [{"input_ids": IDS[0] + i, "labels": IDS[0] + i} for i in range(8)]
        made = TrainingArguments(str(tmp_path / "run"), **arguments | more)
        return Trainer(model, made, None, data, data, callbacks=[schedule.callback()]), schedule

    whole, schedule = trainer(5)
    whole.train()
    assert (schedule.steps, schedule.merges) == (5, 2)
    resumed, again = trainer(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert (again.steps, again.merges) == (5, 2)
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(got, want), name
    (tmp_path / "run/checkpoint-3/merge_schedule.safetensors").unlink()
    with pytest.raises(ValueError, match="must be at step 3 as Trainer is; got 0"):
        trainer(5)[0].train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    best = dict(load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", eval_steps=3)
    with pytest.raises(ValueError, match="load_best_model_at_end must be False with a merge schedule; got True"):
        trainer(5, **best)[0].train()


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(), "every and knots exclude each other, and one must be given"),
        (dict(every=2, knots=[3]), "every and knots exclude each other"),
        (dict(every=0), "every must be an int >= 1; got 0"),
        (dict(knots=[4, 2]), r"knots must be ints >= 1 that rise; got \[4, 2\]"),
        (dict(knots=[4], ranks=[4]), "ranks must be ints >= 1, one more than knots"),
        (dict(knots=[4], ranks=[8, 4]), r"ranks must begin with the adapter's own rank in every layer, \[4\]"),
        (dict(every=2, momentum=1.0), r"momentum must be a number in \[0, 1\); got 1.0"),
        (dict(every=2, momentum_mode="ema"), "momentum_mode must be one of"),
        (dict(every=2, export="file"), "export must be one of"),
        (dict(every=2, warmup=-1), "warmup must be an int >= 0"),
        (dict(knots=[4], ranks=[4, 2], momentum=0.1), "ranks and momentum exclude each other"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        MergeSchedule(adapted(), **options)


def test_models_whose_weights_must_not_change_are_refused():
    with pytest.raises(ValueError, match="one active adapter of this library; got \\[\\]"):
        MergeSchedule(small(), every=2)
    tied = apply_lora(llama(tie=True), 4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head must be of this layer alone, a merge would change its twin"):
        MergeSchedule(tied, every=2)
    MergeSchedule(apply_lora(llama(tie=True), 4), every=2)
    merged = adapted()
    merged[0].merge()
    with pytest.raises(ValueError, match="0 must be unmerged before a merge schedule begins"):
        MergeSchedule(merged, every=2)


def test_a_quantised_base_is_refused():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    model[0].weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    model = apply_lora(model, 4, target_modules=["0"])
    with pytest.raises(ValueError, match="base weight of 0 must not be quantised"):
        MergeSchedule(model, every=2)


def test_a_merge_that_cannot_be_changes_nothing():
    model = randomise(adapted())
    schedule = MergeSchedule(model, every=1, reset_scheduler=True)
    optimizer = torch.optim.SGD(factors(model), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    before = copy.deepcopy(model.state_dict())
    for given, match in (
        ((), "optimizer must be given with reset_optimizer=True"),
        ((optimizer,), "scheduler must be given with reset_scheduler=True"),
        ((optimizer, plateau), "got ReduceLROnPlateau"),
    ):
        with pytest.raises(ValueError, match=match):
            schedule.merge(*given)
    with torch.no_grad():
        model[2].lora_B["default"][0, 0] = float("inf")
    before["2.lora_B.default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="lora_B of 2 must be finite to be merged"):
        MergeSchedule(model, every=1).merge(optimizer)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def _merged(model):
    context = merged(model)
    context.__enter__()
    return context  # which ends where it is forgotten


def _another(model):
    apply_lora(model, 2, target_modules=["0", "2"], adapter_name="c")


def _again(model):
    delete_adapter(model, "default")
    apply_lora(model, 6, target_modules=["0", "2"])


def _deleted(model):
    _another(model)
    delete_adapter(model, "default")


CHANGES = {
    "merged": (_merged, "must be unmerged before adapter 'default' is folded; got a merged layer"),
    "unloaded": (unload, "must be on the model to be folded into the weight.* taken off"),
    "made again": (_again, "must be on the model to be folded into the weight.* taken off"),
    "deleted beside another": (_deleted, "adapter 'default' of .* must be on the model; got one that was deleted"),
    "another is active": (_another, "must act to be folded into the weight; got adapter 'c' active"),
}


@pytest.mark.parametrize("options", [{}, dict(export="stack"), dict(momentum=0.5), dict(warmup=1)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_another_by_now_is_not_merged(change, options):
    """What changed after the schedule was made is seen before the first weight changes, and the step does not count."""
    act, match = CHANGES[change]
    model = adapted()
    schedule = MergeSchedule(model, every=2, **options)
    optimizer = train(model, 1, schedule)
    held = act(model)  # noqa: F841
    before = {key: t.clone() for key, t in model.state_dict().items()}
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            schedule.step(optimizer)
    assert (schedule.steps, schedule.merges) == (1, 0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items())
    assert all(torch.equal(v, optimizer.state[p][k]) for p, state in states.items() for k, v in state.items())
    assert all(not links for links in schedule._links.values())


def test_what_is_no_optimizer_is_refused_first():
    model = randomise(adapted())
    schedule, before = MergeSchedule(model, every=1), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="optimizer must be one of torch.optim's kind; got a str"):
        schedule.step("sgd")
    assert schedule.steps == 0 and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_state_of_another_schedule_is_refused():
    model = randomise(adapted())
    schedule = MergeSchedule(model, every=1, export="stack")
    schedule.step(torch.optim.SGD(factors(model), lr=0.1))
    other = adapted()
    for state in (schedule.state_dict(), {}, {"steps": torch.tensor(1)}):
        with pytest.raises(ValueError, match="state must be of a schedule with export='weights'"):
            MergeSchedule(other, every=1).load_state_dict(state)
    with pytest.raises(ValueError, match="save_stack needs export='stack'"):
        MergeSchedule(other, every=1).save_stack("nowhere")
    embedded = apply_lora(nn.Sequential(nn.Embedding(9, 4)), config=LoraConfig(r=2, target_modules=["0"]))
    randomise(embedded)
    tokens = torch.arange(9)
    before = embedded(tokens)
    MergeSchedule(embedded, every=1).step(torch.optim.SGD(factors(embedded), lr=0.1))
    torch.testing.assert_close(embedded(tokens), before)
    assert not embedded[0].lora_A["default"].any() and embedded[0].lora_B["default"].any()


OPTIMIZERS = {
    "loraplus": lambda model: optim.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01),
    "rite": lambda model: optim.LoRARite(model, lr=0.01),
    "pro": lambda model: optim.LoRAProAdamW(model, lr=0.01),
    "pro full": lambda model: optim.LoRAProAdamW(model, lr=0.01, mode="full"),
    "riemannian": lambda model: optim.create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01),
    "lora-fa": lambda model: optim.create_lorafa_optimizer(model, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_after_a_merge(kind):
    model = adapted()
    optimizer = OPTIMIZERS[kind](model)
    schedule = MergeSchedule(model, every=3)
    train(model, 3, schedule, optimizer)
    assert schedule.merges == 1 and not optimizer.state
    fresh, state = adapted(), model.state_dict()
    fresh.load_state_dict(state)
    train(model, 2, schedule, optimizer, first=3)
    train(fresh, 2, optimizer=OPTIMIZERS[kind](fresh), first=3)
    for want, got in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(want, got), "as a run that begins with the merged weights"
    assert model[0].lora_B["default"].any()
    if kind != "loraplus":
        with pytest.raises(ValueError, match="ranks need a rebuild_optimizer with"):
            MergeSchedule(model, knots=[1], ranks=[4, 2]).step(optimizer)


def test_allora_is_merged_and_dora_refused():
    model = randomise(apply_lora(small(), config=LoraConfig(r=4, target_modules=["0", "2"], allora_eta=0.7)))
    x = torch.randn(5, 32)
    before = model(x)
    schedule = MergeSchedule(model, knots=[1], ranks=[4, 2])
    optimizer = torch.optim.SGD(factors(model), lr=0.1)
    schedule.step(optimizer)
    torch.testing.assert_close(model(x), before)
    assert model[0].variants["default"].eta == 0.7 and model[0].r["default"] == 2
    train(model, 2, schedule, optimizer)
    dora = apply_lora(small(), config=LoraConfig(r=4, target_modules=["0", "2"], use_dora=True))
    with pytest.raises(ValueError, match="the adapter of 0 must be plain LoRA to be folded into the weight; got DoRA"):
        MergeSchedule(dora, every=2)


def test_what_a_merge_will_need_is_missed_at_the_first_step():
    model = adapted()
    schedule = MergeSchedule(model, every=100, reset_scheduler=True)
    with pytest.raises(ValueError, match="optimizer must be given with reset_optimizer=True"):
        schedule.step()
    with pytest.raises(ValueError, match="scheduler must be given with reset_scheduler=True"):
        schedule.step(torch.optim.SGD(factors(model), lr=0.1))
    assert schedule.steps == 0


def test_a_learning_rate_that_is_a_tensor_restarts_every_time():
    model, seen = adapted(), []
    optimizer = torch.optim.Adam(factors(model), lr=torch.tensor(0.01), capturable=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    schedule = MergeSchedule(model, every=2, reset_scheduler=True)
    for step in range(6):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        train(model, 1, schedule, optimizer, scheduler, first=step)
    assert seen == pytest.approx([0.01, 0.005] * 3)
