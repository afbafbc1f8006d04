"""`fused-lora tune`: options to arguments, what is shown and cleared, in 80 columns."""

import json

import pytest
import torch

from fused_lora.backends import tuned
from fused_lora.bench.cases import Case
from fused_lora.models import PACKAGED, packaged_model
from fused_lora.ops.linear import forget_verdicts
from fused_lora.tuning import job

CPU = torch.device("cpu")
RIGHT = dict(low_us=1.0, high_us=3.0, ratio_low=1.0, ratio_high=1.1, rounds=9)


def row(dropout=0.0, **faults):
    """A row of the file: cpu:inside takes 2 us with dropout and without, cpu:around 3 us, frozen 1.6 us."""
    candidates = {
        "cpu:inside": RIGHT | dict(us=2.0, ratio=1.25),
        "cpu:around": RIGHT | dict(us=3.0, ratio=1.875),
        "reference": dict(fault="hung", why="no answer within 2 s"),
    }
    sizes = dict(dtype="bfloat16", adapter_dtype="float32", M=64, N=14336, K=4096, R=16, dropout=dropout, rows=50)
    return sizes | dict(frozen=dict(us=1.6), candidates=candidates)


@pytest.fixture
def written(cache):
    """A file of two rows."""
    document = dict(environment=tuned.environment(CPU), date="2026-11-26", rows=[row(), row(0.1)])
    cache.mkdir()
    tuned.path_of(CPU).write_text(json.dumps(document))
    return tuned.path_of(CPU)


@pytest.fixture
def job_given(monkeypatch):
    """What the command gives to `tune`, which measures nothing."""
    given = {}

    def fake(model, *, progress, say, **options):
        given.update(options, model=model)
        case = Case(50, 4096, 14336, 16, 0.0, torch.bfloat16)
        progress(1, 2, case, row())
        progress(2, 2, case, None)
        return dict(rows=[row(), row(0.1)])

    monkeypatch.setattr(job, "tune", fake)
    return given


def test_options_reach_the_run(cache, job_given, call):
    call("tune", "--device", "cpu")
    assert job_given["model"] is None and job_given["device"] == CPU and not job_given["again"]
    assert job_given["dtypes"] == job_given["rows"] == job_given["ranks"] == ()
    assert job_given["dropouts"] == (0.0, 0.1) and job_given["time_limit_s"] is None
    call(
        "tune", "--model", "packaged", "--dtype", "fp16,bf16", "--rows", "1, 512", "--r", "8", "--no-dropout", "--again"
    )
    assert job_given["model"] == packaged_model() and job_given["dtypes"] == (torch.float16, torch.bfloat16)
    assert job_given["rows"] == (1, 512) and job_given["ranks"] == (8,) and job_given["dropouts"] == (0.0,)
    assert job_given["again"]
    call("tune", "--model", PACKAGED)
    assert job_given["model"] == packaged_model()
    call("tune", "--time-limit", "3", "--budget", "0.5")
    assert job_given["time_limit_s"] == 3.0 and job_given["budget_s"] == 0.5


def test_it_says_what_it_does_and_what_it_found(cache, job_given, call):
    said, _ = call("tune", "--device", "cpu")
    lines = said.splitlines()
    assert lines[0].startswith("1 of 2: bfloat16 M=50") and "not tuned, PyTorch itself cannot" in said
    assert "bf16   64  4096->14336  16  cpu:inside     1.250  cpu:around  50.0 %       1" in lines
    fault = "reference at bfloat16 M=50 4096->14336 R=16 p={}: hung, no answer within 2 s"
    assert fault.format("0") in lines and fault.format("0.1") in lines
    assert lines[-1] == f"wrote {tuned.path_of(CPU)}"
    assert all(len(line) <= 80 for line in lines if not line.startswith(("wrote", "reference", "bfloat16", "2 of")))


def test_a_switched_off_file_is_said(cache, job_given, call, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_TUNED", "0")
    assert "FUSED_LORA_TUNED is 0: it will not count" in call("tune", "--device", "cpu")[0]


def test_show_and_clear(written, job_given, call):
    said, _ = call("tune", "--device", "cpu", "--show")
    assert said.startswith(f"{written}, 2026-11-26\n") and "cpu:inside     1.250" in said and not job_given
    assert call("tune", "--device", "cpu", "--clear")[0] == f"removed {written}\n" and not written.exists()
    assert call("tune", "--device", "cpu", "--clear")[0] == f"there is no {written}\n"
    assert call("tune", "--device", "cpu", "--show")[0] == f"{written}: there is none\n" and not job_given


def test_show_says_why_a_file_does_not_count(written, call):
    document = json.loads(written.read_text())
    document["environment"]["torch"] = "0.4"
    written.write_text(json.dumps(document))
    assert f"{written}: torch was '0.4', is '{torch.__version__}'" in call("tune", "--device", "cpu", "--show")[0]


def test_a_damaged_file_is_said_once(written, call, recwarn):
    written.write_text("{")
    assert call("tune", "--device", "cpu", "--show")[0].startswith(f"{written}: damaged (JSONDecodeError: ")
    assert "damaged" in "".join(call("info")[0].split()) and not recwarn.list


def test_info_has_a_line_of_it(written, call):
    squeezed = "".join(call("info")[0].split())  # long paths wrap anywhere
    assert f"tunedcpu:{written},2026-11-26,2cases,2failures" in squeezed
    written.unlink()
    forget_verdicts()
    assert "tuned cpu: nothing yet; `fused-lora tune` finds out" in " ".join(call("info")[0].split())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dtype", "fp8"], "--dtype must be of fp32, bf16, fp16, with commas between; got 'fp8'"),
        (["--rows", "1,x"], "--rows must be whole numbers, with commas between; got '1,x'"),
        (["--rows", ""], "--rows must not be empty"),
        (["--r", "0"], "--r must be 1 or more each; got [0]"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--time-limit", "0"], "--time-limit must be a positive number"),
        (["--budget", "-1"], "--budget must be a number of seconds"),
        (["--rows", "0"], "--rows must be 1 or more"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "owner/nowhere"], "owner/nowhere is no directory here, and as a model id: "),
        (["--show", "--clear"], "--show measures nothing and must be given alone, or with --device; got --clear, too"),
        (["--clear", "--again"], "--clear measures nothing"),
        (["--show", "--rows", "5"], "got --rows, too"),
    ],
)
def test_bad_options_are_refused(cache, refused, options, words):
    code = 1 if "/nowhere" in options[-1] else 2
    assert words in refused(code, "tune", "--device", "cpu", *options) and not cache.exists()
