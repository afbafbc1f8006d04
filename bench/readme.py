"""README's measured tables, written from the files of figures: nobody types a figure.

    python bench/readme.py [README.md] [bench/results]

Between two comments of README.md: a summary of all files; each readme-*.json's plot, if there is one, and its tables,
folded; and, folded too, those of each llama-*.json (bench/bench_llama.py), variants-*.json and latency-*.json.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

from fused_lora.bench.cases import Case
from fused_lora.bench.report import amx
from fused_lora.bench.results import key
from fused_lora.bench.runner import CHAIN
from fused_lora.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
LLAMA = "Llama-3.1-8B's shape"
LEGEND = (
    "naive is the formula above, addmm a hand-written autograd Function of `addmm`s, peft PEFT's layer, compile "
    '`torch.compile` of the formula, fused this library with backend="auto" (bold), triton its Triton kernels; floor, '
    "below, is what LoRA's arithmetic alone would take. Under 1 a layer is faster than PyTorch's frozen one. AMD's "
    "family 25 model 17 is the EPYC 9004 (Zen 4), family 26 model 2 the EPYC 9005 (Zen 5)."
)
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


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


def dtype(r: dict) -> str:
    return r.get("dtype", "float32")


def steps(rows: list[dict]) -> list[str]:
    def cells(r: dict) -> list[str]:
        if "fault" in r:
            return [r["fault"], "–", "–", "–"]
        times_peft = f"{r['times_peft']:.2f}" if "times_peft" in r else "–"
        mib = f"{r['step_mib']:.0f}" if "step_mib" in r else "–"
        return [f"{r['step_ms']:.0f}", f"{r['ratio']:.2f}", times_peft, mib]

    head = ["dtype", "sequences × tokens", "candidate", "ms", "over frozen", "times as fast as PEFT", "MiB a step"]
    lines = [[dtype(r), batch(r), r["candidate"], *cells(r)] for r in rows]
    what = "R=16 on all linears of all layers, A and B in fp32, addmm's in the model's dtype"
    title = f"One training step of SmolLM2-135M ({what}):"
    return ["", title, "", *table(head, lines)]


def host(rows: list[dict]) -> list[str]:
    def costs(part: str, of_peft: str) -> str:
        cost = ", ".join(f"{r['candidate']} {r.get('fault') or f'{r[part]:.0f} µs'}" for r in rows)
        ours = [f" (fused over PEFT {r[of_peft]:.2f})" for r in rows if r["candidate"] == "fused" and of_peft in r]
        return cost + "".join(ours)

    text = f"Host cost, eager forward + backward of tiny tensors: {costs('host_us', 'of_peft')}"
    if any("chain_us" in r for r in rows):
        text += f"; each layer of a chain of {CHAIN}: {costs('chain_us', 'chain_of_peft')}"
    return ["", f"{text}."]


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


def latency(document: dict) -> str:
    """README's text for one file of forwards without gradients: a line a batch, each over the frozen model."""
    rows = document["latency"]
    names = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n != "frozen"]
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        cases.setdefault((r["sequences"], r["tokens"], r["generated"]), {})[r["candidate"]] = r

    def cell(row: dict) -> str:
        text = row["fault"] if "fault" in row else f"{row['ratio']:.2f}"
        return f"**{text}**" if row["candidate"] == "fused" else text

    lines = [
        [f"{sequences} × {tokens}{', a token after it' if generated else ''}", f"{of['frozen']['forward_ms']:.1f}"]
        + [cell(of[name]) for name in names]
        for (sequences, tokens, generated), of in cases.items()
    ]
    title = (
        "A forward of SmolLM2-135M without gradients (fp32, R=16 on all linears of all layers), over the frozen one's:"
    )
    head = ["sequences × tokens", "frozen, ms", *names]
    return "\n".join([f"{origin(document)} {title}", "", *table(head, lines)])


def batch(r: dict) -> str:
    checkpointing = ", checkpointing" if r.get("checkpointing") else ""
    return f"{r.get('sequences', 1)} × {r['tokens']}{checkpointing}"


def llama(document: dict) -> str:
    """README's text for one file of a large model's training steps."""
    rows = document["rows"]

    def cells(r: dict) -> list[str]:
        if "fault" in r:
            return [r["fault"], "–", "–", "–"]
        return [f"{r['step_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['times_peft']:.2f}", f"{r['memory_ratio']:.2f}"]

    head = ["sequences × tokens", "candidate", "ms", "over frozen", "times as fast as PEFT", "memory over frozen"]
    lines = [[batch(r), r["candidate"], *cells(r)] for r in rows]
    sizes = f"{document['layers']} layers, random bf16 weights, R={document['rank']} on all linears"
    title = f"One training step, forward and backward, of {LLAMA} ({sizes}):"
    return "\n".join([f"{origin(document)} {title}", "", *table(head, lines)])


def origin(document: dict) -> str:
    """Where and when the figures were taken."""
    env = document["environment"]
    threads = f", {env['threads']} threads" if env["kind"] == "cpu" else ""
    return f"**{env['device']}**{threads}{amx(env, '; ')}; torch {env['torch']}; commit {env['commit']}; {env['date']}."


def section(document: dict) -> str:
    """README's tables of one file of figures."""
    text = layers(document["rows"])
    text += steps(document["train_step"]) if document["train_step"] else []
    text += host(document["host"]) if document["host"] else []
    return "\n".join(text)


def summary(documents: list[dict]) -> str:
    """A line a device and dtype: from the best to the worst of its layers of rank 16 without dropout."""
    names = [n for n in dict.fromkeys(r["candidate"] for d in documents for r in d["rows"]) if n != "frozen"]

    def cell(rows: list[dict], name: str) -> str:
        ratios = [r["both_ratio"] for r in rows if r["candidate"] == name and "fault" not in r]
        text = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–"
        return f"**{text}**" if name == "fused" else text

    lines = []
    for document in documents:
        plain = [r for r in document["rows"] if (r["R"], r["dropout"]) == (16, 0.0)]
        for dtype in dict.fromkeys(r["dtype"] for r in plain):
            rows = [r for r in plain if r["dtype"] == dtype]
            lines.append([document["environment"]["device"], dtype, *(cell(rows, name) for name in names)])
    title = "Forward + backward of a layer over the frozen one's, R = 16, from the best to the worst of the shapes:"
    return "\n".join([title, "", *table(["device", "dtype", *names], lines), "", LEGEND])


def step_summary(documents: list[dict], large: list[dict]) -> str:
    """A line a device and batch: a training step over the frozen model's, without dropout and with it."""
    names = ["peft", "peft+fuse", "fused", *(f"{name} p=0.05" for name in ("peft", "peft+fuse", "fused"))]
    found: dict[tuple, dict[str, str]] = {}
    small = [(d, f"SmolLM2-135M, {SHORT[dtype(r)]}", r) for d in documents for r in d["train_step"]]
    for document, what, r in small + [(d, f"{LLAMA}, bf16", r) for d in large for r in d["rows"]]:
        if r["candidate"] in names:
            line = found.setdefault((document["environment"]["device"], f"{what}: {batch(r)}"), {})
            line[r["candidate"]] = r["fault"] if "fault" in r else f"{r['ratio']:.2f}"
    lines = [
        [*key, *(f"**{of[n]}**" if n.startswith("fused") and n in of else of.get(n, "–") for n in names)]
        for key, of in found.items()
    ]
    title = "A training step, forward and backward, over the frozen model's, R = 16 on all linears, A and B in fp32:"
    return "\n".join([title, "", *table(["device", "model: sequences × tokens", *names], lines)])


def folded(title: str, text: str) -> str:
    """Text that a click unfolds."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def loaded(files: Iterable[Path]) -> list[dict]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)]


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
    documents = loaded(files)
    large, kinds, forwards = (loaded(results.glob(f"{kind}-*.json")) for kind in ("llama", "variants", "latency"))
    sections = [summary(documents), step_summary(documents, large)]
    for file, document in zip(files, documents):
        sections.append(origin(document))
        plot = file.with_suffix(".png")
        if plot.exists():
            link = Path(os.path.relpath(plot.resolve(), readme.resolve().parent)).as_posix()
            sections.append(f"![Time over the frozen layer's]({link})")
        sections.append(folded("Every layer, a training step, the host's cost", section(document)))
    for what, tables, of in (
        (f"A training step of {LLAMA}", llama, large),
        ("LoRA's variants and mixed batches", variants, kinds),
        ("Prompts and generation", latency, forwards),
    ):
        sections += [folded(f"{what}: {d['environment']['device']}", tables(d)) for d in of]
    head, tail, body = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :], "\n\n".join(sections)
    write_whole({readme: f"{head}\n{body}\n{tail}".encode()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench" / "results")
    given = parser.parse_args()
    update(given.readme, given.results)
