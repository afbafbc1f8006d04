"""The claims of LoRA's literature at the size of one laptop core: SmolLM2-135M on Python's standard library.

Usage: python bench/study.py run [--minutes N] [--only CONDITION]   does what is missing, run by run
       python bench/study.py report                                 writes the table and the plot of docs/study.md

The protocol, fixed before the first run:

* Every run trains a fresh copy of the packaged model on 8,192 tokens in blocks of 128 (which ones is the seed's
  choice): 32 steps of 2 blocks, or 8 steps of 8 in the two conditions of the batch-size question.
* The base is bf16, adapters and their optimizers fp32, alpha 32 with the scaling alpha/r. Full fine-tuning keeps fp32
  weights, of which AdamW changes all (embeddings and norms too), and computes with their bf16 rounding.
* All: warm-up over an eighth of the steps, then a constant rate; gradient norm clipped to 1 (LoRA-RITE: by its own
  measure); no weight decay, no dropout.
* Learning rates: for each condition three half powers of ten around what its source advises (LoRA-RITE four), with
  seed 0, and further ones, three at most, while the best lies at an edge. The best is that of the lowest loss on the
  *validation* text. Then seeds 1 and 2 at that rate, at the very end 3 and 4. Seeds change the start of the adapter
  and the blocks.
* Reported: the loss on the *code* text (learning) and on the *English* text (forgetting), which no choice looks at.
  Validation and code are held-out files of the standard library, alternately; the English text is prose from the
  proceedings of the Library of Congress's Workshop on Electronic Texts of 1992, a work of the US government.
* The runs of seeds above 0 also measure samples (distinct pairs of tokens, 6 samples of 12 tokens of 2 prompts) and
  the change of two kinds of weights in two layers: perturbation rank at 90 % and intruders among the top 10 (0.5).
* Order: all sweeps, then the seeds, then the two conditions of batch 8, then seeds 3 and 4 of everything. A run whose
  loss or gradient is not finite has diverged, and counts as worse than any other.
* The control, LoRA at the rate that many of its variants took, was added once the first two stages had been looked at.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import study_report
import torch
from study_plan import CONDITIONS, next_run
from study_runs import Study

from fused_lora import data
from fused_lora.files import write_whole
from fused_lora.models import load_model, packaged_model

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "bench" / "results" / "study-rows.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def packaged_study() -> Study:
    """The study's model and data. Raises: ValueError if the packaged model is not installed."""
    model, tokenizer = load_model(packaged_model(), torch.bfloat16, "cpu")
    return Study(model, tokenizer, data.split(data.stdlib_documents()))


def run(
    path: Path,
    make_study: Callable[[], Study] = packaged_study,
    minutes: float = float("inf"),
    only: str | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Do the runs that are missing until the plan is done, or the next one would probably pass the limit.

    Args: path: of the rows, a JSON line a run; make_study: loads model and data; only: a condition's name.
    Returns: how many runs were done.
    """
    stages = [[c for c in CONDITIONS if c.name == only]] if only else None
    limit, longest, done, study = time.perf_counter() + 60 * minutes, 0.0, 0, None
    rows = read_rows(path)
    while (planned := next_run(rows, stages) if stages else next_run(rows)) is not None:
        if time.perf_counter() + longest > limit:
            break
        study = study or make_study()
        row = study.execute(planned)
        rows.append(row)
        write_whole({path: "".join(json.dumps(r) + "\n" for r in rows).encode()})
        done, longest = done + 1, max(longest, row["seconds"])
        say(f"{row['condition']}, lr {row['lr']:g}, seed {row['seed']}: validation {row['validation']}")
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", choices=[c.name for c in CONDITIONS])
    given = parser.parse_args()
    if given.command == "run":
        run(ROWS, minutes=given.minutes, only=given.only)
    else:
        study_report.write(read_rows(ROWS), ROOT / "docs" / "study.md")
