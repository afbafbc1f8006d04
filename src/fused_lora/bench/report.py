"""What a benchmark says on the terminal, in 80 columns."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

from fused_lora.bench.cases import Case


@functools.cache
def _console():
    from rich.console import Console  # here, since timing and cases serve those, too, who print nothing

    return Console(highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """One line, taken literally."""
    from rich.text import Text

    _console().print(Text(text.encode(errors="replace").decode(), style=style))


def _table(columns: tuple[str, ...], rows: list[dict], cells: Callable[[dict], tuple[str, ...]]) -> None:
    """A line per row, `cells(row)` in its columns after the candidate's name; below it, why candidates were dropped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "candidate" else "right", no_wrap=True)
    for row in rows:
        style = "red" if "fault" in row else "bold" if row["candidate"].startswith("fused") else ""
        filled = itertools.islice(itertools.chain(cells(row), itertools.repeat("-")), len(columns))
        table.add_row(*(Text(cell) for cell in filled), style=style)
    _console().print(table)
    _print_dropped(rows)
    say("")


def _print_dropped(rows: list[dict]) -> None:
    for row in rows:
        if "fault" in row:
            say(f"{row['candidate']}: {row['fault']}, not timed: {row['why']}", "red")


def print_environment(env: dict, layers: bool = True) -> None:
    """Args: layers: whether tables of layers follow, whose columns it explains."""
    say(env["device"] + (f", {env['threads']} threads" if env["kind"] == "cpu" else ""), "bold")
    say(f"torch {env['torch']} | fused-lora {env['fused_lora']} {env['commit']} | {env['date']}{amx(env, ' | ')}")
    if not layers:
        say("medians of the undisturbed rounds of one interleaved run\n")
        return
    say("forward + backward, medians of the undisturbed rounds of one interleaved run")
    say("x frozen, fwd, bwd: time over the frozen layer's, of both passes and of each;")
    say("over: what it has above the floor, the time of LoRA's arithmetic alone\n")


def amx(env: dict, before: str) -> str:
    """Whether AMX was used, after `before`; empty where it isn't known or not asked for (a GPU, an old file)."""
    features = env.get("features") or {}
    return f"{before}AMX {'used' if features['amx'] else 'not used'}" if "amx" in features else ""


def print_case(case: Case, rows: list[dict]) -> None:
    frozen_us = next((r["both_us"] for r in rows if r["candidate"] == "frozen"), None)
    gflops = f"; frozen at {4 * case.M * case.N * case.K / frozen_us / 1e3:.0f} GFLOP/s" if frozen_us else ""
    say(f"{case.name}  floor {case.floor:.3f}{gflops}", "italic")
    columns = ("candidate", "ms", "x frozen", "95 %", "over", "fwd", "bwd", "held MiB", "error")
    _table(columns, rows, _case_cells)


def _digits(x: float, count: int) -> str:
    """x with `count` digits, or all that stand before the point."""
    return f"{x:.{max(0, count - len(str(int(x))))}f}"


def _case_cells(r: dict) -> tuple[str, ...]:
    if "fault" in r:
        return r["candidate"], r["fault"]
    return (
        r["candidate"],
        _digits(r["both_us"] / 1e3, 4),
        f"{r['both_ratio']:.3f}",
        f"{r['both_ratio_low']:.3f}-{r['both_ratio_high']:.3f}",
        f"{r['both_ratio'] - r['floor']:+.3f}",
        f"{r['fwd_ratio']:.2f}",
        f"{r['bwd_ratio']:.2f}",
        f"{r['held_bytes'] / 2**20:.2f}",
        f"{r['max_error']:.1e}",
    )


def print_host(rows: list[dict]) -> None:
    if not rows:
        return
    timed = [r for r in rows if "fault" not in r]
    say("host cost, us for a forward and backward of tiny tensors")
    for what, part, of_peft in (("one layer", "host", "of_peft"), ("each of a chain", "chain", "chain_of_peft")):
        line = ", ".join(f"{r['candidate']} {r[f'{part}_us']:.0f}" for r in timed)
        ours = [f"; fused / PEFT {r[of_peft]:.2f}" for r in timed if r["candidate"] == "fused" and of_peft in r]
        say(f"{what}: {line}{''.join(ours)}")
    _print_dropped(rows)
    say("")


def print_steps(title: str, rows: list[dict]) -> None:
    """Args: rows: of one batch."""
    checkpointing = ", ckpt" if rows[0]["checkpointing"] else ""
    say(f"{title}: a training step of {rows[0]['sequences']} x {rows[0]['tokens']} tokens{checkpointing}", "italic")
    say("r=16 on all linears but the head", "italic")
    over = "x LoRA" if any(r["candidate"] in ("dora", "mixed") for r in rows) else "x frozen"
    columns = ("candidate", "ms", "95 %", "x frozen", "PEFT / it", "MiB a step", over)
    _table(columns, rows, functools.partial(_step_cells, over=over))


def _step_cells(r: dict, over: str) -> tuple[str, ...]:
    if "fault" in r:
        return r["candidate"], r["fault"]
    return (
        r["candidate"],
        _digits(r["step_ms"], 4),
        f"{_digits(r['step_low_ms'], 3)}-{_digits(r['step_high_ms'], 3)}",
        f"{r['ratio']:.2f}",
        f"{r['times_peft']:.2f}" if "times_peft" in r else "-",
        f"{r['step_mib']:.0f}" if "step_mib" in r else "-",
        f"{r['over_lora']:.2f}" if over == "x LoRA" else f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else "-",
    )


def print_mixed(rows: list[dict]) -> None:
    r = rows[0]
    say(f"{r['dtype']} M={r['M']} {r['K']}->{r['N']} R=16: a batch of {r['adapters']} adapters", "italic")
    _table(("candidate", "ms", "x frozen", "x one adapter", "95 %"), rows, _mixed_cells)


def _mixed_cells(r: dict) -> tuple[str, ...]:
    if "fault" in r:
        return r["candidate"], r["fault"]
    return (
        r["candidate"],
        _digits(r["both_ms"], 4),
        f"{r['ratio']:.2f}",
        f"{r['over_one']:.2f}",
        f"{r['over_one_low']:.2f}-{r['over_one_high']:.2f}",
    )


def print_latency(rows: list[dict]) -> None:
    what = "a generated token" if rows[0]["generated"] else "one forward"
    say(f"SmolLM2-135M: {what}, without gradients, r=16 on all linears but the head", "italic")
    _table(("batch", "candidate", "ms", "95 %", "x frozen"), rows, _latency_cells)


def _latency_cells(r: dict) -> tuple[str, ...]:
    batch = f"{r['sequences']} x {r['tokens']}"
    if "fault" in r:
        return batch, r["candidate"], r["fault"]
    interval = f"{_digits(r['forward_low_ms'], 3)}-{_digits(r['forward_high_ms'], 3)}"
    return batch, r["candidate"], _digits(r["forward_ms"], 4), interval, f"{r['ratio']:.2f}"


def print_written(path: Path) -> None:
    say(f"wrote {path}")
