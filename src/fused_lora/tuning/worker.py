"""The process in which candidates run, so that a crash or a hang of theirs is this process's alone.

It takes lines of JSON on its standard input and answers each with one: {} where all is well, {"fault", "why"}, or
{"times"}. What a candidate prints goes to standard error.
"""

import faulthandler
import json
import os
import sys
from typing import Any

import torch

from fused_lora.bench.cases import Case
from fused_lora.models import out_of_memory
from fused_lora.tuning.check import Expected, Wrong, check, expected
from fused_lora.tuning.race import race

_GRACE_S = 30.0  # beyond the limit that the other end keeps, for when there is no other end any more


def case_of(facts: dict[str, Any]) -> Case:
    """The case whose `facts` these are."""
    return Case(**facts | dict(dtype=getattr(torch, facts["dtype"])))


def serve(device: str, threads: int) -> None:
    """Answer requests until standard input ends.

    Args:
        device: where candidates run.
        threads: of a CPU.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if device != "cpu":
        torch.get_device_module(device).set_device(torch.device(device))
    else:
        torch.set_num_threads(threads)
    want: list[Expected] = []

    def answer(request: dict) -> dict:
        case = case_of(request["case"])
        if request["do"] == "prepare":
            want[:] = [expected(case, device)]
        elif request["do"] == "check":
            check(request["candidate"], want[0])
        else:
            return dict(times=race(request["candidates"], case, device, request["budget_s"]))
        return {}

    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["limit_s"] + _GRACE_S, exit=True)
        try:
            found = answer(request)
        except Wrong as error:
            found = dict(fault=error.fault, why=error.why)
        except Exception as error:
            kind = "does not fit" if out_of_memory(error) else "failed"
            found = dict(fault=kind, why=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), file=answers, flush=True)
