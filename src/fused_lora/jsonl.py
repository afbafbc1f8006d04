"""JSONL files: a line is a text, or an example (a prompt and its completion, or a chat) of which the answers alone are
learned."""

import codecs
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora.rows import unlearned

_EXAMPLES = "a prompt and a completion, or messages"


@dataclass(frozen=True)
class Document:
    """One text: a file, or a line of a JSONL file. The name does not depend on where the data lies; its bytes that are
    not UTF-8 are lone surrogates, as Python holds them."""

    name: str
    text: str


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, or a chat: a line of a JSONL file.

    Args:
        name: as a document's.
        place: file and line, for messages.
        prompt, completion: texts, without a chat.
        messages: a chat, dicts with role and content.
    """

    name: str
    place: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()


def read_lines(path: Path, name: str, text_field: str) -> list[Document | Example]:
    """The lines of a file that hold something: a text where the line has the text field, else an example.

    Raises: ValueError naming file and line.
    """
    found: list[Document | Example] = []
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.splitlines(), 1):  # of bytes: at LF, CR LF and CR only
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode())
        except RecursionError:
            raise ValueError(f"{place}: must be JSON; got one nested too deep") from None
        except ValueError as error:
            raise ValueError(f"{place}: must be JSON; got {error}") from None
        found.append(_read_row(row, f"{name}:{number}", place, text_field))
    return found


def _read_row(row: Any, name: str, place: str, text_field: str) -> Document | Example:
    fields = row if isinstance(row, dict) else {}
    if text_field not in fields and "messages" in fields:
        return Example(name, place, messages=_messages(fields["messages"], place))
    if text_field not in fields and {"prompt", "completion"} <= set(fields):
        prompt, completion = fields["prompt"], fields["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            got = reprlib.repr({"prompt": prompt, "completion": completion})
            raise ValueError(f"{place}: prompt and completion must be strings, the completion not empty; got {got}")
        return Example(name, place, _without_halves(prompt), _without_halves(completion))
    text = fields.get(text_field)
    if not isinstance(text, str):
        names = ", ".join(repr(field) for field in sorted(fields)[:8])
        missing = isinstance(row, dict) and text_field not in fields
        got = f"the fields [{names[:200]}]" if missing else reprlib.repr(text if isinstance(row, dict) else row)
        raise ValueError(
            f"{place}: must be an object whose {text_field!r} is a string (--text-field), or which has {_EXAMPLES}; "
            f"got {got}"
        )
    return Document(name, _without_halves(text))


def _messages(messages: Any, place: str) -> tuple[dict[str, Any], ...]:
    """The turns of a chat. Raises: ValueError unless they are texts of roles, with an answer among them."""
    turns: list[Any] = messages if isinstance(messages, list) else [None]
    for turn in turns:
        fields = turn if isinstance(turn, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            got = reprlib.repr(messages if turn is None else turn)
            raise ValueError(f"{place}: messages must be objects whose role and content are strings; got {got}")
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise ValueError(
            f"{place}: messages must begin with another turn than the assistant's and have one of the assistant's; "
            f"got the roles {reprlib.repr(roles)}"
        )
    return tuple({**turn, "content": _without_halves(turn["content"])} for turn in turns)


def _without_halves(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_rows(examples: list[Example], tokenizer: Any, seq_len: int, cut: bool) -> list[Tensor]:
    """An example a row of at most seq_len tokens, see `rows`.

    A text is cut into tokens as a whole; the tokens that end in an answer are learned, and after a completion the
    end-of-text token.

    Args:
        examples: prompts with completions, or chats.
        tokenizer: a fast one of transformers, for chats with a chat template.
        seq_len: what a row may have.
        cut: whether a longer one is cut off there, rather than refused.
    Raises: ValueError naming file and line of an example that is too long, has nothing to learn (left), or that the
        chat template refuses or does not render turn by turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"data of {_EXAMPLES} must have a fast tokenizer; got {type(tokenizer).__name__}")
    rendered = [_render(example, tokenizer) for example in examples]
    found = tokenizer(
        [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    rows = []
    for example, (_, answers), tokens, offsets in zip(examples, rendered, found["input_ids"], found["offset_mapping"]):
        row = torch.tensor(tokens, dtype=torch.int64)
        learned = torch.tensor([any(first < end <= last for first, last in answers) for _, end in offsets]).bool()
        row = torch.where(learned, row, unlearned(row))
        end = tokenizer.eos_token_id
        if not example.messages and end is not None and (not tokens or tokens[-1] != end):
            row = torch.cat([row, torch.tensor([end])])
        if len(row) > seq_len and not cut:
            raise ValueError(
                f"{example.place}: must have at most --seq-len tokens, {seq_len}, or give --cut; got {len(row)}"
            )
        if not (row[1:seq_len] >= 0).any():
            raise ValueError(
                f"{example.place}: must have a token of an answer behind the first in the first {seq_len} (--seq-len); "
                f"got none in {len(row)} tokens"
            )
        rows.append(row[:seq_len])
    return rows


def _render(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """(text, where the answers stand in it, each behind its first character and up to its last)."""
    if not example.messages:
        text = example.prompt + example.completion
        return text, [(len(example.prompt), len(text))]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{example.place}: messages must have a tokenizer with a chat template; got {type(tokenizer).__name__} "
            "without one"
        )
    text, answers = _through_template(example, len(example.messages), tokenizer), []
    for i, turn in enumerate(example.messages):
        if turn["role"] != "assistant":
            continue
        before = _through_template(example, i, tokenizer, add_generation_prompt=True)
        after = _through_template(example, i + 1, tokenizer)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"{example.place}: the chat template must render a turn alike whatever follows, so that the "
                f"assistant's can be told from the others; got another text for turn {i + 1} of {len(example.messages)}"
            )
        answers.append((len(before), len(after)))
    return text, answers


def _through_template(example: Example, turns: int, tokenizer: Any, **options: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(example.messages[:turns]), tokenize=False, **options)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{example.place}: messages must suit the model's chat template; got {type(error).__name__}: {error}"
        ) from None
