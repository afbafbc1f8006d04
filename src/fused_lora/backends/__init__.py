"""Which back end serves a request: every one says itself what it refuses, and the first willing one of a line is taken.

A back end is a module with
    forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan) -> (y, h)
    backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan) -> Gradients
    refusal(request) -> why it cannot serve the request, to be read after "backend 'name' supports", or None
    plans(request) -> the names of the ways in which it can compute the request, the safe one first; ("",) for one way
    summary(request, plan) -> what it runs, in a phrase
for x as [M, K] and the optional tensors 2-D, as `ops.reference` defines them. A call's forward and backward run with
one plan. One that serves requests whose `optional` is UPDATE, the low-rank half over somebody else's y, also has
    update(y, x, lora_A, lora_B, scaling, dropout_p, seed) -> (y, h)
    update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs) -> Gradients
and one that serves those whose `optional` is GROUPED, the same with factors of its own for each segment of the rows,
    grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed) -> (y, h)
    grouped_update_backward(dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs) -> gradients
as `ops.grouped_reference` defines them. One whose plans are words with plus signs between, of which `plans` has the
combinations that are worth a measurement, also has
    check_plan(request, plan) -> ValueError if that is none for the request, saying which words exclude each other
"""

import functools
import importlib
import itertools
from types import ModuleType
from typing import Any, NamedTuple

import torch

NAMES = ("auto", "cuda", "triton", "cpu", "reference")
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UPDATE = ("y",)  # Request.optional of `lora_update`
GROUPED = ("offsets",)  # Request.optional of `grouped_lora_update`

# Who stands in line for a device type under backend="auto".
_LINES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference"), "xpu": ("triton", "reference")}


class Request(NamedTuple):
    """What decides who can serve a call: the same for its forward and its backward."""

    device: torch.device
    dtype: torch.dtype  # of x, weight, bias
    adapter_dtype: torch.dtype  # of lora_A, lora_B
    M: int  # the bucket of x's rows
    N: int
    K: int
    R: int
    aligned: bool  # the weight's rows lie in one piece each, on a GPU from addresses that are multiples of 16 bytes
    optional: tuple[str, ...]  # names of the optional tensors that are given; or UPDATE, or GROUPED


class Serving(NamedTuple):
    """Who serves a call, and in which of its ways: forward and backward alike."""

    backend: ModuleType
    plan: str


def bucket(rows: int) -> int:
    """The number of rows rounded up to a power of two, so that few requests stand for every number; 0 stays 0."""
    return 1 << (rows - 1).bit_length() if rows else 0


def only_plain(request: Request) -> str | None:
    """The refusal of a back end that computes plain LoRA only."""
    if request.optional in (UPDATE, GROUPED):
        op = "lora_update" if request.optional == UPDATE else "grouped_lora_update"
        return f"the update together with its base product only; got {op}"
    return f"plain LoRA only; got {', '.join(request.optional)}" if request.optional else None


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fused_lora.backends.{name}" if name != "reference" else "fused_lora.ops.reference")


def refusal(name: str, request: Request) -> str | None:
    """Why the back end of this name cannot serve the request, to be read after "backend 'name' supports", or None."""
    try:
        return _module(name).refusal(request)
    except ModuleNotFoundError as error:
        return f"an installed {error.name}; there is none"


@functools.lru_cache(4096)
def pick(backend: str, request: Request) -> Serving:
    """Who serves a request: under "auto" what `fused-lora tune` has found out here (`tuned.choose`), without that the
    first willing one of the device's line, else the named one; with its safe plan, unless another is named.

    Args:
        backend: one of NAMES; or a back end and its plan, such as "cpu:inside" or "cuda:h_shrink+wgrad_apart".
        request: what decides.
    Raises: ValueError if a named back end does not support the request or has no such plan for it, saying what it
        supports.
    """
    if backend == "auto":
        backend = _automatic(request)
    name, _, plan = backend.partition(":")
    refused = refusal(name, request)
    if refused is not None:
        raise ValueError(f"backend {name!r} supports {refused}")
    module = _module(name)
    plans = module.plans(request)
    if plan and plan not in plans:
        if not hasattr(module, "check_plan"):
            raise ValueError(f"backend {name!r} supports {_named(plans)} for this call; got {plan!r}")
        module.check_plan(request, plan)
    return Serving(module, plan or plans[0])


@functools.cache
def read_plan(plan: str, words: tuple[tuple[str, Any, Any], ...]) -> dict[Any, Any]:
    """What a plan of words with plus signs between says: {field: value}.

    Args:
        words: (word, its field, the value that it says) of every word.
    Raises: ValueError for what is no word, and for two of one field.
    """
    meanings = {word: (field, value) for word, field, value in words}
    said: dict[Any, str] = {}
    for word in plan.split("+") if plan else ():
        if word not in meanings:
            raise ValueError(f"plan must be of the words {', '.join(meanings)}, with + between; got {word!r}")
        field = meanings[word][0]
        if field in said:
            raise ValueError(f"plan must not say both {said[field]} and {word}; got {plan!r}")
        said[field] = word
    return {field: meanings[word][1] for field, word in said.items()}


def candidates(names: tuple[str, ...], request: Request) -> tuple[str, ...]:
    """The back ends of `names` that serve the request, one entry for each of their plans: "cpu:inside", "triton"."""
    willing = [name for name in names if refusal(name, request) is None]
    return tuple(f"{name}:{plan}" if plan else name for name in willing for plan in _module(name).plans(request))


def _automatic(request: Request) -> str:
    willing = candidates(line(request.device), request)
    return willing[0] if len(willing) == 1 else _module("tuned").choose(request, willing)


def forget() -> None:
    """Ask anew who serves each request: what `fused-lora tune` has written since the last answer counts from now on."""
    pick.cache_clear()
    _module("tuned").forget()


def _named(plans: tuple[str, ...]) -> str:
    return f"the plans {', '.join(plans)}" if plans != ("",) else "no plan by name"


def line(device: torch.device) -> tuple[str, ...]:
    """The back ends that backend="auto" asks on a device, in order; the last one never refuses. `fused-lora tune`
    measures them all."""
    return _LINES.get(device.type, ("reference",))


def explain(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The back end that plain LoRA on this device and dtype gets from backend="auto", and the reason in a sentence.

    Args:
        device: where x lies.
        dtype: x's dtype.
    Returns: (name, reason).
    """
    request = Request(torch.device(device), dtype, dtype, 512, 4096, 4096, 16, True, ())
    back_end, plan = pick("auto", request)
    chosen = back_end.__name__.rpartition(".")[2]
    before = itertools.takewhile(lambda name: name != chosen, line(request.device))
    refusals = [(name, refusal(name, request)) for name in before]
    reasons = [f"{name} supports {refused}" for name, refused in refusals if refused is not None]
    return chosen, "; ".join([*reasons, back_end.summary(request, plan)])
