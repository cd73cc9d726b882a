#!/usr/bin/env bash
# One visit to a machine with a GPU: build, T3 tests on cuda, benches, sanitizer, profile; a short table last.
#   bench/gpu.sh            results under ${OUT:-build/gpu}, under 10 minutes, no network
#   bench/gpu.sh --dry      without a GPU: every stage that can run, with small caps' work
#   bench/gpu.sh --only benches,rollout     those stages alone, on what an earlier visit built
# Each stage has its own cap in seconds; a stage that needs a failed one is skipped. Results are few files: stages.json,
# log.txt with what every stage said, and ops.json, rollout.json, judge.json. `bench/gpu.sh --keep DIR` copies the four
# documents to bench/results/gpu/, where they can be committed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry= only=
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1 ;;
        --only) only=${2:?--only: name stages, separated by commas}; shift ;;
        --keep)
            from=${2:?--keep: the folder with the results of a visit}
            mkdir -p bench/results/gpu
            for f in stages ops rollout judge; do [ ! -f "$from/$f.json" ] || cp "$from/$f.json" bench/results/gpu/; done
            exit ;;
        *) echo "gpu.sh: $1? options are --dry, --only STAGE,... and --keep DIR" >&2; exit 2 ;;
    esac
    shift
done
out=${OUT:-build/gpu}
budget=${BUDGET:-570} # seconds for everything; what does not fit is skipped and said so
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/log.txt"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
declare -A state

stage() { # name cap needs command...
    local name=$1 cap=$2 needs=$3 begin=$SECONDS
    shift 3
    if [ -n "$only" ] && [[ ",$only," != *",$name,"* ]]; then
        state[$name]="not asked"
        return
    fi
    for need in $needs; do
        if [ "${state[$need]:-}" != ok ] && [ "${state[$need]:-}" != "not asked" ]; then
            state[$name]="skipped ($need: ${state[$need]:-not run})"
            echo "== $name: ${state[$name]}"
            return
        fi
    done
    local left=$((budget - SECONDS))
    if [ "$left" -lt 15 ]; then
        state[$name]="skipped (out of time)"
        echo "== $name: ${state[$name]}"
        return
    fi
    [ "$cap" -le "$left" ] || cap=$left
    echo "== $name (at most $cap s)"
    echo "== $name: $*" >>"$out/log.txt"
    timeout --kill-after=5 "$cap" "$@" >>"$out/log.txt" 2>&1
    local rc=$?
    case $rc in
        0) state[$name]=ok ;;
        124 | 137) state[$name]="cut at $cap s" ;;
        *) state[$name]="failed ($rc)" ;;
    esac
    echo "   ${state[$name]}, $((SECONDS - begin)) s: $(tail -n 1 "$out/log.txt" | cut -c1-150)"
}

share() { # most rest: seconds for a stage that leaves `rest` to those after it, `most` at most and 30 at least
    local left=$((budget - SECONDS - $2))
    [ "$left" -lt "$1" ] || left=$1
    [ "$left" -gt 30 ] || left=30
    echo "$left"
}

environment() {
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    nvcc --version 2>/dev/null | tail -n 2
    git log -1 --oneline 2>/dev/null
    "$python" - <<'PY'
import os, torch
print("python", os.sys.version.split()[0], "torch", torch.__version__)
try:
    import triton
    print("triton", triton.__version__)
except ImportError as e:
    print("no triton:", e)
print("cuda", torch.cuda.is_available() and torch.cuda.get_device_name(0))
PY
}
export -f environment
export python

if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device; bench/gpu.sh --dry runs what needs none" >&2
    exit 2
fi
# Timeouts of single tests allow for Triton's first compilation of each configuration.
pytest=("$python" -m pytest -q -p no:cacheprovider --timeout 120 --maxfail 25)
"$python" -c 'import xdist' 2>/dev/null && [ -z "$dry" ] && pytest+=(-n 12 --dist worksteal)

stage environment 30 "" bash -c environment
stage build 100 "" "$python" -m roro_fast.ops.build_cuda ${dry:+"$out/_cuda.so"}
# Page allocator and CPU kernels in C++, where pybind11 and a compiler are; the Python ones serve without.
[ -n "$dry" ] || stage build_host 100 "" "$python" setup.py -q build_ext --inplace
if [ -n "$dry" ]; then
    stage tests_triton 280 "" "${pytest[@]}" tests/kernels -k "bad_input or epsilon or bf16"
    stage benches 280 "" "$python" -m bench.ops.gpu --dry --out "$out/ops.json"
    stage rollout 120 "" "$python" -m bench.e2e.rollout --pair tiny --dtype float32 --threads 1 --concurrency 4 --new 24 \
        --rounds 1 --plain-new 8 --engines roro_fast,hf_cached --out "$out/rollout.json"
else
    # Only what a device adds: emulated kernels and planted faults, which could ruin a context, are tested without one.
    stage tests_cuda 60 build "${pytest[@]}" tests/cuda -k "device and not emulated"
    stage tests_engine 100 environment "${pytest[@]}" tests/engine/test_cuda.py tests/kernels/test_engine.py
    stage tests_triton 110 environment "${pytest[@]}" tests/kernels -k "not planted and not test_aot and not test_engine"
    stage rollout 190 environment "$python" -m bench.e2e.rollout --pair qwen3 --device cuda --concurrency 64 --new 64 \
        --plain-new 32 --engines roro_fast,hf_cached --gate-sequences 2 --budget 150 --out "$out/rollout.json"
    stage benches 150 environment "$python" -m bench.ops.gpu --budget "$(share 130 90)" --out "$out/ops.json"
    stage judge 60 environment "$python" -m bench.e2e.bench_judge --device cuda --seconds 4 --long-rounds 1 --out "$out/judge.json"
fi
if command -v compute-sanitizer >/dev/null && [ -z "$dry" ]; then
    for tool in memcheck racecheck; do
        stage "sanitizer_$tool" 35 build compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -p no:cacheprovider tests/cuda -k "device and (every_size or every_bit)" --maxfail 3
    done
else
    state[sanitizer]="skipped (no compute-sanitizer)"
fi
if command -v ncu >/dev/null && [ -z "$dry" ]; then
    stage ncu 60 benches ncu --clock-control none --nvtx --nvtx-include "triton/" --launch-count 12 \
        --section SpeedOfLight --csv --page details "$python" -m bench.ops.gpu --op router_score --budget 20
else
    state[ncu]="skipped (no ncu)"
fi

{
    echo "{"
    for name in "${!state[@]}"; do echo " \"$name\": \"${state[$name]}\","; done | sort
    echo " \"seconds\": $SECONDS"
    echo "}"
} >"$out/stages.json"
echo "== ${SECONDS} s"
"$python" - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
for name, said in json.loads((out / "stages.json").read_text()).items():
    print(f"{name:20} {said}")
if (out / "ops.json").is_file():
    from bench.ops.gpu_harness import table
    print(table(json.loads((out / "ops.json").read_text())["cases"]))
if (out / "rollout.json").is_file():
    from bench.e2e.rollout import print_tables
    print_tables(json.loads((out / "rollout.json").read_text()))
PY
for name in environment build tests_cuda tests_triton tests_engine benches rollout; do
    case ${state[$name]:-ok} in ok | "not asked") ;; *) exit 1 ;; esac
done
