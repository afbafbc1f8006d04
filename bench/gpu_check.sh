#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes: build, tests, sanitizer, benches; a short table last, JSON in OUT.
#
#   OUT=results bash bench/gpu_check.sh              all of it
#   PARTS="build tests" bash bench/gpu_check.sh      some of it: build tests sanitizer bench profile sweep readme full llama
#
# For the image's own PyTorch, without a network: nothing is downloaded. A part that fails is reported in the table and the rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
PARTS=${PARTS:-build tests sanitizer bench}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FUSED_LORA_CUDA=1
declare -a TABLE

part() { # part NAME SECONDS COMMAND...: runs it under a limit, log in OUT/NAME.log
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  echo "== $name"
  timeout -k 10 "$limit" bash -c '"$@"' part "$@" 2>&1 |  # a shell of its own, since a command may be a function of this file
    tee "$OUT/$name.log" | tail -n 25 || rc=$?
  TABLE+=("$(printf '%-10s %-6s %4d s   %s' "$name" "$([ $rc = 0 ] && echo ok || echo "rc $rc")" $((SECONDS - start)) "$(tail -n 1 "$OUT/$name.log" | cut -c1-90)")")
}

run_tests() { # every test that a GPU changes; the compiled kernels first and alone, then eight processes at once: most of their time Triton compiles
  local jobs=() file pytest="$PYTHON -m pytest -v --maxfail=5 -p no:cacheprovider -o faulthandler_timeout=60"
  timeout -k 5 100 $pytest tests/test_gpu.py tests/backends/test_backends.py -k "cuda and not triton" || return # a test that hangs is the log's last line
  for file in $(find tests -name "test_*.py" | sort); do
    case $file in
      */test_packaging.py | */test_house.py | */test_cuda_build.py | */test_cuda_emulated.py | */test_triton_compile.py) ;; # the same without a GPU
      */test_gpu.py) jobs+=("$file -k triton") ;;
      */test_backends.py) for which in "exact and triton" "fp64 and triton" "triton and not exact and not fp64" "not triton and not cuda"; do jobs+=("$file -k '$which'"); done ;;
      *) jobs+=("$file") ;;
    esac
  done
  printf '%s\n' "${jobs[@]}" | xargs -P 8 -d '\n' -I{} bash -c '
    log=$(mktemp) && if eval "timeout -k 5 150 '"$pytest"' {}" >"$log" 2>&1; then tail -n 1 "$log"; else tail -n 60 "$log"; echo "FAILED: {}"; exit 1; fi' &&
    echo "all passed"
}

sanitize() { # sanitize TOOL: the exact tests of both GPU back ends; racecheck may report mbarriers that it does not follow (s.mask, s.tile)
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-regex-exclude kns=at:: "$PYTHON" -m pytest -v -p no:cacheprovider \
    tests/backends/test_backends.py -k "exact_integers and (cuda or triton)"
}

export -f run_tests sanitize
export PYTHON

for name in $PARTS; do
  case $name in
    build) part build 100 "$PYTHON" -m pip install -q --no-build-isolation --no-deps . ;;
    tests) part tests 250 run_tests ;;
    sanitizer) part memcheck 60 sanitize memcheck && part racecheck 60 sanitize racecheck ;;
    bench) part bench 70 "$PYTHON" -m fused_lora bench --device cuda --preset quick --budget 2 --output "$OUT" ;;
    readme) part readme 540 "$PYTHON" -m fused_lora bench --device cuda --preset readme --budget 2 --output "$OUT" --plot "$OUT" --resume ;;
    profile) part profile 120 "$PYTHON" bench/profile_kernels.py "$OUT/profile.json" ;;
    sweep) part sweep 300 "$PYTHON" bench/sweep_triton.py "$OUT/sweep.json" ;;
    full) part full 540 "$PYTHON" -m fused_lora bench --device cuda --preset full --budget 1 --output "$OUT" --resume ;;  # again until all rows are there
    llama) part llama 400 "$PYTHON" bench/bench_llama.py "$OUT/llama.json" ;;
    *) echo "PARTS must be among build tests sanitizer bench profile sweep readme full llama; got $name" >&2 && exit 2 ;;
  esac
done

"$PYTHON" - <<'PY'
import torch, triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
driver = torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else "-"
print(f"\n{name} | driver's CUDA {driver} | torch {torch.__version__} | triton {triton.__version__}")
PY
printf '%s\n' "${TABLE[@]}"
