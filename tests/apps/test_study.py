"""bench/study.py: the plan is worked off run by run, stopped and taken up again, and its page comes from the rows."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from fused_lora.jsonl import Document
from fused_lora.models import load_model

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import study  # noqa: E402
import study_measures  # noqa: E402
import study_plan  # noqa: E402
import study_report  # noqa: E402
import study_runs  # noqa: E402
from study_plan import SEEDS, Condition, Run, next_run, rate  # noqa: E402

PAIR = (Condition("full", (-6,), full=True), Condition("LoRA r=16", (-5,), rank=2))
PAGE = f"before\n{study_report.BEGIN}\nold\n{study_report.END}\nafter\n"


@pytest.fixture(scope="module")
def small(tiny_model):
    """A study of four steps on a tiny model."""
    model, tokenizer = load_model(tiny_model, torch.bfloat16, "cpu")
    texts = [
        Document(f"{i}", "".join(f"the square of {j * i} is {(j * i) ** 2}\n" for j in range(60))) for i in range(9)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_plan, "TOKENS_A_RUN", 4 * 2 * study_plan.SEQ_LEN)
        patch.setattr(study_runs, "MEASURED", dict.fromkeys(study_runs.MEASURED, 256))
        patch.setattr(study_runs, "EVERY", 1)
        patch.setattr(study_measures, "NEW_TOKENS", 3)
        yield study_runs.Study(model, tokenizer, (texts[:6], texts[6:]))


def row(name, half, validation, seed=0, code=2.0, english=3.0, **more):
    before = dict(validation_before=3.0, code_before=3.0, english_before=2.5, diversity_before=0.9)
    facts = dict(parameters=10**6, tokens=8192, seconds=60.0, device="a CPU", threads=1, commit="abc", date="today")
    facts |= dict(torch="2", data="0f") | before
    return (
        dict(condition=name, lr=rate(half), seed=seed, validation=validation, code=code, english=english) | facts | more
    )


def test_the_plan_extends_a_grid_while_its_edge_is_best_and_repeats_the_best_rate():
    stage = (Condition("a", (-6, -5)), Condition("b", (-5,)))
    rows = []

    def follow(losses):
        """The plan with these validation losses."""
        while (run := next_run(rows, [stage])) is not None:
            name, half = run.condition.name, next(h for h in range(-9, 0) if rate(h) == run.lr)
            rows.append(row(name, half, losses.get((name, half)), run.seed))
        return [(r["condition"], r["lr"], r["seed"]) for r in rows]

    assert (
        follow({("a", -6): 2.5, ("a", -5): 2.4, ("a", -4): 2.3, ("a", -3): 2.4})
        == [
            ("a", 1e-3, 0),
            ("a", 3.16e-3, 0),
            ("b", 3.16e-3, 0),  # diverges, and ends there
            ("a", 1e-2, 0),  # the best lay at the edge
            ("a", 3.16e-2, 0),  # and did so again
            ("a", 1e-2, 1),
            *[("a", 1e-2, seed) for seed in SEEDS[2:]],
        ]
    )
    assert study_plan.best_rate(rows, "a") == 1e-2 and study_plan.best_rate(rows, "b") is None
    rows.clear()
    found = follow({("a", half): half for half in range(-9, 0)})
    assert len(found) == 3 + study_plan.EXTENSIONS + len(SEEDS) - 1, "lower is better without end"


def test_a_stopped_study_goes_on_and_runs_leave_nothing_behind(small, monkeypatch, tmp_path, one_thread):
    monkeypatch.setattr(study, "next_run", lambda rows: next_run(rows, [PAIR]))
    for module in (study_plan, study_report):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(study_plan, "_extension", lambda rows, condition: None)
    monkeypatch.setattr(study_report, "CONDITIONS", PAIR)
    path, page, said = tmp_path / "rows.jsonl", tmp_path / "study.md", []
    page.write_text(PAGE)

    def stop(line):
        said.append(line)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(path, lambda: small, say=stop)
    assert study_report.section(study.read_rows(path)).endswith("Not run yet: LoRA r=16 (1 of 2 seeds).")
    assert study.run(path, lambda: small, say=said.append) == 1
    rows = study.read_rows(path)
    assert study.run(path, None) == 0, "nothing is left, and nothing was loaded"
    assert [(r["condition"], r["seed"]) for r in rows] == [(c.name, s) for s in (0, 1) for c in PAIR]
    again = small.execute(Run(PAIR[0], rows[0]["lr"], 0))
    same = ("validation", "code", "english", "training_loss")
    assert {key: again[key] for key in same} == {key: rows[0][key] for key in same}, "the model is as it was"
    study_report.write(rows, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_limit_stops_before_the_first_run(tmp_path):
    assert study.run(tmp_path / "rows.jsonl", None, minutes=-1) == 0 and not (tmp_path / "rows.jsonl").exists()


def test_the_tuned_weight_holds_all_that_was_learnt(small, one_thread):
    """Of merged stages the sum of their ranks, in fp32 over a bf16 base; of full fine-tuning the fp32 weights."""
    merged = Condition("merged", rank=2, merges=(2,))
    ranks = {}
    for condition in (merged, Condition("LoRA", rank=2), Condition("full", full=True)):
        trained = study_runs.train(study_runs.copy.deepcopy(small.model), Run(condition, 3e-3, 1), small.train)
        tuned = study_measures.tuned_weights(trained.model, trained.kept)
        assert list(tuned) == study_measures.watched(small.model)
        assert all(t.dtype == torch.float32 for t in tuned.values())
        deltas = [tuned[name] - small.weights[name] for name in tuned]
        ranks[condition.name] = [int(torch.linalg.matrix_rank(d, rtol=1e-3)) for d in deltas]
    assert ranks["LoRA"] == [2] * 4 and ranks["merged"] == [4] * 4 and min(ranks["full"]) > 4, ranks


def test_a_run_that_diverges_is_a_row(small, one_thread, monkeypatch):
    monkeypatch.setattr(
        study_measures,
        "loss_of",
        lambda model, blocks: math.nan * next(p for p in model.parameters() if p.requires_grad).sum(),
    )
    found = small.execute(Run(PAIR[1], 1e-3, 0))
    assert found["validation"] is None and "loss nan" in found["diverged"] and json.loads(json.dumps(found)) == found


def test_the_tables_say_what_the_rows_say():
    """Rates by validation loss, differences by seed, least and largest; a diverged rate is named."""
    own = [
        row("LoRA r=16", -5, 2.5, code=2.0),
        row("LoRA r=16", -4, 2.6, code=1.0),
        row("LoRA r=16", -6, None, code=None),
    ]
    closer = dict(diversity=0.8, perturbation_rank=0.25, intruders=1.0)
    own.append(row("LoRA r=16", -5, 2.5, seed=1, code=2.2, **closer))
    full = [row("full", -8, 2.5, code=1.9), row("full", -8, 2.5, seed=1, code=2.4, **closer)]
    line = next(line for line in study_report.table([*own, *full]).splitlines() if line.startswith("| full"))
    assert "| -0.850 (-1.100 … -0.600) | +0.500 (+0.500 … +0.500) | +0.050 (-0.100 … +0.200) |" in line
    assert "| 0.80 | 0.250 | 1.00 |" in line
    assert "| LoRA r=16 | | diverged | **-0.500** | -0.400 |" in study_report.sweep([*own, *full]).replace(
        "|  |", "| |"
    )
    compared = study_report.comparisons([*own, *full])
    assert "| loss on code: LoRA r=16 less full | -0.050 (-0.200 … +0.100), lower in 1 of 2 |" in compared
    assert "| best rate: LoRA r=16 over full | 31.6 |" in compared


def test_the_published_page_is_what_the_rows_say():
    text = (BENCH.parent / "docs" / "study.md").read_text()
    body = text[text.index(study_report.BEGIN) + len(study_report.BEGIN) : text.index(study_report.END)]
    assert body == f"\n{study_report.section(study.read_rows(study.ROWS))}\n"
