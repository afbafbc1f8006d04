"""The study's tables and plot from its rows."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

from study_plan import CONDITIONS, MAIN, SEEDS, Condition, best_rate

from fused_lora.analysis import pareto
from fused_lora.files import write_whole

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
REFERENCE = "LoRA r=16"
Rows = Sequence[dict[str, Any]]


def chosen(rows: Rows, name: str) -> list[dict[str, Any]]:
    """A condition's runs at its best rate that did not diverge, by seed."""
    lr = best_rate(rows, name)
    found = [r for r in rows if r["condition"] == name and r["lr"] == lr and r["code"] is not None]
    return sorted(found, key=lambda r: r["seed"])


def changes(rows: Rows, name: str, text: str) -> dict[int, float]:
    """By seed, how much the loss on a text changed."""
    return {r["seed"]: r[text] - r[f"{text}_before"] for r in chosen(rows, name)}


def against(rows: Rows, name: str, text: str, other: str) -> list[float]:
    """Differences of two conditions' losses in the seeds that both have; the same seed is the same training text."""
    own, others = changes(rows, name, text), changes(rows, other, text)
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def spread(values: Sequence[float], digits: int = 3, sign: str = "+") -> str:
    """Mean, least and largest of some values."""
    if not values:
        return "–"
    number = f"{sign}.{digits}f"
    if len(values) == 1:
        return f"{values[0]:{number}}"
    return f"{mean(values):{number}} ({min(values):{number}} … {max(values):{number}})"


def table(rows: Rows) -> str:
    """A line a condition: what it learnt and forgot, against LoRA at the same seeds, and what became of the weights."""
    lines = [
        "| condition | trained | rate | runs | code | English | code, less LoRA r=16's | English, less LoRA r=16's "
        "| distinct pairs | perturbation rank | intruders a weight | s a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for condition in CONDITIONS:
        own = chosen(rows, condition.name)
        if not own:
            continue
        closer = [r for r in own if "intruders" in r]
        figures = [spread([r[key] for r in closer], *how) for key, how in _CLOSER.items()]
        same = condition.name == REFERENCE
        differences = ["" if same else spread(against(rows, condition.name, t, REFERENCE)) for t in ("code", "english")]
        cells = [condition.name, f"{own[0]['parameters'] / 1e6:.2f} M", f"{own[0]['lr']:g}", str(len(own))]
        cells += [spread([*changes(rows, condition.name, text).values()]) for text in ("code", "english")]
        cells += [*differences, *figures, f"{mean(r['seconds'] for r in own):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_CLOSER: dict[str, tuple[int, str]] = {"diversity": (2, ""), "perturbation_rank": (3, ""), "intruders": (2, "")}


def sweep(rows: Rows) -> str:
    """A line a condition: the validation loss less that before training, at each rate of the sweep."""
    rates = sorted({r["lr"] for r in rows})
    lines = [f"| condition | {' | '.join(f'{lr:g}' for lr in rates)} |", f"|---|{'---|' * len(rates)}"]
    for condition in CONDITIONS:
        swept = {r["lr"]: r for r in rows if r["condition"] == condition.name and r["seed"] == SEEDS[0]}
        if swept:
            best = best_rate(rows, condition.name)
            cells = [_swept(swept[lr], lr == best) if lr in swept else "" for lr in rates]
            lines.append(f"| {condition.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _swept(row: dict[str, Any], best: bool) -> str:
    if row["validation"] is None:
        return "diverged"
    change = f"{row['validation'] - row['validation_before']:+.3f}"
    return f"**{change}**" if best else change


def comparisons(rows: Rows) -> str:
    """The figures that the claims are about: differences of the same seeds, and ratios of the best rates."""
    lines = ["| compared | mean (least … largest) over seeds |", "|---|---|"]
    for name, text, other in _PAIRS:
        values = against(rows, name, text, other)
        if values:
            better = sum(value < 0 for value in values)
            figure = f"{spread(values)}, lower in {better} of {len(values)}"
            lines.append(f"| loss on {'code' if text == 'code' else 'English'}: {name} less {other} | {figure} |")
    for name, other in _RATES:
        rates = best_rate(rows, name), best_rate(rows, other)
        if all(rates):
            lines.append(f"| best rate: {name} over {other} | {rates[0] / rates[1]:.3g} |")
    return "\n".join(lines)


_AT_ITS_RATE = ("DoRA r=16", "LoRA-FA r=16", "PeriodicLoRA r=16", "Chain of LoRA r=16", "MLP only r=20")
_PAIRS = (
    ("LoRA r=4", "code", "LoRA r=64"),
    (REFERENCE, "code", "full"),
    (REFERENCE, "english", "full"),
    ("attention only r=33", "code", "MLP only r=20"),
    ("attention only r=33", "english", "MLP only r=20"),
    ("rsLoRA r=64", "code", "LoRA r=64"),
    *((name, "code", "LoRA r=16 at 0.001") for name in _AT_ITS_RATE),
    ("LoRA r=16, batch 8", "code", "full, batch 8"),
    ("LoRA r=16, batch 8", "code", REFERENCE),
    ("full, batch 8", "code", "full"),
)
_RATES = ((REFERENCE, "full"), ("LoRA r=16, batch 8", "full, batch 8"), ("LoRA r=4", "LoRA r=64"))


def section(rows: Rows) -> str:
    """What stands between the marks of the page. Raises: ValueError without rows."""
    if not rows:
        raise ValueError("rows must hold a run at least; got none")
    first = rows[0]
    hours = sum(r["seconds"] for r in rows) / 3600
    devices = ", ".join(sorted({f"{r['device']}, {r['threads']} thread(s)" for r in rows}))
    dates, commits = sorted({r["date"] for r in rows}), sorted({r["commit"] for r in rows})
    versions, texts = sorted({r["torch"] for r in rows}), sorted({r["data"] for r in rows})
    head = (
        f"{len(rows)} runs of {first['tokens']:,} tokens each, {hours:.1f} hours in sum; {devices}; torch "
        f"{', '.join(versions)}; commit {', '.join(commits)}; {dates[0]} to {dates[-1]}; texts {', '.join(texts)}. "
        f"Before training: code {first['code_before']:.3f}, English {first['english_before']:.3f} nats a token, "
        f"validation {first['validation_before']:.3f}, distinct pairs {first['diversity_before']:.2f}."
    )
    lacking = [line for condition in CONDITIONS if (line := _lacking(rows, condition))]
    parts = [head, table(rows), "![Learning against forgetting](study.png)", comparisons(rows), sweep(rows)]
    return "\n\n".join([*parts, *[f"Not run yet: {'; '.join(lacking)}."] * bool(lacking)])


def _lacking(rows: Rows, condition: Condition) -> str:
    """What the plan has of a condition and the rows have not."""
    swept = sum(r["condition"] == condition.name and r["seed"] == SEEDS[0] for r in rows)
    if swept < len(condition.halves):
        return f"{condition.name} ({swept} of {len(condition.halves)} rates)"
    lr = best_rate(rows, condition.name)
    seeds = {r["seed"] for r in rows if r["condition"] == condition.name and r["lr"] == lr}
    return f"{condition.name} ({len(seeds)} of {len(SEEDS)} seeds)" if len(seeds) < len(SEEDS) and lr else ""


def plot(rows: Rows) -> bytes:
    """A PNG: a point a condition of batch 2, how much the loss on English rose against how much that on code fell, the
    means of the seeds with least and largest; a thick line through those that none beats in both, and a thin one a
    condition through the runs of its sweep, as far as they lie near."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [c.name for c in MAIN if chosen(rows, c.name)]
    learnt = {name: [-value for value in changes(rows, name, "code").values()] for name in names}
    forgot = {name: [*changes(rows, name, "english").values()] for name in names}
    at = {name: (mean(forgot[name]), mean(learnt[name])) for name in names}
    figure, axes = pyplot.subplots(figsize=(9.5, 5.5), layout="constrained")
    for i, (name, (x, y)) in enumerate(at.items()):
        look = dict(color=pyplot.get_cmap("tab20")(i), linewidth=0.8)
        axes.errorbar(x, y, _around(y, learnt[name]), _around(x, forgot[name]), "os^Dv"[i % 5], label=name, **look)
        axes.plot(*_swept_points(rows, name), marker=".", markersize=3, alpha=0.4, **look)
    front = [at[names[i]] for i in pareto([at[name][1] for name in names], [at[name][0] for name in names])]
    axes.plot(*zip(*front), color="#888888", linewidth=2.5, alpha=0.5, zorder=0, label="not beaten in both")
    for limits, values, below, above in ((axes.set_xlim, forgot, 0.02, 0.06), (axes.set_ylim, learnt, 0.04, 0.02)):
        middles = [mean(v) for v in values.values()]
        limits(min(middles) - below, max(middles) + above)
    axes.set_xlabel("forgetting: rise of the loss on English, nats a token")
    axes.set_ylabel("learning: fall of the loss on code, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    image = BytesIO()
    figure.savefig(image, dpi=120, format="png")
    pyplot.close(figure)
    return image.getvalue()


def _around(middle: float, values: Sequence[float]) -> list[list[float]]:
    """How far the values reach below and above."""
    return [[middle - min(values)], [max(values) - middle]]


def _swept_points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Rise on English and fall on code of a sweep's runs, by rate."""
    swept = [r for r in rows if r["condition"] == name and r["seed"] == SEEDS[0] and r["code"] is not None]
    swept.sort(key=lambda r: r["lr"])
    return [r["english"] - r["english_before"] for r in swept], [r["code_before"] - r["code"] for r in swept]


def write(rows: Rows, page: Path) -> None:
    """Put the tables between the marks of a page, and the plot beside it. Raises: ValueError if it lacks the marks."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} must hold one {BEGIN} before one {END}")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_whole({page: f"{head}\n{section(rows)}\n{tail}".encode(), page.with_suffix(".png"): plot(rows)})
