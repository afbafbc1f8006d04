"""The latency table: merged, unmerged, bottleneck adapters and a prefix over one model's weights."""

import functools
import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import bench
from fused_lora.bench import latency, results, suite
from fused_lora.bench.latency import Prompts

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
BASE = functools.partial(LlamaForCausalLM, LlamaConfig(vocab_size=64, use_cache=False, **SHAPE))


def small(device, budget_s, least=2):
    return latency.run_latency(device, 0.0, least, BASE, (Prompts(1, 8), Prompts(2, 16, 3)))


def test_the_preset_is_a_table_of_every_candidate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "run_latency", small)
    monkeypatch.setattr(suite, "_check_steps", lambda: None)
    document = bench.run(preset="latency", output=tmp_path / "l.json", budget_s=0.0)
    rows = document["latency"]
    assert [r["candidate"] for r in rows] == 2 * list(latency.CANDIDATES) and results.faults(document) == []
    assert document["rows"] == document["host"] == document["train_step"] == []
    for r in rows:
        assert r["rounds"] == 2 and 0 < r["forward_p20_ms"] <= r["forward_ms"]
        assert r["ratio"] == 1.0 or r["candidate"] != "frozen"
    assert [rows[0][key] for key in ("sequences", "tokens", "generated")] == [1, 8, 0]
    assert [rows[-1][key] for key in ("sequences", "tokens", "generated")] == [2, 16, 3]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("2 x 16", "houlsby", "x frozen", "one forward", "a generated token"))
    with pytest.raises(ValueError, match="candidates must be left out with preset 'latency'"):
        bench.run(preset="latency", candidates=["fused"])


def test_adapters_of_every_kind_share_the_weights_and_act():
    base, ids = BASE().eval(), torch.arange(8)[None]
    kept, want = {id(p) for p in base.parameters()}, base(ids).logits
    for kind in latency.CANDIDATES:
        model = latency.model_of(kind, base)
        assert not model.training and (kind == "merged" or kept <= {id(p) for p in model.parameters()})
        assert isinstance(base.model.layers[0].mlp.down_proj, nn.Linear)
        if kind in ("houlsby", "pfeiffer"):
            adapters = [module for module in model.modules() if isinstance(module, latency.Bottleneck)]
            assert len(adapters) == (4 if kind == "houlsby" else 2)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert count == len(adapters) * (2 * 32 * latency.SIZE + latency.SIZE + 32)
            torch.testing.assert_close(model(ids).logits, want)
            nn.init.normal_(adapters[0].up.weight)
            assert (model(ids).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", latency.CANDIDATES)
def test_generated_tokens_see_the_prompt_and_each_other(kind):
    """The last logits are those of one forward over the prompts and the tokens, in the second pass, too."""
    model = latency.model_of(kind, BASE().eval())
    whole, generate = latency.forward_of(model, Prompts(2, 9)), latency.forward_of(model, Prompts(2, 6, 3))
    want = whole()
    torch.testing.assert_close(generate(), want)
    torch.testing.assert_close(generate(), want)


def test_a_wrong_candidate_is_dropped(monkeypatch):
    real = latency.model_of

    def spoiled(kind, base):
        model = real(kind, base)
        if kind == "houlsby":
            nn.init.normal_(model.model.layers[0].mlp.down_proj.up.weight)
        return model

    monkeypatch.setattr(latency, "model_of", spoiled)
    rows = next(small("cpu", 0.0))
    assert [r["candidate"] for r in rows if "fault" in r] == ["houlsby"] and rows[5]["why"].startswith(
        "the logits must"
    )


def test_a_batch_that_is_timed_is_in_the_file_at_once(tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        yield [dict(candidate="merged", sequences=1, tokens=8, generated=0, fault="wrong", why="it is")]
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_latency", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run(preset="latency", output=tmp_path / "l.json")
    assert [r["candidate"] for r in json.loads((tmp_path / "l.json").read_text())["latency"]] == ["merged"]
    assert "merged: wrong, not timed: it is" in capsys.readouterr().out
