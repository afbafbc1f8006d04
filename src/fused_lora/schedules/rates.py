"""The learning rate around a merge: a scheduler that starts again, and a re-warm-up that no scheduler sees."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

_ATTRIBUTE = "_fused_lora_warm_up"  # on an optimizer: whose merges its hooks follow


def unwrapped(wrapper: Any, attribute: str) -> Any:
    """What accelerate's AcceleratedOptimizer or AcceleratedScheduler stands for; anything else as it is."""
    inside_accelerate = type(wrapper).__module__.partition(".")[0] == "accelerate"
    return getattr(wrapper, attribute) if inside_accelerate else wrapper


def check_restartable(scheduler: Any) -> None:
    """Raises ValueError unless `restart` can start the scheduler again."""
    if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
        for inner in getattr(scheduler, "_schedulers", ()):
            check_restartable(inner)
        return
    raise ValueError(
        "reset_scheduler must be False, or the scheduler one of torch.optim.lr_scheduler's that count steps; got "
        f"{type(scheduler).__name__}"
    )


def restart(scheduler: Any) -> None:
    """Put a scheduler where its constructor left it: the next step's learning rate is the first of its schedule."""
    _reset_rates(scheduler)
    _begin(scheduler)


def _reset_rates(scheduler: Any) -> None:
    for group in scheduler.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # which schedulers fill, and initial_lr must not be filled with it
            group["lr"].fill_(group["initial_lr"])
        else:
            group["lr"] = group["initial_lr"]


def _begin(scheduler: Any) -> None:
    """What a scheduler's constructor does, with what it finds as the learning rates."""
    if isinstance(scheduler, SequentialLR):
        for inner in reversed(scheduler._schedulers):  # the first one last, whose rates are the next step's
            _reset_rates(inner)
            _begin(inner)
        scheduler.last_epoch = 0
        scheduler._last_lr = scheduler._schedulers[0].get_last_lr()
    elif isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            _begin(inner)
        scheduler._last_lr = scheduler._schedulers[-1].get_last_lr()
    else:
        scheduler.last_epoch = -1
        scheduler._initial_step()


def warm_up(optimizer: Optimizer, factor: Callable[[], float]) -> None:
    """Have every step of the optimizer taken at `factor()` times its groups' learning rates, which schedulers and
    state dicts see unscaled, also after a step that has failed."""
    if getattr(optimizer, _ATTRIBUTE, None) is not None:
        setattr(optimizer, _ATTRIBUTE, factor)
        return
    setattr(optimizer, _ATTRIBUTE, factor)
    scheduled: list[Any] = []

    def before(optimizer: Optimizer, args, kwargs) -> None:
        scheduled[:] = [group["lr"] for group in optimizer.param_groups]
        share = getattr(optimizer, _ATTRIBUTE)()
        for group in optimizer.param_groups if share != 1.0 else []:
            group["lr"] = group["lr"] * share

    def after(optimizer: Optimizer, args, kwargs) -> None:
        for group, rate in zip(optimizer.param_groups, scheduled):
            group["lr"] = rate
        scheduled.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    step = optimizer.step

    @wraps(getattr(step, "__func__", step))
    def unscaling(optimizer: Optimizer, *args, **kwargs) -> Any:
        try:
            return step(*args, **kwargs)
        finally:  # PyTorch calls no hook behind a step that fails
            after(optimizer, args, kwargs)

    optimizer.step = MethodType(unscaling, optimizer)  # type: ignore[method-assign]
