"""Rows of tokens: one int64 tensor [n, L] holds what is read, what is learned, and where texts begin in it.

token                 read and learned
IGNORED               filling, behind the text
unlearned(token)      read and not learned; below IGNORED
beginning(any above)  the same, and the first of a text that lies behind another in its row; far below
"""

from bisect import bisect_left, insort

import torch
from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out; fills up a short row
_BEGINS = -(2**40)  # beyond any vocabulary


def unlearned(tokens: Tensor) -> Tensor:
    """What stands in a row for tokens that are read and not learned; it is its own inverse."""
    return IGNORED - 1 - tokens


def beginning(entries: Tensor) -> Tensor:
    """What stands in a row for entries with which a text begins behind another one."""
    return entries + _BEGINS


def inputs_of(rows: Tensor) -> Tensor:
    """The tokens of rows, 0 for the filling."""
    rows = torch.where(_begins(rows), rows - _BEGINS, rows)
    return torch.where(rows < IGNORED, unlearned(rows), rows).clamp(min=0)


def labels_of(rows: Tensor) -> Tensor:
    """The learned tokens of rows, IGNORED for all others, and for the first of a text, which nothing predicts."""
    return rows.clamp(min=IGNORED)


def positions_of(rows: Tensor) -> Tensor | None:
    """The place of each token in its own text; None where no row holds a second text."""
    begins = _begins(rows)
    if not begins.any():
        return None
    places = torch.arange(rows.shape[1], device=rows.device)
    return places - torch.where(begins, places, 0).cummax(1).values


def first_text(row: Tensor) -> Tensor:
    """A row [L] up to where another text begins."""
    others = _begins(row).nonzero()
    return row[: int(others[0])] if len(others) else row


def _begins(rows: Tensor) -> Tensor:
    return rows < _BEGINS // 2


def packed(texts: list[Tensor], size: int) -> Tensor:
    """The texts, each whole, in few rows [n, at most size]: the longest first, each into the fullest row that has room
    for it (best-fit decreasing).

    Args:
        texts: rows [at most size] of one text.
        size: what a row may have.
    """
    rows: list[list[Tensor]] = []
    with_room: dict[int, list[list[Tensor]]] = {}  # rows by how many more tokens they may have
    rooms: list[int] = []  # the keys of those, in order
    for text in sorted(texts, key=len, reverse=True):
        place = bisect_left(rooms, len(text))
        if place == len(rooms):
            row, room = [text], size
            rows.append(row)
        else:
            room = rooms[place]
            row = with_room[room].pop()
            row.append(torch.cat([beginning(text[:1]), text[1:]]))
            if not with_room[room]:
                del with_room[room], rooms[place]
        room -= len(text)
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(row)
    return padded([torch.cat(row) for row in rows])


def padded(rows: list[Tensor]) -> Tensor:
    """Rows as one tensor [n, the longest's length], filled up with IGNORED."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
