"""What people see of a benchmark: lines on the terminal, JSON, a plot, and README's table, which is written from the
JSON."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fused_lora.bench.cases import Case
from fused_lora.files import write_whole

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=not sys.stdout.isatty())


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    widest = next(
        (
            isa
            for isa in ("avx512f", "avx2")
            if any(line.startswith("flags") and f" {isa} " in f"{line} " for line in lines)
        ),
        "no AVX2",
    )
    return f"{names[0]} ({widest})" if names else platform.processor() or platform.machine()


def version() -> str:
    return metadata.version("fused-lora")


def commit() -> str:
    """The checkout's commit with a + if it has changes, or an empty string outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except OSError:
        return ""


def print_environment(env: dict) -> None:
    threads = f", {env['threads']} threads" if env["kind"] == "cpu" else ""
    _console.print(
        f"[bold]{env['device']}[/]{threads} | torch {env['torch']} | fused-lora {env['fused_lora']} {env['commit']} | "
        f"{env['date']}"
    )
    _console.print("forward + backward, medians of one interleaved run; x frozen = time over the frozen layer's\n")


def print_case(case: Case, rows: list[dict]) -> list[dict]:
    table = Table(title=case.name, title_justify="left", box=None, pad_edge=False)
    for column in ("candidate", "both ms", "p20-p80", "GFLOP/s", "fwd", "bwd", "x frozen", "held MiB", "max error"):
        table.add_column(column, justify="left" if column == "candidate" else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            r["candidate"],
            f"{r['both_us'] / 1e3:.2f}",
            f"{r['both_p20_us'] / 1e3:.2f}-{r['both_p80_us'] / 1e3:.2f}",
            f"{r['gflops']:.0f}",
            f"{r['fwd_ratio']:.2f}",
            f"{r['bwd_ratio']:.2f}",
            f"{r['both_ratio']:.3f}",
            f"{r['held_bytes'] / 2**20:.2f}",
            f"{r['max_error']:.1e}",
            style="bold" if r["candidate"] == "fused" else None,
        )
    _console.print(table)
    _console.print()
    return rows


def print_host(rows: list[dict]) -> None:
    if rows:
        line = "  ".join(f"{r['candidate']} {r['host_us']:.0f}" for r in rows)
        ours = next((f"; fused / PEFT {r['of_peft']:.2f}" for r in rows if r["candidate"] == "fused"), "")
        _console.print(f"host cost, us for a forward and backward of tiny tensors: {line}{ours}\n")


def print_steps(rows: list[dict]) -> list[dict]:
    table = Table(
        title="SmolLM2-135M, one training step, fp32, r=16 on all linears",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("tokens", "candidate", "ms", "p20-p80", "x frozen", "times as fast as PEFT", "MiB a step"):
        table.add_column(column, justify="left" if column == "candidate" else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            str(r["tokens"]),
            r["candidate"],
            f"{r['step_ms']:.0f}",
            f"{r['step_p20_ms']:.0f}-{r['step_p80_ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['times_peft']:.2f}",
            f"{r['step_mib']:.0f}",
            style="bold" if r["candidate"] == "fused" else None,
        )
    _console.print(table)
    return rows


def _target(document: dict, path: Path, suffix: str) -> Path:
    path = Path(path)
    return path if path.suffix == suffix else path / f"{document['preset']}-{document['environment']['kind']}{suffix}"


def write_json(document: dict, path: Path) -> Path:
    path = _target(document, path, ".json")
    write_whole({path: (json.dumps(document, indent=1) + "\n").encode()})
    return path


def rows_to_resume(document: dict, path: Path | None) -> list[dict]:
    """The rows of an interrupted run of `document`'s preset, candidates and environment (but for the date); none where
    there is no file yet.

    Raises: ValueError without a path, or if the file comes from another run.
    """
    if path is None:
        raise ValueError("resume needs output, the file to go on with; got None")
    path = _target(document, path, ".json")
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    for name, here in [(n, document[n]) for n in ("preset", "candidates")] + [
        (n, v) for n, v in document["environment"].items() if n != "date"
    ]:
        there = (old if name in document else old["environment"]).get(name)
        if there != here:
            raise ValueError(f"{path} cannot be resumed: {name} must be {here!r}; got {there!r}")
    return old["rows"]


def print_written(path: Path) -> None:
    _console.print(f"wrote {path}")


def write_plot(document: dict, path: Path) -> Path:
    """Grouped bars: forward + backward over the frozen layer's, a group per case, a bar per candidate, eight cases a
    line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path, rows, env = _target(document, path, ".png"), document["rows"], document["environment"]
    names = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n != "frozen"]
    cases = list(dict.fromkeys(key(r) for r in rows))
    value = {(key(r), r["candidate"]): r["both_ratio"] for r in rows}
    colours = dict(
        zip(("naive", "addmm", "peft", "compile", "fused"), ("#bbbbbb", "#8da0cb", "#e5c494", "#a6d854", "#d7301f"))
    )
    per_row = 8
    lines = [cases[i : i + per_row] for i in range(0, len(cases), per_row)]
    figure, grid = pyplot.subplots(
        len(lines),
        figsize=(max(6.0, 1.1 + 1.25 * min(per_row, len(cases))), 0.9 + 2.9 * len(lines)),
        layout="constrained",
        squeeze=False,
    )
    width = 0.8 / len(names)
    for axes, line in zip(grid[:, 0], lines):
        for i, name in enumerate(names):
            heights = [value.get((case, name), 0.0) for case in line]
            axes.bar(
                [j + (i - (len(names) - 1) / 2) * width for j in range(len(line))],
                heights,
                width,
                label=name,
                color=colours.get(name),
            )
        axes.axhline(1.0, color="black", linewidth=1, label="frozen layer")
        axes.set_xticks(
            range(len(line)), [f"{d}\nM={M}, {K}→{N}\nR={R}, p={p:g}" for d, M, K, N, R, p in line], fontsize=7
        )
        axes.set_xlim(-0.6, min(per_row, len(cases)) - 0.4)
        axes.set_ylim(0, max(value.values()) * 1.03)
        axes.set_ylabel("time over the frozen layer's", fontsize=8)
    figure.suptitle(
        f"LoRA forward + backward, lower is better\n{env['device']}, torch {env['torch']}, {env['date']}", fontsize=9
    )
    grid[0, 0].legend(ncols=3, fontsize=8)
    image = BytesIO()
    figure.savefig(image, dpi=130, format="png")
    pyplot.close(figure)
    write_whole({path: image.getvalue()})
    return path


def key(r: dict) -> tuple:
    """What names a row's case."""
    return r["dtype"], r["M"], r["K"], r["N"], r["R"], r["dropout"]


def markdown(document: dict) -> str:
    """README's text for one file of results."""
    env, rows = document["environment"], document["rows"]
    names = list(dict.fromkeys(r["candidate"] for r in rows))
    peers = [n for n in names if n != "frozen"]
    threads = f", {env['threads']} threads" if env["kind"] == "cpu" else ""
    out = [f"{env['device']}{threads}; torch {env['torch']}; commit {env['commit']}; {env['date']}.", ""]
    out += ["Forward + backward over the frozen layer's (medians of one interleaved run):", ""]
    out += ["| dtype | M | K→N | R | p | frozen, ms | " + " | ".join(peers) + " |", "|---" * (6 + len(peers)) + "|"]
    by_case: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        by_case.setdefault(key(r), {})[r["candidate"]] = r
    for (dtype, M, K, N, R, p), of in by_case.items():
        cells = [f"{of[n]['both_ratio']:.2f}" if n in of else "–" for n in peers]
        cells = [f"**{c}**" if n == "fused" else c for n, c in zip(peers, cells)]
        out.append(
            f"| {dtype} | {M} | {K}→{N} | {R} | {p:g} | {of['frozen']['both_us'] / 1e3:.1f} | "
            + " | ".join(cells)
            + " |"
        )
    if document.get("train_step"):
        out += ["", "One training step of SmolLM2-135M (fp32, R=16 on all linears of all layers, batch 1):", ""]
        out += [
            "| tokens | candidate | ms | over frozen | times as fast as PEFT | MiB a step |",
            "|---|---|---|---|---|---|",
        ]
        for r in document["train_step"]:
            out.append(
                f"| {r['tokens']} | {r['candidate']} | {r['step_ms']:.0f} | {r['ratio']:.2f} | {r['times_peft']:.2f} | "
                f"{r['step_mib']:.0f} |"
            )
    if document.get("host"):
        cost = ", ".join(f"{r['candidate']} {r['host_us']:.0f} µs" for r in document["host"])
        ours = next(r["of_peft"] for r in document["host"] if r["candidate"] == "fused")
        out += ["", f"Host cost, eager forward + backward of tiny tensors: {cost} (fused over PEFT {ours:.2f})."]
    return "\n".join(out)


def update_readme(readme: Path, results: Path) -> None:
    """Rewrite the block between the two bench comments from every readme-*.json in `results`; the rest stays as it is.

    Raises: ValueError if the block or the results are missing.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} must hold one {BEGIN} and one {END}; got {text.count(BEGIN)} and {text.count(END)}")
    files = sorted(results.glob("readme-*.json"))
    if not files:
        raise ValueError(
            f"{results} must hold readme-*.json, which `fused-lora bench --preset readme --output {results}` writes; "
            "got none"
        )
    body = "\n\n".join(markdown(json.loads(f.read_text())) for f in files)
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_whole({readme: f"{head}\n{body}\n{tail}".encode()})
