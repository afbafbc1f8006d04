"""How names of modules are matched, by PEFT's rules."""

import re
from collections.abc import Iterable, Iterator


def endings(name: str) -> Iterator[str]:
    """A dotted name and its ends after a dot: a.b.c, b.c, c."""
    yield name
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[position + 1 :]


def matches(targets: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a collection (best a set) holds names or their
    ends after a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(end in targets for end in endings(name))


class NamePatterns:
    """The keys of a rank_pattern or an alpha_pattern, read once, for thousands of names.

    PEFT's rule: a key fits a name if re.match finds `(.*\\.)?(key)$`, and the first key that fits decides. Almost all
    keys are plain names, in which a dot stands for any character; those are found in a dictionary by their length and
    the places of their dots, all others are regular expressions, tried one by one.

    Args:
        keys: regular expressions, in PEFT's order.
    Raises: re.error for a key that is none.
    """

    def __init__(self, keys: Iterable[str]):
        self.keys = list(keys)
        # Whether only a whole name fits, length, places of the dots, text: the keys of that text.
        self._plain: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._regexes: list[tuple[int, re.Pattern]] = []
        for index, key in enumerate(self.keys):
            plain = as_plain_name(key)
            if plain is None:
                self._regexes.append((index, re.compile(for_ends(key))))
                continue
            text, dots = plain
            alike = self._plain.setdefault((key.startswith("^"), len(text)), {})
            alike.setdefault(dots, {}).setdefault(text, []).append(index)

    def fitting(self, name: str) -> list[int]:
        """The places of the keys that fit, the deciding one first."""
        found = [index for index, regex in self._regexes if regex.match(name)]
        for whole, text in ((True, name), *((False, end) for end in endings(name))):
            for dots, keys in self._plain.get((whole, len(text)), {}).items():
                found += keys.get(_with_dots(text, dots), ())
        return sorted(found)


def as_plain_name(key: str) -> tuple[str, tuple[int, ...]] | None:
    """A key as the text that it stands for and the places in it where a dot stands for any character; None for a
    regular expression beyond that."""
    text = key.removeprefix("^")
    literal = text.replace("\\", "")
    if re.escape(literal) == text:
        return literal, ()
    if re.fullmatch(r"[\w.-]+", text):
        return text, tuple(place for place, letter in enumerate(text) if letter == ".")
    return None


def for_ends(key: str) -> str:
    """PEFT's regular expression for the names that a key of a pattern fits."""
    return rf"(.*\.)?({key})$"


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    """The text with a dot in each of these places."""
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)


def check_regex(name: str, value: str, expression: str) -> None:
    """Raises ValueError naming `name` and the value unless `expression`, made of it, is a regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression; got {value!r} ({error})") from None


def layer_number(pattern: str | None) -> str:
    """PEFT's regular expression for the names in which a layer's number stands: after the first list, or after the
    list of this name."""
    return r".*?\.[^.]*\.(?P<number>\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."
