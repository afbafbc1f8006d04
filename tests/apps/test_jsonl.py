"""Lines of JSONL that are examples: how they are read, rendered, and which of their tokens are learned."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from fused_lora import data
from fused_lora.jsonl import Document
from fused_lora.rows import IGNORED, inputs_of, labels_of, unlearned

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant', 'system') %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
FORGETFUL = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content if loop.last else '-' }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_model):
    made = AutoTokenizer.from_pretrained(tiny_model)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def write(tmp_path):
    def make(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def turn(role, content):
    return {"role": role, "content": content}


def learned(row, tokenizer):
    """(the text that is read, the text that is learned)"""
    labels = labels_of(row)
    return tokenizer.decode(inputs_of(row)[row != IGNORED]), tokenizer.decode(labels[labels != IGNORED])


def rows_of(path, tokenizer, seq_len=64, cut=False):
    return data.to_blocks(data.read_documents((path,), "text"), tokenizer, seq_len, cut)


def test_one_tensor_holds_inputs_and_labels():
    row = torch.tensor([0, 5, 99, 256, IGNORED])
    row[:3] = unlearned(row[:3])
    assert inputs_of(row).tolist() == [0, 5, 99, 256, 0]
    assert labels_of(row).tolist() == [IGNORED, IGNORED, IGNORED, 256, IGNORED]
    assert unlearned(row[:3]).tolist() == [0, 5, 99]


def test_of_a_prompt_and_a_completion_the_completion_and_its_end_are_learned(write, tokenizer):
    path = write(
        {"prompt": "é 1 ", "completion": "one"},
        {"prompt": "", "completion": "zwei"},
        {"prompt": "x", "completion": "a<eos>"},
    )
    rows = rows_of(path, tokenizer)
    assert rows.shape == (3, 5 + 3 + 1), "as long as the longest"
    assert [learned(row, tokenizer) for row in rows] == [
        ("é 1 one<eos>", "one<eos>"),
        ("zwei<eos>",) * 2,
        ("xa<eos>", "a<eos>"),
    ]


def test_a_token_across_the_border_is_learned(write, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "Ġ": 3, "bc": 4, "<eos>": 5}, [("b", "c")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    (row,) = rows_of(write({"prompt": "a ab", "completion": "c a"}), tokenizer)
    assert inputs_of(row).tolist() == [0, 3, 0, 4, 3, 0, 5]
    assert labels_of(row).tolist() == [IGNORED] * 3 + [4, 3, 0, 5]


def test_of_a_chat_the_assistants_turns_are_learned(write, tokenizer):
    chat = [
        turn("system", "s"),
        turn("user", "hi"),
        turn("assistant", "yes"),
        turn("user", "so"),
        turn("assistant", "no"),
    ]
    path = write({"messages": chat}, {"messages": chat[1:4], "prompt": "p", "id": 7})
    whole, part = rows_of(path, tokenizer)
    assert learned(whole, tokenizer) == ("<s>s<eos><u>hi<eos><a>yes<eos><u>so<eos><a>no<eos>", "yes<eos>no<eos>")
    assert learned(part, tokenizer) == ("<u>hi<eos><a>yes<eos><u>so<eos>", "yes<eos>")


def test_what_is_too_long_is_refused_with_its_line_or_cut(write, tokenizer):
    path = write({"prompt": "a", "completion": "b"}, {"prompt": "12345", "completion": "678"})
    assert rows_of(path, tokenizer, 9).shape == (2, 9)
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 2: must have at most --seq-len tokens, 8, or give --cut; got 9"
    ):
        rows_of(path, tokenizer, 8)
    assert learned(rows_of(path, tokenizer, 6, cut=True)[1], tokenizer) == ("123456", "6")
    with pytest.raises(
        ValueError, match=r"line 2: must have a token of an answer .* first 5 \(--seq-len\); got none in 9"
    ):
        rows_of(path, tokenizer, 5, cut=True)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": 5}, r"line 2: prompt and completion must be strings, .*; got {'completion': 5"),
        ({"prompt": None, "completion": "b"}, "line 2: prompt and completion must be strings"),
        ({"prompt": "a", "completion": ""}, "line 2: prompt and completion must be strings, the completion not empty"),
        ({"prompt": "a"}, r"line 2: .* 'text' is a string .* or messages; got the fields \['prompt'\]"),
        ({"messages": "hi"}, "line 2: messages must be objects whose role and content are strings; got 'hi'"),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, "line 2: messages must be objects .*; got {'role'"),
        ({"messages": [turn("user", [{"type": "image"}])]}, "line 2: messages must be objects"),
        ({"messages": []}, r"line 2: messages must begin with another turn .*; got the roles \[\]"),
        ({"messages": [turn("user", "a")]}, r"one of the assistant's; got the roles \['user'\]"),
        ({"messages": [turn("assistant", "a")]}, "line 2: messages must begin with another turn than the assistant's"),
        (
            {"text": "a text"},
            "data must be texts alone or examples alone; got the text rows.jsonl:2, the example rows.jsonl:1",
        ),
    ],
)
def test_bad_rows_are_named(write, row, message):
    path = write({"prompt": "a", "completion": "b"}, row)
    with pytest.raises(ValueError, match=message):
        data.read_documents((path,), "text")


def test_the_text_field_goes_first(write):
    path = write({"prompt": "a", "completion": "b", "text": "c"})
    assert data.read_documents((path,), "text") == [Document("rows.jsonl:1", "c")]
    assert data.read_documents((path,), "prompt") == [Document("rows.jsonl:1", "a")]


def test_chats_that_the_template_does_not_serve_are_named(write, tokenizer):
    path = write(
        {"messages": [turn("user", "a"), turn("assistant", "b")]},
        {"messages": [turn("tool", "a"), turn("assistant", "b")]},
    )
    with pytest.raises(ValueError, match="line 2: messages must suit the model's chat template; got .*no such role"):
        rows_of(path, tokenizer)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="line 1: the chat template must render a turn alike .* turn 2 of 2"):
        rows_of(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="line 1: messages must have a tokenizer with a chat template; got"):
        rows_of(path, tokenizer)


def test_examples_are_split_and_one_alone_is_refused(write):
    path = write(*({"prompt": "a", "completion": str(i)} for i in range(40)))
    train, held_out = data.read((path,), (), "text")
    assert len(train) + len(held_out) == 40 and held_out and not set(train) & set(held_out)
    with pytest.raises(
        ValueError, match="data must hold a second example to hold out, or give --eval-data; got .*line 1"
    ):
        data.read((write({"prompt": "a", "completion": "b"}, name="one.jsonl"),), (), "text")


def test_filling_that_all_have_is_cut_off():
    blocks = torch.tensor([[1, 2, IGNORED, IGNORED], [-150, 2, 3, IGNORED]])
    assert torch.equal(data.trimmed(blocks), blocks[:, :3]) and torch.equal(data.trimmed(blocks[:1]), blocks[:1, :2])
