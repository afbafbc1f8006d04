"""The picture of a benchmark: grouped bars, a group per case, a bar per candidate, eight cases a line."""

from io import BytesIO
from pathlib import Path

from fused_lora.bench.results import key
from fused_lora.files import write_whole

_COLOURS = {
    "naive": "#bbbbbb",
    "addmm": "#8da0cb",
    "peft": "#e5c494",
    "compile": "#a6d854",
    "fused": "#d7301f",
    "triton": "#fc8d59",
    "cuda": "#7f0000",
}
_CASES_A_LINE = 8


def pyplot():
    """matplotlib.pyplot for files alone.

    Raises: ModuleNotFoundError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_plot(document: dict, path: Path) -> None:
    """Forward + backward over the frozen layer's; a dropped candidate's place says wrong, failed or does not fit."""
    plt, rows, env = pyplot(), document["rows"], document["environment"]
    names = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n != "frozen"]
    of = {(key(r), r["candidate"]): r for r in rows}
    cases = list(dict.fromkeys(key(r) for r in rows))
    lines = [cases[i : i + _CASES_A_LINE] for i in range(0, len(cases), _CASES_A_LINE)]
    widest = min(_CASES_A_LINE, len(cases))
    figure, grid = plt.subplots(
        len(lines), figsize=(max(6.0, 1.1 + 1.25 * widest), 1.2 + 2.9 * len(lines)), layout="constrained", squeeze=False
    )
    for axes, line in zip(grid[:, 0], lines):
        _bars(axes, line, names, of)
        axes.set_xlim(-0.6, widest - 0.4)
        axes.set_ylim(0, max(r["both_ratio"] for r in rows if "fault" not in r) * 1.03)
        axes.set_ylabel("time over the frozen layer's", fontsize=8)
    figure.suptitle(
        f"LoRA forward + backward, lower is better\n{env['device']}, torch {env['torch']}, {env['date']}", fontsize=9
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    image = BytesIO()
    figure.savefig(image, dpi=130, format="png")
    plt.close(figure)
    write_whole({path: image.getvalue()})


def _bars(axes, line: list[tuple], names: list[str], of: dict[tuple, dict]) -> None:
    """One line of cases: of[case, name] is a row, absent where a candidate is not timed in a case."""
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(line))]
        rows = [of.get((case, name), {}) for case in line]
        heights = [row.get("both_ratio", 0.0) for row in rows]
        axes.bar(places, heights, width, label=name, color=_COLOURS.get(name))
        for place, row in zip(places, rows):
            if "fault" in row:
                text = f" {name}: {row['fault']}"
                box = dict(facecolor="white", edgecolor="none", pad=0.5)
                axes.text(place, 0, text, rotation=90, ha="center", va="bottom", fontsize=7, bbox=box)
    axes.axhline(1.0, color="black", linewidth=1, label="frozen layer")
    labels = [f"{dtype}\nM={M}, {K}→{N}\nR={R}, p={p:g}" for dtype, M, K, N, R, p in line]
    axes.set_xticks(range(len(line)), labels, fontsize=7)
