"""pytest-benchmark over the layer: forward + backward of every candidate, grouped by case.

    pytest bench/bench_lora_linear.py --benchmark-group-by=group            times
    pytest bench --benchmark-disable                                        as a test: every candidate is checked, none
                                                                            timed

`fused-lora bench` interleaves its candidates, which is what published ratios come from; this suite is for comparing
commits (--benchmark-save, --benchmark-compare).
"""

import pytest
import torch

from fused_lora.bench import CANDIDATES, cases_of
from fused_lora.bench.runner import check, held_bytes, outcome
from fused_lora.testing import random_problem, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Dropout masks differ between candidates, so those cases have no common truth to be checked against here.
CASES = [case for case in cases_of("quick", DEVICE) if not case.dropout]


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "compile"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_backward(benchmark, case, name):
    p = random_problem(case.M, case.N, case.K, case.R, case.dtype, torch.float32, device=DEVICE)
    made = CANDIDATES[name](p, 0.0)
    if name == "frozen":
        p.lora_B.zero_()
    error = check(name, outcome(made, p), truth(p), case.dtype)
    benchmark.group = case.name
    benchmark.extra_info.update(
        device=DEVICE,
        torch=torch.__version__,
        max_error=error,
        held_bytes=held_bytes(made, p),
        gflop=case.flops() / 1e9,
    )
    x = p.x.clone().requires_grad_()

    def step():
        for leaf in (x, *made.leaves):
            leaf.grad = None
        made.forward(x).backward(p.dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
