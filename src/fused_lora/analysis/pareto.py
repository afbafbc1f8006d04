"""Learning against forgetting."""

import math
from collections.abc import Sequence


def pareto(learn: Sequence[float], forget: Sequence[float]) -> list[int]:
    """The points that no other point beats: none has learnt at least as much and forgotten at most as much, and one of
    the two strictly.

    Args:
        learn: how much each run has learnt; more is better.
        forget: how much each has forgotten; less is better.
    Returns: positions of the points, from the least forgotten on; equal points all.
    Raises: ValueError if the two differ in length or a number is not one.
    Source: the trade-off curves of Biderman et al., arXiv 2405.09673.
    """
    if len(learn) != len(forget):
        raise ValueError(f"learn and forget must have one number a point each; got {len(learn)} and {len(forget)}")
    if any(math.isnan(number) for number in (*learn, *forget)):
        raise ValueError("learn and forget must be numbers; got nan")
    order = sorted(range(len(learn)), key=lambda i: (forget[i], -learn[i]))
    front: list[int] = []
    for i in order:
        last = front[-1] if front else None
        if last is None or learn[i] > learn[last] or (learn[i], forget[i]) == (learn[last], forget[last]):
            front.append(i)
    return front
