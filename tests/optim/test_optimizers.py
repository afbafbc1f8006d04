"""What every optimizer here must do as a torch optimizer: resume bit for bit, schedules, groups, closures, dtypes."""

import copy

import pytest
import torch
from pair_problems import Net, descend, farthest, make_pairs, train
from torch import nn

from fused_lora import LoRALinear, apply_lora
from fused_lora.optim import (
    Lion,
    LoRAProAdamW,
    LoRARite,
    Pair,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    lora_pairs,
)

MAKERS = {
    "rite": lambda model: LoRARite(model, lr=0.02, weight_decay=0.01, escape=True),
    "pro": lambda model: LoRAProAdamW(model, lr=0.01, weight_decay=0.01),
    "pro full": lambda model: LoRAProAdamW(model, lr=0.01, mode="full", x_mode="symmetric"),
    "loraplus": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.002, weight_decay=0.01),
    "riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01),
    "lora_fa": lambda model: create_lorafa_optimizer(model, lr=0.01),
    "lion": lambda model: Lion([p for p in model.parameters() if p.requires_grad], lr=0.002, weight_decay=0.01),
}
OWN = ("rite", "pro", "pro full")


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture(params=OWN)
def make_own(request):
    return MAKERS[request.param]


def trained(model: nn.Module):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_stops_and_resumes_is_the_same_bit_for_bit(make, dtype, tmp_path):
    """Model, optimizer and schedule through a file into fresh objects, at a step in the middle, bf16 factors too."""
    model = Net(dtype, dtype)
    optimizer = make(model)
    schedule = cosine(optimizer)
    train(model, optimizer, 5, scheduler=schedule)
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], tmp_path / "half.pt")
    halfway = trained(model)
    train(model, optimizer, 5, 5, schedule)
    again = Net(dtype, dtype)
    resumed = make(again)
    follows = cosine(resumed)
    for part, state in zip((again, resumed, follows), torch.load(tmp_path / "half.pt", weights_only=True)):
        part.load_state_dict(state)
    assert equal(trained(again), halfway)
    train(again, resumed, 5, 5, follows)
    assert equal(trained(again), trained(model)) and not equal(trained(again), halfway)
    states = [optimizer.state[p] for p in optimizer.state], [resumed.state[p] for p in resumed.state]
    for one, other in zip(*states):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_everything_that_trains_moves_and_nothing_else(make):
    model = Net()
    optimizer = make(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert p.isfinite().all()


def test_the_loss_falls(make):
    model = Net()
    optimizer = make(model)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(5))
    loss = lambda: (model(x) - x[:, :4].sin()).square().mean().item()
    before = loss()
    train(model, optimizer, 60)
    assert loss() < 0.7 * before


@pytest.mark.parametrize("name", OWN)
def test_a_copied_optimizer_goes_on_alike(name):
    model = Net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, 3)
    again, resumed = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, 3)
    train(again, resumed, 3, 3)
    assert equal(trained(model), trained(again))


def test_others_are_adamws(make_own):
    """Norm and head, bit for bit, once their gradients are given."""
    model, twin = Net(), Net()
    optimizer = make_own(model)
    names = [n for n, _ in twin.named_parameters() if n.startswith(("norm", "head"))]
    decays = {n: 0.0 if twin.get_parameter(n).dim() < 2 else optimizer.defaults["weight_decay"] for n in names}
    group = optimizer.param_groups[0]
    adamw = torch.optim.AdamW(
        [{"params": [twin.get_parameter(n)], "weight_decay": decays[n]} for n in names],
        lr=group["lr"],
        eps=group["eps"],
        fused=True,
    )
    for _ in range(4):
        train(model, optimizer, 1)
        for n in names:
            twin.get_parameter(n).grad = model.get_parameter(n).grad.clone()
        adamw.step()
    assert all(torch.equal(model.get_parameter(n), twin.get_parameter(n)) for n in names)


def test_bf16_factors_get_steps_computed_in_fp32(make_own):
    """One step from the same bf16 values and gradients is the fp32 step, rounded once."""
    low, high = make_pairs(torch.bfloat16), make_pairs(torch.bfloat16)
    high = [Pair(*(nn.Parameter(t.detach().float()) for t in (p.A, p.B)), p.scaling, p.name) for p in high]
    g = torch.Generator().manual_seed(0)
    for p, q in zip(low, high):
        for t, u in ((p.A, q.A), (p.B, q.B)):
            t.grad = torch.randn(t.shape, generator=g).bfloat16()
            u.grad = t.grad.float()
    make_own(low).step()
    make_own(high).step()
    for p, q in zip(low, high):
        assert torch.equal(p.A, q.A.bfloat16()) and torch.equal(p.B, q.B.bfloat16())


def test_pairs_without_gradients_rest_and_count_their_own_steps(make_own):
    """An expert that nothing calls in a step; its first step is then like any first step."""
    late, fresh = make_pairs(), make_pairs()
    optimizer, first = make_own(late), make_own(fresh)
    start = late[0].A.detach().clone()
    g = torch.Generator().manual_seed(0)
    grads = [[torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (p.A, p.B)] for p in late]
    late[1].A.grad, late[1].B.grad = (t.clone() for t in grads[1])
    optimizer.step()
    assert torch.equal(late[0].A, start) and not optimizer.state[late[0].A]
    late[1].A.grad = late[1].B.grad = None
    for p in (late[0], fresh[0]):
        p.A.grad, p.B.grad = (t.clone() for t in grads[0])
    optimizer.step()
    first.step()
    assert torch.equal(late[0].A, fresh[0].A) and torch.equal(late[0].B, fresh[0].B)


def test_a_missing_gradient_of_one_factor_is_zero(make_own):
    some, others = make_pairs(), make_pairs()
    for pairs in (some, others):
        for p in pairs:
            p.B.grad = torch.ones_like(p.B)
    for p in others:
        p.A.grad = torch.zeros_like(p.A)
    make_own(some).step()
    make_own(others).step()
    assert all(torch.equal(p.A, q.A) and torch.equal(p.B, q.B) for p, q in zip(some, others))


def test_one_frozen_factor_is_refused(make_own):
    """Both are needed for a step, which moves both."""
    pairs = make_pairs()
    optimizer = make_own(pairs)
    pairs[1].A.requires_grad_(False)
    before = [t.detach().clone() for p in pairs for t in (p.A, p.B)]
    for p in pairs:
        p.B.grad = torch.ones_like(p.B)
    with pytest.raises(ValueError, match=r"lora_B must both train, as when the LoRA\w+ was made; got lora_A"):
        optimizer.step()
    assert equal(before, [t for p in pairs for t in (p.A, p.B)])


def test_factors_in_channels_last_get_the_same_steps(make_own):
    models = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = apply_lora(nn.Sequential(nn.Conv2d(8, 8, 3)), 2, target_modules=["0"]).to(memory_format=layout)
        optimizer = make_own(model)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        models.append(model)
    assert models[1][0].lora_A["default"].stride() != models[0][0].lora_A["default"].stride()
    for one, other in zip(*(trained(model) for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_closure_is_called_with_gradients_on(make_own):
    model, twin = Net(), Net()
    optimizer, other = make_own(model), make_own(twin)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4].sin()).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    train(twin, other, 1)
    assert equal(trained(model), trained(twin))


def test_batches_do_not_change_the_steps(make_own):
    """Pairs in one group, and each in a group of its own, which no stack then joins."""
    together, apart = make_pairs(), make_pairs()
    one = make_own(together)
    other = make_own([{"params": [pair]} for pair in apart])
    assert farthest(descend(one, together, 5), descend(other, apart, 5)) < 1e-12


def test_a_warmup_schedule_reaches_every_group(make):
    model = Net()
    optimizer = make(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    before = trained(model)
    train(model, optimizer, 1, scheduler=schedule)
    assert equal(trained(model), before)  # lr 0
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak / 4 for peak in peaks])


def test_a_new_group_joins_later(make_own):
    pairs, late = make_pairs(), LoRALinear(6, 5, r=2, lora_alpha=4)
    optimizer = make_own(pairs)
    descend(optimizer, pairs, 2)
    optimizer.add_param_group({"params": lora_pairs(late), "lr": 0.5})
    assert optimizer.param_groups[-1]["lr"] == 0.5
    before = late.lora_B["default"].detach().clone()
    late(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(late.lora_B["default"], before)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": -1.0}, "lr must be >= 0; got -1.0"),
        ({"lr": float("nan")}, "lr must be >= 0; got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"betas": (0.9,)}, "betas must be two numbers in"),
        ({"eps": -1e-8}, "eps must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
    ],
)
@pytest.mark.parametrize("cls", [LoRARite, LoRAProAdamW])
def test_bad_hyperparameters(cls, change, says):
    with pytest.raises(ValueError, match=says):
        cls(make_pairs(), **{"lr": 0.1, **change})
    with pytest.raises(ValueError, match=says):
        cls([{"params": make_pairs(), **change}], lr=0.1)


@pytest.mark.parametrize("cls", [LoRARite, LoRAProAdamW])
def test_params_without_pairs_and_mixed_groups_are_refused(cls):
    head = nn.Linear(3, 2)
    for nothing in (head, list(head.parameters())):
        with pytest.raises(ValueError, match="must hold LoRA pairs that train"):
            cls(nothing, lr=0.1)
    with pytest.raises(ValueError, match="got both"):
        cls([*make_pairs(), head.weight], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        pairs = make_pairs()
        cls([{"params": pairs}, {"params": pairs[:1]}], lr=0.1)


@pytest.mark.parametrize("name", ["clip_norm", "skip_rms"])
def test_bad_limits_of_rite(name):
    with pytest.raises(ValueError, match=f"{name} must be > 0 or None; got 0"):
        LoRARite(make_pairs(), lr=0.1, **{name: 0})


def test_the_clip_of_rite_is_one_for_all_groups():
    with pytest.raises(ValueError, match="clip_norm must be one for all groups; got 2.0 in a group"):
        LoRARite([{"params": make_pairs(), "clip_norm": 2.0}], lr=0.1)


def test_the_clip_of_rite_is_the_loaded_one():
    def stepped(clip_norm, loaded=None):
        pairs = make_pairs()
        optimizer = LoRARite(pairs, lr=0.1, clip_norm=clip_norm)
        if loaded is not None:
            optimizer.load_state_dict(LoRARite(make_pairs(), lr=0.1, clip_norm=loaded).state_dict())
        return descend(optimizer, pairs, 3)

    assert farthest(stepped(None, 0.01), stepped(0.01)) == 0 < farthest(stepped(None), stepped(0.01))


def test_a_learning_rate_may_be_a_tensor(make_own):
    pairs, others = make_pairs(), make_pairs()
    one, other = make_own(pairs), make_own(others)
    one.param_groups[0]["lr"] = torch.tensor(one.param_groups[0]["lr"], dtype=torch.float64)
    assert farthest(descend(one, pairs, 3), descend(other, others, 3)) == 0


def test_gradients_that_are_not_finite_are_named(make_own):
    pairs = make_pairs()
    optimizer = make_own(pairs)
    descend(optimizer, pairs, 1)
    with torch.no_grad():
        pairs[0].B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        descend(optimizer, pairs, 1)


def test_a_sparse_gradient_is_refused(make_own):
    pairs = make_pairs()
    for pair in pairs:
        pair.B.grad = torch.ones_like(pair.B)
    pairs[0].A.grad = torch.ones_like(pairs[0].A).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense; got a sparse one"):
        make_own(pairs).step()


def test_steps_are_counted_beyond_256_whatever_the_defaults(make_own):
    """bf16 has no 257; torch's optimizers count in fp32, too. A count saved in bf16 goes on."""
    pairs = make_pairs(torch.float32)
    optimizer = make_own(pairs)

    def step():
        for pair in pairs:
            pair.A.grad, pair.B.grad = pair.A.detach().clone(), pair.B.detach().clone()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        try:
            optimizer.step()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

    def counts():
        return [float(state["step"]) for state in optimizer.state.values()]

    step()
    for state in optimizer.state.values():
        state["step"] = state["step"].clone().fill_(256.0)
    step()
    assert counts() == [257.0] * 6
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(256.0, dtype=torch.bfloat16)
    optimizer.load_state_dict(saved)
    step()
    assert counts() == [257.0] * 6


@pytest.mark.parametrize("cls", [LoRARite, LoRAProAdamW])
def test_a_compiled_step_is_the_step(cls):
    """Compiled in pieces LoRA-RITE's left counts and moments of some factors behind from the third step on."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = apply_lora(nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5)), r=2, target_modules=["0", "1"])
        for layer in model:
            nn.init.normal_(layer.lora_B["default"])
        optimizer, x = cls(model, lr=0.01), torch.randn(6, 7)
        torch.compiler.reset()
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()
        runs.append(([float(state["step"]) for state in optimizer.state.values()], trained(model)))
    torch.compiler.reset()
    (counts, values), (counts_compiled, values_compiled) = runs
    assert counts == counts_compiled == [4.0] * 4
    assert equal(values, values_compiled)


def test_lion_is_its_formula():
    """Two groups, one without weight decay, over steps in which the sign of gradient and average differ."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=g)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 0.01}]
    optimizer = Lion(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    wanted = [(p.detach().clone(), torch.zeros_like(p), *rates) for p, rates in zip(params, [(0.1, 0.2), (0.01, 0.0)])]
    for _ in range(6):
        for p, (value, average, lr, decay) in zip(params, wanted):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=g)
            value.sub_(lr * (torch.sign(0.9 * average + 0.1 * p.grad) + decay * value))
            average.copy_(0.95 * average + 0.05 * p.grad)
        optimizer.step()
        assert all(torch.allclose(p, value, rtol=1e-12, atol=0) for p, (value, *_) in zip(params, wanted))
    for change, says in ((dict(lr=-1.0), "lr must be >= 0; got -1"), (dict(betas=(0.9, 1.0)), "betas must be two")):
        with pytest.raises(ValueError, match=says):
            Lion(params, **change)
