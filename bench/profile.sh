#!/usr/bin/env bash
# Profile the engine, or any command of this project, with ready settings.
#   bench/profile.sh nsys  [command...]   timeline: CUDA work, NVTX phases, waits; build/profile/roro.nsys-rep
#   bench/profile.sh ncu   [command...]   counters of the kernels inside decode forwards of the large model
#   bench/profile.sh torch                no Nsight needed: table of phases and build/profile/trace.json (perfetto)
# The default command is one round of bench/e2e/trace.py's workload, on the GPU where there is one (DEVICE=cpu: not).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-build/profile}
tool=${1:-}
[ $# -gt 0 ] && shift
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

need() {
    command -v "$1" >/dev/null || { echo "profile.sh: $1 is not installed; get it from NVIDIA's CUDA toolkit, or use: bench/profile.sh torch" >&2; exit 2; }
}

case $tool in
    nsys | ncu | torch)
        mkdir -p "$out"
        device=${DEVICE:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
        trace=("$python" -m bench.e2e.trace --device "$device" --out "$out/phases.json") # not the committed file: profiled
        [ $# -gt 0 ] || set -- "${trace[@]}" --rounds 1
        ;;
esac
case $tool in
    nsys)
        need nsys
        RORO_PROFILE=nvtx nsys profile --trace cuda,nvtx,osrt,cublas --cuda-graph-trace node --sample none \
            --force-overwrite true --output "$out/roro" "$@"
        nsys stats --report nvtx_sum --report cuda_gpu_kern_sum "$out/roro.nsys-rep"
        ;;
    ncu)
        need ncu
        # domain@range: only what runs inside a decode forward of model 1, the large one of a pair. The dot stands for the
        # slash of "forward/1", which ncu would read as one range inside another.
        RORO_PROFILE=nvtx ncu --nvtx --nvtx-include "regex:roro_fast@forward.1/" --clock-control none --launch-count 40 \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --force-overwrite --export "$out/roro" "$@"
        ncu --import "$out/roro.ncu-rep" --page details --csv >"$out/roro.csv"
        echo "$out/roro.csv"
        ;;
    torch)
        "${trace[@]}" --trace "$out/trace.json"
        ;;
    *)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
