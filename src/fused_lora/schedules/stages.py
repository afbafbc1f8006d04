"""When stages end, and what goes on into the next one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """The steps after which to merge, the ranks of the stages and the share that is kept; see `MergeSchedule`. Raises:
    ValueError naming the argument."""

    every: int | None
    knots: tuple[int, ...]
    ranks: tuple[int, ...]
    momentum: float
    momentum_mode: str
    warmup: int
    export: str

    def __post_init__(self):
        if (self.every is None) == (not self.knots):
            raise ValueError(
                f"every and knots exclude each other, and one must be given; got every={self.every!r} and "
                f"knots={list(self.knots)}"
            )
        if self.every is not None and not _is_count(self.every):
            raise ValueError(f"every must be an int >= 1; got {self.every!r}")
        if not all(map(_is_count, self.knots)) or list(self.knots) != sorted(set(self.knots)):
            raise ValueError(f"knots must be ints >= 1 that rise; got {list(self.knots)}")
        if self.ranks and (not all(map(_is_count, self.ranks)) or len(self.ranks) != len(self.knots) + 1):
            raise ValueError(
                f"ranks must be ints >= 1, one more than knots, which are {len(self.knots)}; got {list(self.ranks)}"
            )
        if not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be a number in [0, 1); got {self.momentum!r}")
        for name, known in (("momentum_mode", ("keep", "drop")), ("export", ("weights", "stack"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        if self.keeps and self.ranks:
            raise ValueError(
                f"ranks and momentum exclude each other, what is kept has its rank; got momentum={self.momentum} and "
                f"ranks={list(self.ranks)}"
            )
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup must be an int >= 0; got {self.warmup!r}")

    @property
    def keeps(self) -> bool:
        """Whether a share of the update stays in the adapter."""
        return self.momentum > 0 and self.momentum_mode == "keep"

    def due(self, steps: int) -> bool:
        """Whether a stage ends after so many steps."""
        return steps in self.knots if self.every is None else steps % self.every == 0

    def rank(self, merges: int, now: int) -> int:
        """The rank of the stage after so many merges, `now` where it does not change."""
        return self.ranks[min(merges, len(self.ranks) - 1)] if self.ranks else now


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
