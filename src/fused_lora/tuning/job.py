"""The run: every candidate checked at every case, the right ones timed, one file that is whole after each case."""

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora import backends
from fused_lora.backends import Request, bucket, tuned
from fused_lora.bench.cases import Case
from fused_lora.files import claimed, write_json
from fused_lora.hardware import gpu_clocks
from fused_lora.ops.linear import forget_verdicts
from fused_lora.tuning.jail import Jail
from fused_lora.tuning.problems import DROPOUTS, cases_for

_ADAPTER_DTYPE = torch.float32  # LoRALinear's own choice over every base
_TIME_LIMIT_S = {"cpu": 20.0, "cuda": 120.0}  # on a GPU, Triton compiles meanwhile
_PATIENCE = 10  # times the limit, for what is PyTorch's own or takes many passes
_GIVEN_UP_AFTER = 3  # faults of a candidate with one dtype

# Called after each case: how many are done, of how many, the case, and its row (None: it could not be checked here).
Progress = Callable[[int, int, Case, dict | None], None]


def tune(
    model: nn.Module | str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtypes: Iterable[torch.dtype] = (),
    rows: Iterable[int] = (),
    ranks: Iterable[int] = (),
    dropouts: Iterable[float] = DROPOUTS,
    time_limit_s: float | None = None,
    budget_s: float = 1.0,
    again: bool = False,
    progress: Progress = lambda done, total, case, row: None,
    say: Callable[[str], None] = lambda line: None,
    setup: str = "",
) -> dict:
    """Find out which back end and plan is right and fastest here, for backend="auto" to take from now on.

    Each candidate is checked in a process of its own against exact integers, fp64 and itself, with and without dropout,
    forward and backward; what crashes, hangs or is wrong costs that candidate alone. Those that are right are timed,
    interleaved. The file in the user's cache directory (`backends.tuned`) is whole after every case; what it holds for
    this environment already is not measured again.

    Args:
        model: a model, or the path or id of one, for the shapes of its linear layers; None takes the benchmark's.
        device: cpu or cuda; the model's where that has one, else cuda where there is one.
        dtypes: of x and the weight; fp32 and bf16 on a CPU, bf16 on a GPU where empty. Adapters are in fp32.
        rows: numbers of rows of x; a verdict holds up to twice and down to half as many.
        ranks: of the adapters; those in the model, else 16, where empty.
        dropouts: probabilities of LoRA dropout.
        time_limit_s: for one check of one candidate, after which it counts as hung; 20 s on a CPU, 120 s on a GPU.
        budget_s: seconds of timing a case, at the most unless other processes disturb it.
        again: measure again what the file holds.
        progress, say: called after each case, and with a line where there is something to tell.
        setup: Python code that the processes run first, such as an import that registers something.
    Returns: the document that the file holds.
    Raises: ValueError for a bad argument, OSError if the file cannot be written or another run is at work.
    """
    for name, several in (("dtypes", dtypes), ("rows", rows), ("ranks", ranks), ("dropouts", dropouts)):
        if not isinstance(several, Iterable) or isinstance(several, str):
            raise ValueError(f"{name} must be a list; got {several!r}")
    dtypes, rows, ranks, dropouts = tuple(dtypes), tuple(rows), tuple(ranks), tuple(dropouts)  # gone through often
    where = chosen_device(device, model)
    _check_numbers(rows, ranks, dropouts, dtypes, time_limit_s, budget_s)
    cases = cases_for(model, where.type, dtypes, rows, ranks, dropouts)
    path = tuned.path_of(where)
    limit_s = time_limit_s or _TIME_LIMIT_S[where.type]
    with claimed(path.parent, say), _Trial(where, limit_s, budget_s, setup) as trial:
        document = _document(path, where)
        try:
            for done, case in enumerate(cases):
                row = next((row for row in document["rows"] if _is_of(row, case)), None)
                names = candidates_for(case, where)
                if again or row is None or set(row["candidates"]) != set(names):
                    row = trial.row(case, names)
                    document["rows"] = [each for each in document["rows"] if not _is_of(each, case)]
                    document["rows"] += [] if row is None else [row]
                    write_json(path, document)
                progress(done + 1, len(cases), case, row)
        finally:
            forget_verdicts()
    return document


def candidates_for(case: Case, device: torch.device) -> tuple[str, ...]:
    """Every back end that serves the case, with each of its plans."""
    sizes = (bucket(case.M), case.N, case.K, case.R)
    return backends.candidates(
        backends.line(device), Request(device, case.dtype, _ADAPTER_DTYPE, *sizes, aligned=True, optional=())
    )


class _Trial:
    """Candidates before the judge: a process for those of a back end, new after every fault, and one for the race."""

    def __init__(self, device: torch.device, limit_s: float, budget_s: float, setup: str):
        self._device, self._limit_s, self._budget_s = device, limit_s, budget_s
        self._setup, self._threads = setup, torch.get_num_threads()
        self._jails: dict[str, Jail] = {}
        self._prepared: dict[str, Case] = {}  # by jail: of which case it knows what is right
        self._faults: Counter[tuple[str, torch.dtype]] = Counter()

    def __enter__(self) -> "_Trial":
        return self

    def __exit__(self, *_: object) -> None:
        for jail in self._jails.values():
            jail.close()

    def row(self, case: Case, names: tuple[str, ...]) -> dict | None:
        """What was found out at a case; None if PyTorch itself cannot compute it here, within memory and time."""
        found: dict[str, dict] = {}
        for name in names:
            found[name] = {}
            if self._faults[name, case.dtype] >= _GIVEN_UP_AFTER:
                found[name] = dict(fault="not tried", why=f"it has failed {_GIVEN_UP_AFTER} times with this dtype")
                continue
            back_end = name.partition(":")[0]
            if self._prepared.get(back_end) != case:
                if self._ask(back_end, case, self._limit_s * _PATIENCE, do="prepare"):
                    return None
                self._prepared[back_end] = case
            found[name] = self._ask(back_end, case, self._limit_s, do="check", candidate=name)
        times, failed = self._raced(case, [name for name in names if not found[name]])
        found |= failed
        for name, figures in found.items():
            self._faults[name, case.dtype] += figures.get("fault", "not tried") not in ("not tried", "does not fit")
        sizes = dict(M=bucket(case.M), N=case.N, K=case.K, R=case.R, dropout=case.dropout, rows=case.M)
        row = dict(dtype=_name(case.dtype), adapter_dtype=_name(_ADAPTER_DTYPE)) | sizes
        if self._device.type == "cuda":
            row |= gpu_clocks(self._device.index)
        return row | dict(frozen=times.pop("frozen", {}), candidates=found | times)

    def _ask(self, jail: str, case: Case, limit_s: float, **request: Any) -> dict:
        if jail not in self._jails:
            self._jails[jail] = Jail(str(self._device), self._threads, self._setup)
        answer = self._jails[jail].ask(request | dict(case=case.facts()), limit_s)
        if "fault" in answer:  # whose process may be another from now on
            self._prepared.pop(jail, None)
        return answer

    def _raced(self, case: Case, names: list[str], budget_s: float | None = None) -> tuple[dict, dict]:
        """(Times of the candidates and of the frozen layer, faults of those that fail only now)."""
        request = dict(do="race", candidates=names, budget_s=self._budget_s if budget_s is None else budget_s)
        answer = self._ask("race", case, self._limit_s * _PATIENCE + 3 * self._budget_s, **request)
        if "times" in answer:
            return answer["times"], {}
        if len(names) < 2:
            return {}, dict.fromkeys(names, answer)
        failed: dict[str, dict] = {}
        for name in names:  # who is it?
            failed |= self._raced(case, [name], 0.0)[1]
        right = [name for name in names if name not in failed]
        if not failed:  # each alone does it: nothing is known of their times
            return {}, {}
        times, others = self._raced(case, right)
        return times, failed | others


def chosen_device(device: str | torch.device | None, model: object = None) -> torch.device:
    """The device to tune on: the given one, the model's, or what there is.

    Raises: ValueError if it is neither a CPU nor a GPU that PyTorch sees.
    """
    if device is None:
        own = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        there = own is not None and own.device.type != "meta"
        device = own.device if own is not None and there else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:<index>; got {device!r}") from None
    if device.type not in _TIME_LIMIT_S or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where PyTorch sees a GPU; got {str(device)!r}")
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device("cpu")


def _check_numbers(rows, ranks, dropouts, dtypes, time_limit_s, budget_s) -> None:
    for name, values in (("rows", rows), ("ranks", ranks)):
        if not all(isinstance(value, int) and value >= 1 for value in values):
            raise ValueError(f"{name} must be 1 or more each; got {list(values)}")
    if not dropouts or not all(0 <= p < 1 for p in dropouts):
        raise ValueError(f"dropouts must be in [0, 1), at least one; got {list(dropouts)}")
    if not all(dtype in backends.FUSED_DTYPES for dtype in dtypes):
        raise ValueError(f"dtypes must be bfloat16, float16 or float32; got {list(dtypes)}")
    if time_limit_s is not None and not 0 < time_limit_s < 1e6:
        raise ValueError(f"time_limit_s must be a positive number of seconds; got {time_limit_s}")
    if not 0 <= budget_s < 1e6:
        raise ValueError(f"budget_s must be a number of seconds, 0 or more; got {budget_s}")


def _document(path: Path, device: torch.device) -> dict:
    """The file's document if it is of this environment and sound, else a new one."""
    environment, rows = tuned.environment(device), []
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["environment"] == environment:
            tuned.verdicts(old["rows"])
            rows = old["rows"]
    return dict(environment=environment, date=datetime.date.today().isoformat(), rows=rows)


def _is_of(row: dict, case: Case) -> bool:
    key = (_name(case.dtype), _name(_ADAPTER_DTYPE), bucket(case.M), case.N, case.K, case.R, case.dropout)
    return tuple(row[name] for name in ("dtype", "adapter_dtype", "M", "N", "K", "R", "dropout")) == key


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
