"""Quantised linear layers of every kind that has a base, made from one dense layer."""

import warnings

import torch
from torch import nn

N, K = 96, 64
KINDS = ("nf4", "nf4 flat", "fp4", "bnb int8", "int8", "int8 one scale", "float8", "int4")


def dense_layer(dtype=torch.bfloat16, bias=True, K=K) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).to(dtype)


def quantised(kind: str, dtype=torch.bfloat16, bias=True, K=K) -> nn.Module:
    """`dense_layer` in one of KINDS, frozen."""
    linear = dense_layer(dtype, bias, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = _bitsandbytes(kind, linear) if kind in KINDS[:4] else _torchao(kind, linear)
    return layer.requires_grad_(False)


def _bitsandbytes(kind: str, linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    N, K = linear.weight.shape
    if kind == "bnb int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    else:
        how = dict(quant_type=kind[:3], compress_statistics=kind != "nf4 flat")
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=linear.weight.dtype, **how)
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **how)
    layer.bias = linear.bias
    return layer.to("cpu")


def _torchao(kind: str, linear: nn.Linear) -> nn.Module:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        PerTensor,
        quantize_,
    )

    config = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int8 one scale": lambda: Int8WeightOnlyConfig(granularity=PerTensor()),
        "float8": lambda: Float8WeightOnlyConfig(),
        "int4": lambda: IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)),
    }[kind]()
    quantize_(linear, config)
    return linear
