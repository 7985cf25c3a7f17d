#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU (written for torch 2.11, triton 3.6, Python 3.12; nine minutes at most): the GPU
# tests, then the benchmark; a short table last. Logs and result rows go to $OUT if it is set, else to benchmarks/results.
# Rows are written case by case, headlines of the cross-entropy first, then distillation: what there was no time for is
# absent, the rest is there. To keep them, put gpu.jsonl into benchmarks/results and run `python -m benchmarks.table --write`
# and `python -m benchmarks.plot`.
#
# This script HAS NOT BEEN RUN YET: it was written on a machine without a GPU. Delete this sentence when it has.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

echo "== GPU tests"
timeout 180 "$python" -m pytest -q -m cuda tests >"$out/gpu-tests.log" 2>&1
tests=$?
tail -n 3 "$out/gpu-tests.log"

echo "== benchmark"
timeout 340 "$python" -m benchmarks.run --device cuda --cases gpu --seconds 4 --output "$out/gpu.jsonl" \
    >"$out/gpu-bench.log" 2>&1
bench=$?

echo "== summary (tests exit $tests, benchmark exit $bench; 124: out of time)"
grep -E '^[a-z0-9-]+/|^  (xentile|torch\.|liger|quack|flash)' "$out/gpu-bench.log" || tail -n 20 "$out/gpu-bench.log"
exit $((tests > bench ? tests : bench))
