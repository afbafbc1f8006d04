"""What is measured of a model: losses, samples, and what became of a few of its weights."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.analysis import intruder_dimensions, left_vectors, perturbation_rank
from fused_lora.nn import LoRALayer
from fused_lora.nn.merged_weight import folded

SAMPLES, NEW_TOKENS, PROMPT_TOKENS = 6, 12, 6
PROMPTS = ("def read_lines(path, encoding):\n", "The history of the town begins with")
KINDS = ("self_attn.q_proj", "mlp.down_proj")  # looked at in the layers at a quarter and three quarters of the depth


def loss_of(model: nn.Module, blocks: Tensor) -> Tensor:
    """Mean -log p, nats, of all but the first token of the blocks [n, L]."""
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def measured_loss(model: nn.Module, blocks: Tensor) -> float:
    """`loss_of` many blocks, a few at a time."""
    parts = blocks.split(4)
    return sum(len(part) * loss_of(model, part).item() for part in parts) / len(blocks)


@torch.no_grad()
def diversity(model, tokenizer) -> float:
    """The share of distinct pairs of neighbouring tokens among all pairs in samples of a prompt at temperature 1, mean
    over the prompts: 1 if no pair comes twice."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS] for text in PROMPTS]
        inputs = torch.tensor(prompts).repeat_interleave(SAMPLES, 0)
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )[:, inputs.shape[1] :]
    shares = []
    for samples in out.split(SAMPLES):
        pairs = [pair for row in samples.tolist() for pair in pairwise(row)]
        shares.append(len(set(pairs)) / len(pairs))
    return sum(shares) / len(shares)


def watched(model) -> list[str]:
    """The names of the weights that are looked at."""
    depth = model.config.num_hidden_layers
    return [f"model.layers.{layer}.{kind}" for layer in (depth // 4, 3 * depth // 4) for kind in KINDS]


def tuned_weights(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The watched weights in fp32 with everything that was learnt, without those that were left out of training.

    Args: kept: fp32 values of base weights by layer name, where training keeps such.
    """
    found = {}
    for name in watched(model):
        layer = model.get_submodule(name)
        if isinstance(layer, LoRALayer):
            weight = kept.get(name, layer.weight).detach().to(torch.float32, copy=True)
            found[name] = folded(weight, layer._updates(layer.active_adapters))
        elif name in kept:
            found[name] = kept[name].detach()
    return found


def weight_figures(before: Mapping[str, Tensor], after: Mapping[str, Tensor], bases: dict[str, Tensor]) -> dict:
    """(perturbation rank as a mean share of min(N, K), number of intruders) of tuned weights in fp32.

    Args: bases: left vectors of the weights before, which are computed where they are missing.
    """
    shares, intruders = [], 0
    for name, tuned in after.items():
        W0 = before[name]
        if name not in bases:
            bases[name] = left_vectors(W0)
        shares.append(perturbation_rank(tuned - W0) / min(W0.shape))
        intruders += len(intruder_dimensions(W0, tuned, U0=bases[name]))
    return {"perturbation_rank": sum(shares) / len(shares), "intruders": intruders / len(shares)}
