"""What `fused-lora tune` has written decides under backend="auto", only where it may, and never harms."""

import json
import warnings

import pytest
import torch

from fused_lora import backends, hardware, lora_linear
from fused_lora.backends import Request, pick, tuned
from fused_lora.ops.linear import forget_verdicts
from fused_lora.testing import random_problem

CPU = torch.device("cpu")
TIMES = {"cpu:around": 3.0, "cpu:inside": 2.0, "reference": 4.0}


def row(M=64, N=96, K=80, R=16, dropout=0.0, dtype="float32", **figures):
    """A row of the file: microseconds by candidate, or a fault's name; cpu_inside for cpu:inside."""
    found = {
        name.replace("_", ":"): dict(fault=value, why="") if isinstance(value, str) else dict(us=value)
        for name, value in (figures or TIMES).items()
    }
    sizes = dict(dtype=dtype, adapter_dtype="float32", M=M, N=N, K=K, R=R, dropout=dropout)
    return sizes | dict(candidates=found)


def write(*rows, **environment):
    put(json.dumps(dict(environment=tuned.environment(CPU) | environment, rows=rows)).encode())


def put(content):
    tuned.directory().mkdir(exist_ok=True)
    tuned.path_of(CPU).write_bytes(content)
    forget_verdicts()


def request(M=64, N=96, K=80, R=16, dtype=torch.float32, aligned=True):
    return Request(CPU, dtype, torch.float32, backends.bucket(M), N, K, R, aligned, ())


def candidates():
    return backends.candidates(backends.line(CPU), request())


def served(**change):
    back_end, plan = pick("auto", request(**change))
    name = back_end.__name__.rpartition(".")[2]
    return f"{name}:{plan}" if plan else name


def test_the_fastest_that_is_right_serves(cache):
    safe = served()
    for first in TIMES:
        write(row(**{name.replace(":", "_"): 1.0 if name == first else 9.0 for name in TIMES}))
        assert served() == first
    write(row(M=1024, reference=1.0))
    assert served() == safe


def test_what_failed_never_serves(cache):
    write(row(cpu_inside="wrong", cpu_around=5.0, reference=9.0))
    assert served() == "cpu:around"
    write(row(cpu_inside=1.0, cpu_around="crashed", reference=9.0), row(cpu_inside="hung", reference=9.0, dropout=0.1))
    assert served() == "reference"  # neither with dropout nor without
    write(row(**{name.replace(":", "_"): "wrong" for name in candidates()}))
    assert served() == "reference"  # the last resort


def test_the_sum_over_both_dropouts_decides(cache):
    write(row(cpu_inside=1.0, cpu_around=3.0), row(cpu_inside=9.0, cpu_around=3.0, dropout=0.1))
    assert served() == "cpu:around"


@pytest.mark.parametrize(
    "change, near",
    [
        (dict(M=33), True),
        (dict(M=128), True),
        (dict(M=129), False),
        (dict(M=0), False),
        (dict(N=192, K=40), True),
        (dict(N=193), False),
        (dict(K=39), False),
        (dict(R=9), True),
        (dict(R=8), False),
        (dict(R=17), False),
        (dict(dtype=torch.float16), False),
    ],
)
def test_only_a_shape_near_by_is_judged_alike(cache, change, near):
    write(row(reference=1.0, cpu_inside=2.0, cpu_around=3.0))
    assert (served(**change) == "reference") == near


def test_the_nearest_shape_decides(cache):
    write(row(M=64, reference=1.0), row(M=256, cpu_around=1.0))
    assert served(M=128, N=97) in ("reference", "cpu:around")
    write(row(N=90, reference=1.0), row(N=150, cpu_around=1.0), row(N=96, R=8, cpu_inside=1.0))
    assert served(N=96) == "reference" and served(N=140) == "cpu:around"


def test_what_failed_somewhere_serves_nothing_that_was_not_tuned(cache):
    safe = served()
    write(row(**{safe.replace(":", "_"): "crashed", "reference": 1.0}))
    assert served(M=4096) not in (safe, "reference")
    assert served(M=4096, dtype=torch.float16) == "cpu:around"  # of another dtype it says nothing


def test_what_does_not_serve_the_request_is_passed_over(cache):
    """A plan of another build, or one that is not for this dtype."""
    figures = dict(cpu_inside=1.0, cpu_magic=0.5, cuda=0.1, cpu_around=2.0)
    write(row(**figures), row(dtype="float16", **figures))
    assert served() == "cpu:inside" and served(dtype=torch.float16) == "cpu:around"


@pytest.mark.parametrize(
    "change", [dict(torch="2.0"), dict(threads=99), dict(device="i486"), dict(kernels=""), dict(features=dict(amx=3))]
)
def test_another_environment_is_ignored_and_says_why(cache, change):
    name = next(iter(change))
    write(row(reference=1.0), **change)
    assert served() != "reference"
    assert tuned.load(CPU).ignored.startswith(f"{name} was {change[name]!r}, is ")


def test_the_number_of_threads_and_the_cpu_s_generation_have_files_of_their_own(cache, monkeypatch, tmp_path):
    """Guests are told "AMD EPYC" of every generation."""
    before = torch.get_num_threads()
    write(row(reference=1.0))
    assert served() == "reference"
    try:
        torch.set_num_threads(before + 1)
        assert tuned.load(CPU).ignored == "there is none" and served(M=32) != "reference"
    finally:
        torch.set_num_threads(before)
    other = tmp_path / "cpuinfo"
    text = "vendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: avx2\n"
    monkeypatch.setattr(hardware, "_CPUINFO", other)
    paths = []
    for family in (25, 26):
        other.write_text(text.format(family))
        paths.append((tuned.path_of(CPU), tuned.environment(CPU)["device"]))
    assert len(set(paths)) == 2 and paths[0][1] == "AMD EPYC (family 25 model 2, avx2)"


def test_it_can_be_switched_off(cache, monkeypatch):
    write(row(reference=1.0))
    assert served() == "reference"
    monkeypatch.setenv("FUSED_LORA_TUNED", "0")
    forget_verdicts()
    assert served() != "reference" and tuned.load(CPU).ignored == "FUSED_LORA_TUNED is 0"


BAD_ROWS = [3, [3], [{}], None, {"a": 1}]
BAD_ROWS += [[row() | change] for change in (dict(M=0), dict(M=float("inf")), dict(N="x"), dict(candidates=[3]))]
BAD_ROWS += [[row() | dict(candidates=candidates)] for candidates in (None, dict(reference=dict(us="x")))]


@pytest.mark.parametrize("rows", BAD_ROWS, ids=repr)
def test_bad_rows_are_ignored_with_one_warning(cache, rows):
    _check_ignored(json.dumps(dict(environment=tuned.environment(CPU), rows=rows)).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100000, b"3", b'{"environment": 3}', b"\xff"])
def test_a_damaged_file_is_ignored_with_one_warning(cache, text):
    _check_ignored(text)


def _check_ignored(content):
    safe = served()
    put(content)
    with pytest.warns(UserWarning, match="is ignored, it is no file of") as seen:
        assert served() == safe and served(M=512)
    assert len(seen) == 1 and tuned.load(CPU).ignored.startswith("damaged (")


def test_without_a_file_nothing_is_said(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served()
    assert tuned.load(CPU).ignored == "there is none"


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path))
    assert tuned.directory() == tmp_path
    monkeypatch.delenv("FUSED_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.directory() == tmp_path / "fused-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.directory() == tmp_path / ".cache" / "fused-lora"


def test_a_call_asks_once(cache, monkeypatch):
    """The file's cost falls into the first call of a kind; a named back end does not ask."""
    asked, real = [], tuned.choose
    monkeypatch.setattr(tuned, "choose", lambda *given: asked.append(given) or real(*given))
    p = random_problem(8, 16, 24, 4)
    for backend, count in (("auto", 1), ("cpu", 1), ("auto", 1)):
        for _ in range(3):
            x = p.x.clone().requires_grad_()
            lora_linear(x, p.weight, p.lora_A, p.lora_B, 1.0, backend=backend).backward(p.dy)
        assert len(asked) == count
