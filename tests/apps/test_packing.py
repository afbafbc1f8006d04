"""Several texts in one row: every token once, each text seen as if it stood alone, and models that cannot do it."""

import copy
import json

import pytest
import torch
from finetune_runs import FILES, rows_of

from fused_lora import apply_lora, data
from fused_lora.finetune import checkpoint, job, loop
from fused_lora.jsonl import Document
from fused_lora.rows import IGNORED, first_text, inputs_of, labels_of, packed, positions_of, unlearned

TEXTS = ["abcdefghijkl", "mnopq", "rs", "t", "uvwxyzab", "c"]


@pytest.fixture
def model(tiny_model, one_thread):
    """The tiny model with an adapter that is far from nothing, and its tokenizer."""
    model, tokenizer = job.load_model(tiny_model, torch.float32, "cpu")
    apply_lora(model.requires_grad_(False), 4, 8)
    for parameter in checkpoint.trained(model).values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model, tokenizer


def blocks_of(tokenizer, seq_len=8):
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    return data.to_blocks(documents, tokenizer, seq_len, packing=True)


def texts_in(blocks):
    """The texts of rows, apart."""
    found = []
    for row in blocks:
        row = row[row != IGNORED]
        positions = positions_of(row[None])
        starts = [0] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
        found += [row[i:j] for i, j in zip(starts, [*starts[1:], len(row)])]
    return found


def test_blocks_are_full_and_hold_every_token_once(model):
    blocks = blocks_of(model[1])
    ends = [tuple(model[1](text + "<eos>")["input_ids"]) for text in TEXTS]
    wanted = [
        part for tokens in ends for part in (tokens[:8], tokens[8:]) if len(part) > 1
    ]  # one token teaches nothing
    assert sorted(tuple(inputs_of(text).tolist()) for text in texts_in(blocks)) == sorted(wanted)
    assert blocks.shape == (5, 8) and [len(first_text(row[row != IGNORED])) for row in blocks] == [8, 8, 6, 5, 2]
    assert loop.predicted(blocks) == sum(len(part) - 1 for part in wanted)


def test_a_text_goes_where_least_room_is_left():
    rows = packed([torch.arange(n) for n in (2, 5, 3, 6, 4)], 8)
    assert [(row != IGNORED).sum().item() for row in rows] == [8, 8, 4]
    assert positions_of(rows).tolist()[:2] == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert labels_of(rows)[0].tolist() == [0, 1, 2, 3, 4, 5, IGNORED, 1], "nothing predicts across a border"
    prompt = torch.cat([unlearned(torch.tensor([7, 9])), torch.tensor([4])])
    (row,) = packed([prompt, prompt], 8)
    assert inputs_of(row).tolist() == [7, 9, 4, 7, 9, 4] and labels_of(row)[[2, 5]].tolist() == [4, 4]
    assert (labels_of(row)[[0, 1, 3, 4]] == IGNORED).all() and positions_of(prompt[None]) is None


def test_a_text_is_read_as_if_it_stood_alone(model):
    """Logits behind each border as near to fp64 as those of the text alone; loss and gradient are the sums over the
    texts."""
    ours, tokenizer = model
    exact, blocks = copy.deepcopy(ours).double(), blocks_of(tokenizer, 16)
    assert len(blocks) < len(texts_in(blocks))
    with torch.no_grad():
        logits = ours(input_ids=inputs_of(blocks), position_ids=positions_of(blocks), use_cache=False).logits
        found = logits[blocks != IGNORED]
        alone = torch.cat([ours(input_ids=inputs_of(text)[None]).logits[0] for text in texts_in(blocks)])
        truth = torch.cat([exact(input_ids=inputs_of(text)[None]).logits[0] for text in texts_in(blocks)])
    assert (found - truth).abs().max() <= 2 * (alone - truth).abs().max()
    parameters = list(checkpoint.trained(exact).values())
    total, wanted = (
        sum(loop.loss_sum(exact, part) for part in parts)
        for parts in ([blocks], [text[None] for text in texts_in(blocks)])
    )
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (total, wanted))):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Bloom", "Mamba"])
def test_a_model_that_sees_across_is_refused_by_name(kind, tiny, run, settings_of, tmp_path, monkeypatch):
    """Attention by distance whatever position_ids say, and no attention."""
    import transformers

    sizes = dict(n_layer=1, n_head=2) if kind == "Bloom" else dict(num_hidden_layers=1, state_size=4)
    config = getattr(transformers, f"{kind}Config")(vocab_size=257, hidden_size=16, **sizes)
    other = getattr(transformers, f"{kind}ForCausalLM")(config)
    _, tokenizer = job.load_model(tiny[0], torch.float32, "cpu")
    monkeypatch.setattr(job, "load_model", lambda *arguments: (other, tokenizer))
    with pytest.raises(ValueError, match=f"--packing must have a model .* a {kind}ForCausalLM, in which a text sees"):
        run(settings_of(tiny, packing=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_on_packed_examples_learns_and_resumes_bit_for_bit(tiny, run, settings_of, tmp_path):
    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 5:
            raise Killed

    path = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"{i} is ", "completion": "even" if i % 2 == 0 else "odd"} for i in range(60)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = settings_of((tiny[0], str(path)), packing=True, seq_len=48)
    summary = run(settings, tmp_path / "whole")
    assert summary["perplexity_after"] < summary["perplexity_before"]
    with pytest.raises(Killed):
        run(settings, tmp_path / "killed", save_every=3, tick=kill)
    run(settings, tmp_path / "killed", resume=True)
    for name in FILES[:3]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert rows_of(tmp_path / "whole")[1]["tokens"] > 4 * 5, "more answers than rows"
