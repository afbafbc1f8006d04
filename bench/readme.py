"""README's measured tables, written from the files of figures: nobody types a figure.

    python bench/readme.py [README.md] [bench/results]

One section for each readme-*.json, with the plot beside it if there is one, one for each llama-*.json
(bench/bench_llama.py) and one for each variants-*.json, between two comments of README.md.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

from fused_lora.bench.cases import Case
from fused_lora.bench.report import amx
from fused_lora.bench.results import key
from fused_lora.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return [first, "|---" * len(head) + "|", *rest]


def layers(rows: list[dict]) -> list[str]:
    """A line a case: the frozen layer's time, the floor (what LoRA's arithmetic alone would take over it), and every
    other candidate's time over it, or why it has none."""
    peers = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n != "frozen"]
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        cases.setdefault(key(r), {})[r["candidate"]] = r

    def cell(row: dict | None) -> str:
        if row is None:
            return "–"
        text = row["fault"] if "fault" in row else f"{row['both_ratio']:.2f}"
        return f"**{text}**" if row["candidate"] == "fused" else text

    head = ["dtype", "M", "K→N", "R", "p", "frozen, ms", "floor", *peers]
    lines = [
        [dtype, f"{M}", f"{K}→{N}", f"{R}", f"{p:g}", milliseconds(of["frozen"]["both_us"]), f"{floor(K, N, R):.2f}"]
        + [cell(of.get(name)) for name in peers]
        for (dtype, M, K, N, R, p), of in cases.items()
    ]
    title = f"Forward + backward over the frozen layer's (medians of one interleaved run{intervals(rows)}):"
    return [title, "", *table(head, lines)]


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.1f}" if us >= 1e3 else f"{us / 1e3:.2f}"


def floor(K: int, N: int, R: int) -> float:
    return Case(1, K, N, R, 0.0, torch.float32).floor


def intervals(rows: list[dict]) -> str:
    """How wide the ratios' 95 % intervals are; empty for a file without them."""
    halves = [(r["both_ratio_high"] - r["both_ratio_low"]) / 2 for r in rows if "both_ratio_high" in r]
    if not halves:
        return ""
    return f"; 95 % intervals ±{statistics.median(halves):.3f}, the widest ±{max(halves):.3f}"


def steps(rows: list[dict]) -> list[str]:
    def cells(r: dict) -> list[str]:
        if "fault" in r:
            return [r["fault"], "–", "–", "–"]
        times_peft = f"{r['times_peft']:.2f}" if "times_peft" in r else "–"
        return [f"{r['step_ms']:.0f}", f"{r['ratio']:.2f}", times_peft, f"{r['step_mib']:.0f}"]

    head = ["tokens", "candidate", "ms", "over frozen", "times as fast as PEFT", "MiB a step"]
    lines = [[f"{r['tokens']}", r["candidate"], *cells(r)] for r in rows]
    title = "One training step of SmolLM2-135M (fp32, R=16 on all linears of all layers, batch 1):"
    return ["", title, "", *table(head, lines)]


def host(rows: list[dict]) -> list[str]:
    cost = ", ".join(
        f"{r['candidate']} {r['fault'] if 'fault' in r else '{:.0f} µs'.format(r['host_us'])}" for r in rows
    )
    ours = [f" (fused over PEFT {r['of_peft']:.2f})" for r in rows if r["candidate"] == "fused" and "of_peft" in r]
    return ["", f"Host cost, eager forward + backward of tiny tensors: {cost}{''.join(ours)}."]


def variants(document: dict) -> str:
    """README's text for one file of LoRA's variants."""

    def cells(r: dict) -> list[str]:
        if "fault" in r:
            return [r["fault"], "–", "–", "–", "–"]
        times_peft = f"{r['times_peft']:.2f}" if "times_peft" in r else "–"
        mib = f"{r['step_mib']:.0f}" if "step_mib" in r else "–"
        return [f"{r['step_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['over_lora']:.2f}", times_peft, mib]

    head = ["sequences × tokens", "candidate", "ms", "over frozen", "over LoRA (fused)", "times as fast as PEFT's own"]
    rows = document["train_step"]
    lines = [[f"{r['sequences']} × {r['tokens']}", r["candidate"], *cells(r)] for r in rows]
    title = "LoRA's variants, one training step of SmolLM2-135M (fp32, R=16 on all linears of all layers):"
    text = [f"{origin(document)} {title}", "", *table([*head, "MiB a step"], lines)]
    return "\n".join(text + (mixed(document["mixed"]) if document["mixed"] else []))


def mixed(rows: list[dict]) -> list[str]:
    """A line a batch: what each candidate takes over one adapter for all."""
    names = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n not in ("frozen", "one adapter")]
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        cases.setdefault((r["dtype"], r["adapters"]), {})[r["candidate"]] = r

    def cell(row: dict) -> str:
        text = row["fault"] if "fault" in row else f"{row['over_one']:.2f}"
        return f"**{text}**" if row["candidate"] == "fused" else text

    lines = [
        [dtype, f"{count}", f"{of['one adapter']['both_ms']:.1f}", *(cell(of[name]) for name in names)]
        for (dtype, count), of in cases.items()
    ]
    r = rows[0]
    title = (
        f"Adapters of their own for each sample of a batch, {r['M']} rows, {r['K']}→{r['N']}, R=16, over one adapter's:"
    )
    return ["", title, "", *table(["dtype", "adapters", "one adapter, ms", *names], lines)]


def llama(document: dict) -> str:
    """README's text for one file of a large model's training steps."""
    rows = document["rows"]

    def cells(r: dict) -> list[str]:
        if "fault" in r:
            return [r["fault"], "–", "–", "–"]
        return [f"{r['step_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['times_peft']:.2f}", f"{r['memory_ratio']:.2f}"]

    head = ["sequences × tokens", "candidate", "ms", "over frozen", "times as fast as PEFT", "memory over frozen"]
    batch = lambda r: f"{r['sequences']} × {r['tokens']}{', checkpointing' * r['checkpointing']}"  # noqa: E731
    lines = [[batch(r), r["candidate"], *cells(r)] for r in rows]
    sizes = f"{document['layers']} layers, random bf16 weights, R={document['rank']} on all linears"
    title = f"One training step, forward and backward, of Llama-3.1-8B's shape ({sizes}):"
    return "\n".join([f"{origin(document)} {title}", "", *table(head, lines)])


def origin(document: dict) -> str:
    """Where and when the figures were taken."""
    env = document["environment"]
    threads = f", {env['threads']} threads" if env["kind"] == "cpu" else ""
    return f"**{env['device']}**{threads}{amx(env, '; ')}; torch {env['torch']}; commit {env['commit']}; {env['date']}."


def section(document: dict) -> str:
    """README's text for one file of figures."""
    text = [origin(document), ""]
    text += layers(document["rows"])
    text += steps(document["train_step"]) if document["train_step"] else []
    text += host(document["host"]) if document["host"] else []
    return "\n".join(text)


def update(readme: Path, results: Path) -> None:
    """Rewrite the block between the two comments from every readme-*.json in `results`; the rest stays as it is.

    Raises: ValueError if the block or the results are missing.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} must hold one {BEGIN} and one {END}; got {text.count(BEGIN)} and {text.count(END)}")
    files = sorted(results.glob("readme-*.json"))
    if not files:
        raise ValueError(
            f"{results} must hold readme-*.json, which `fused-lora bench --preset readme --output {results}` writes; "
            "got none"
        )
    sections = []
    for file in files:
        sections.append(section(json.loads(file.read_text(encoding="utf-8"))))
        plot = file.with_suffix(".png")
        if plot.exists():
            link = Path(os.path.relpath(plot.resolve(), readme.resolve().parent)).as_posix()
            sections.append(f"![Time over the frozen layer's]({link})")
    sections += [llama(json.loads(f.read_text(encoding="utf-8"))) for f in sorted(results.glob("llama-*.json"))]
    sections += [variants(json.loads(f.read_text(encoding="utf-8"))) for f in sorted(results.glob("variants-*.json"))]
    head, tail, body = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :], "\n\n".join(sections)
    write_whole({readme: f"{head}\n{body}\n{tail}".encode()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench" / "results")
    given = parser.parse_args()
    update(given.readme, given.results)
