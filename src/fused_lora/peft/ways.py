"""Which layer of a PEFT model runs in which way, and why: what `explain` returns."""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A layer's name in the model; its way: "fused" (one call), "update" (the base layer's own product and a fused
    update) or "peft" (PEFT's own forward); and the reason in a sentence."""

    layer: str
    way: str
    reason: str


@dataclass(frozen=True)
class Ways:
    """A row for each adapted layer, in the model's order; printed, layers of like names and equal ways are one line."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, way: str) -> tuple[Row, ...]:
        """The rows of one way."""
        return tuple(row for row in self.rows if row.way == way)

    def summary(self) -> str:
        """How many of the layers are fused."""
        return f"{len(self.of('fused'))} of {len(self)} adapted layers are fused"

    def lines(self) -> list[tuple[str, str, str, str]]:
        """(number of layers, their common name with * for its numbers, way, reason), in the order of first sight."""
        count: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.layer)
            count.setdefault((name, row.way, row.reason), []).append(row.layer)
        return [
            (str(len(layers)), layers[0] if len(layers) == 1 else name, way, reason)
            for (name, way, reason), layers in count.items()
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapters of PEFT"
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines)]
        rows = [
            f"{count:>{widths[0]}}  {name:{widths[1]}}  {way:{widths[2]}}  {reason}"
            for count, name, way, reason in lines
        ]
        return "\n".join([self.summary(), *rows])
