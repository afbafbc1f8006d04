"""Which layer calls are tuned: every shape of a model, or the benchmark's, with dtypes, numbers of rows and dropout."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fused_lora.adapters.plan import make_plan
from fused_lora.bench.cases import Case, preset
from fused_lora.config import LoraConfig
from fused_lora.models import base_model, load_config
from fused_lora.nn import LoRALinear
from fused_lora.nn.base_linear import linear_sizes

# A verdict holds within a factor of 2 (backends.tuned): these leave no gap.
ROWS = {"cpu": (64, 256, 1024), "cuda": (512, 2048, 8192)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
DROPOUTS = (0.0, 0.1)
RANK = 16


def shapes_of(model: nn.Module, ranks: Iterable[int] = ()) -> list[tuple[int, int, int]]:
    """(K, N, R) of every linear layer but the head, each once, in the model's order.

    Args:
        model: with adapters, whose ranks count, or without; its weights are not read and may be on the meta device.
        ranks: R instead, for every layer; RANK where a layer has no adapter and none are given.
    Raises: ValueError if the model has no linear layer that can hold an adapter.
    """
    layers = make_plan(model, LoraConfig(target_modules="all-linear"), strict=False).linears.values()
    found: dict[tuple[int, int, int], None] = {}
    for layer in layers:
        K, N = linear_sizes(layer)
        own = {A.shape[0] for A in layer.lora_A.values()} if isinstance(layer, LoRALinear) else ()
        for R in tuple(ranks) or sorted(own) or (RANK,):
            found[K, N, R] = None
    return list(found)


def skeleton(path: str | Path) -> nn.Module:
    """A causal language model without its weights, on the meta device, as its configuration describes it.

    Raises: as `models.load_model`.
    """
    config = load_config(base_model(path))
    import transformers

    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a causal language model that transformers knows; got {type(error).__name__}: {error}"
        ) from None


def cases_for(
    model: nn.Module | str | Path | None,
    kind: str,
    dtypes: Iterable[torch.dtype] = (),
    rows: Iterable[int] = (),
    ranks: Iterable[int] = (),
    dropouts: Iterable[float] = DROPOUTS,
) -> list[Case]:
    """What is to be tuned, small cases first, so that a stop keeps the most of them.

    Args:
        model: a model, the path or id of one, or None for the shapes and rows of the benchmark's published table.
        kind: cpu or cuda.
        dtypes, rows, ranks, dropouts: the device's usual ones where empty.
    """
    published = preset("readme", kind)
    if model is None:
        pairs = dict.fromkeys((case.K, case.N) for case in published)
        shapes = [(K, N, R) for (K, N), R in itertools.product(pairs, tuple(ranks) or (RANK,))]
        rows = tuple(rows) or sorted({case.M for case in published})
    else:
        shapes = shapes_of(model if isinstance(model, nn.Module) else skeleton(model), ranks)
        rows = tuple(rows) or ROWS[kind]
    grid = itertools.product(tuple(dtypes) or DTYPES[kind], rows, shapes, dropouts)
    cases = [Case(M, K, N, R, dropout, dtype) for dtype, M, (K, N, R), dropout in grid]
    return sorted(cases, key=lambda case: case.M * case.K * case.N)
