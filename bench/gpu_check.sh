#!/usr/bin/env bash
# Everything that needs a GPU: build, kernels one by one, tests, sanitizer, benches; a short table last, JSON in OUT.
#
#   OUT=results bash bench/gpu_check.sh              all of it
#   PARTS="build bringup" bash bench/gpu_check.sh    some of it: build bringup tests sanitizer toolkit racecheck bench plans profile sweep readme full llama
#
# Each call fits ten minutes: what is right first (the default), then the benches, a call each. FUSED_LORA_PTXAS names another assembler than the
# toolkit's: then Triton takes it, too, and the part `toolkit` repeats the kernels' tests as the toolkit's and Triton's own assemble them.
# FUSED_LORA_SPIN_LIMIT=50000000 makes a wait that hangs say where (docs/install.md).
#
# For the image's own PyTorch, without a network: nothing is downloaded. A part that fails is reported in the table and the rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
PARTS=${PARTS:-build bringup tests sanitizer${FUSED_LORA_PTXAS:+ toolkit}}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FUSED_LORA_CUDA=1
[ -n "${FUSED_LORA_PTXAS:-}" ] && export TRITON_PTXAS_PATH=${TRITON_PTXAS_PATH:-$FUSED_LORA_PTXAS}
declare -a TABLE

part() { # part NAME SECONDS COMMAND...: runs it under a limit in a session of its own, log in OUT/NAME.log; nothing of it is left when it ends
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  echo "== $name"
  # a shell of its own, since a command may be a function of this file; it ends what is left of its session, which would hold the pipe open
  setsid --wait bash -c 'timeout -k 10 "$@"; rc=$?; for p in $(pgrep -s $$); do [ "$p" = $$ ] || kill -KILL "$p" 2>/dev/null; done; exit $rc' \
    part "$limit" bash -c '"$@"' part "$@" 2>&1 |
    tee "$OUT/$name.log" | tail -n 25 || rc=$?
  TABLE+=("$(printf '%-10s %-6s %4d s   %s' "$name" "$([ $rc = 0 ] && echo ok || echo "rc $rc")" $((SECONDS - start)) "$(tail -n 1 "$OUT/$name.log" | cut -c1-90)")")
}

bring_up() { # the kernels without torch, smallest first: bench/bringup/bringup.cpp
  local cuda folder objects
  cuda=$(cd "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")/.." && pwd)
  folder=$(find build -type d -path '*/cuda/csrc/cuda' | head -n 1) # the build part's objects
  objects=$(find "$folder" -name '*.o' ! -name 'bindings*')
  c++ -std=c++20 -O2 -Icsrc -I"$cuda/include" bench/bringup/*.cpp $objects -o "$OUT/bringup" \
    -L"$(dirname "$(find -L "$cuda" -name libcudart_static.a | head -n 1)")" -lcudart_static -lrt -ldl -lpthread && "$OUT/bringup"
}

tests_here() { # the test files that a GPU changes and whose packages are there, with a word on each that is left out
  "$PYTHON" - <<'PY'
import ast, importlib.util, pathlib, sys
ELSEWHERE = {"test_packaging.py", "test_house.py", "test_cuda_build.py", "test_cuda_emulated.py", "test_bringup.py", "test_triton_compile.py"}
helpers = {path.stem: path for path in pathlib.Path("tests").rglob("*.py")}

def missing(path, seen):
    lacking = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in (name.partition(".")[0] for name in names):
            if name in helpers and name not in seen:
                lacking |= missing(helpers[name], seen | {name})
            elif name not in helpers and importlib.util.find_spec(name) is None:
                lacking.add(name)
    return lacking

for path in sorted(pathlib.Path("tests").rglob("test_*.py")):
    lacking = missing(path, {path.stem})
    if path.name in ELSEWHERE:
        continue
    if lacking:
        print(f"left out: {path} (needs {', '.join(sorted(lacking))})", file=sys.stderr)
    else:
        print(path)
PY
}

pytest_here() { # the command of pytest, with a limit for each test where the plugin for it is
  echo "$PYTHON -m pytest -q --maxfail=3 -p no:cacheprovider$("$PYTHON" -c 'import pytest_timeout' 2>/dev/null && echo ' --timeout=60')"
}

compiled_tests() { # the compiled kernels alone, a process for each test function, since an illegal access spoils all that comes after it
  local jobs=() file pytest
  pytest=$(pytest_here)
  for file in tests/test_gpu.py tests/backends/test_backends.py; do
    while read -r test; do jobs+=("$test -k 'cuda and not triton'"); done < <($pytest --collect-only "$file" -k "cuda and not triton" | sed -n 's/\(::[^[]*\).*/\1/p' | sort -u)
  done
  many 4 "$pytest" "${jobs[@]}"
}

run_tests() { # the compiled kernels first, then eight processes at once: most of their time Triton compiles
  local jobs=() file
  compiled_tests || return
  for file in $(tests_here); do
    case $file in
      */test_gpu.py) jobs+=("$file -k triton") ;;
      */test_backends.py) for which in "exact and triton" "fp64 and triton" "triton and not exact and not fp64" "not triton and not cuda"; do jobs+=("$file -k '$which'"); done ;;
      *) jobs+=("$file") ;;
    esac
  done
  many 8 "$(pytest_here)" "${jobs[@]}" && echo "all passed"
}

as_the_toolkit_assembles() { # the kernels' tests over a second build, beside the first, by the assemblers that came with the toolkit and with Triton
  unset FUSED_LORA_PTXAS TRITON_PTXAS_PATH
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$OUT/toolkit" . || return
  export PYTHONPATH=$OUT/toolkit
  compiled_tests && many 2 "$(pytest_here)" "tests/test_gpu.py -k triton" "tests/backends/test_backends.py -k 'exact and triton'" && echo "all passed"
}

many() { # many COUNT PYTEST JOB...: the jobs, COUNT at a time; each says how it ended, and the log's end if it failed
  local count=$1 pytest=$2
  shift 2
  [ $# -gt 0 ] || { echo "no test was found" && return 1; }
  printf '%s\n' "$@" | xargs -P "$count" -d '\n' -I{} bash -c '
    log=$(mktemp); eval "timeout -k 5 150 '"$pytest"' {}" >"$log" 2>&1; rc=$?
    if [ $rc = 0 ] || [ $rc = 5 ]; then echo "$(tail -n 1 "$log")  {}"; else tail -n 60 "$log"; echo "FAILED (rc $rc): {}"; exit 1; fi'
}

sanitize() { # sanitize TOOL: the exact tests of the compiled kernels; racecheck may report mbarriers that it does not follow (s.mask, s.tile)
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name-exclude kns=_ZN2at "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/backends/test_backends.py -k "exact_integers and cuda"
}

# What the heuristics choose, and what differs from it in one respect.
PLANS=triton,triton:no_prefetch,triton:one_launch,cuda,cuda:h_shrink,cuda:h_single+dh_single,cuda:wgrad_apart,cuda:dh_shrink,cuda:serial

export -f bring_up tests_here pytest_here compiled_tests run_tests as_the_toolkit_assembles many sanitize
export PYTHON OUT

watch_clocks() { # clocks, power and what throttles, a line a second beside the figures
  command -v nvidia-smi >/dev/null || return
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active --format=csv,noheader -l 1 >"$OUT/clocks.csv" 2>&1 &
  trap "kill $! 2>/dev/null" EXIT
}
watch_clocks

for name in $PARTS; do
  case $name in
    build) part build 200 "$PYTHON" -m pip install -v --no-build-isolation --no-deps . ;;
    bringup) part bringup 280 bring_up ;;
    tests) part tests 300 run_tests ;;
    sanitizer) part memcheck 160 sanitize memcheck && part synccheck 160 sanitize synccheck ;;
    toolkit) [ -n "${FUSED_LORA_PTXAS:-}" ] || { echo "toolkit needs FUSED_LORA_PTXAS, another assembler than the toolkit's" >&2 && exit 2; }
      part toolkit 400 as_the_toolkit_assembles ;;
    racecheck) part racecheck 300 sanitize racecheck ;;
    bench) part bench 180 "$PYTHON" -m fused_lora bench --device cuda --preset quick --candidates "frozen,addmm,$PLANS" --budget 2 --output "$OUT" ;;
    plans) # every plan of both back ends, each checked first, at the sizes that decide; what is done is kept: again for the rest
      FUSED_LORA_CACHE=$OUT part plans 540 "$PYTHON" -m fused_lora tune --device cuda --rows 16,512,2048,8192 --r 16,64 --time-limit 60 ;;
    readme) part readme 540 "$PYTHON" -m fused_lora bench --device cuda --preset readme --budget 2 --output "$OUT" --plot "$OUT" --resume ;;
    profile) part profile 120 "$PYTHON" bench/profile_kernels.py "$OUT/profile.json" ;;
    sweep) part sweep 300 "$PYTHON" bench/sweep_triton.py "$OUT/sweep.json" ;;
    full) part full 540 "$PYTHON" -m fused_lora bench --device cuda --preset full --budget 1 --output "$OUT" --resume ;;  # again until all rows are there
    llama) part llama 400 "$PYTHON" bench/bench_llama.py "$OUT/llama.json" ;;
    *) echo "PARTS must be among build bringup tests sanitizer toolkit racecheck bench plans profile sweep readme full llama; got $name" >&2 && exit 2 ;;
  esac
done

"$PYTHON" - <<'PY'
import torch, triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
driver = torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else "-"
print(f"\n{name} | driver's CUDA {driver} | torch {torch.__version__} | triton {triton.__version__}")
PY
printf '%s\n' "${TABLE[@]}"
