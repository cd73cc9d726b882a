#!/usr/bin/env bash
# The end-to-end figures of a CPU machine that does nothing else, the most wanted first: bench/e2e.sh [--sweep]
# About 12 minutes on two cores, most of it peers; --sweep adds every workload (an hour). Peers are those that
# `python -m bench.peers.setup all` has made under $RORO_PEERS; absent ones are named in the results.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
status=0
run() {
    echo "== $*" >&2
    "$python" -m "$@" || status=1
}
run bench.e2e.rollout --budget 600
run bench.e2e.rollout --pair nano --dtype float32 --concurrency 256 --engines roro_fast,hf_reprefill,hf_cached
run bench.e2e.scaling --pair nano
run bench.e2e.scaling --pair smol --short --rounds 2
[ "${1:-}" = --sweep ] && run bench.e2e.rollout --sweep --no-plain --rounds 2
exit $status
