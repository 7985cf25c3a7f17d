#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU (written for torch 2.11, triton 3.6, Python 3.12), nine minutes at most: the
# GPU tests, compute-sanitizer if it is installed, then the benchmarks; the table of targets last. Logs and result rows
# go to $OUT if it is set, else to benchmarks/results. Rows are written case by case, the headlines first: what
# there was no time for is absent, the rest is there. To keep them, put <device>.jsonl into benchmarks/results and
# percentiles/<device>.jsonl into benchmarks/results/percentiles; then run `python -m benchmarks.table --write` and
# `python -m benchmarks.plot`.
#
# What the machine lacks and cannot download may come with the checkout, before this runs:
#   pip install --target build/gpu hypothesis pytest
#
# This script HAS NOT BEEN RUN ON A GPU YET: it was written on a machine without one. Delete this sentence when it has.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results}
mkdir -p "$out/percentiles"
export PYTHONPATH="$PWD/src:$PWD:$PWD/build/gpu${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

# limited SECONDS COMMAND...: an interrupt first, after which pytest still tells what failed.
limited() { timeout -s INT -k 5 "$@"; }
has() { "$python" -c "import $1" 2>/dev/null; }

device=$(limited 40 "$python" - <<'PYTHON'
import sys, torch
from benchmarks.provenance import device_name, slug
sys.exit("gpu.sh needs a GPU that torch can see, there is none") if not torch.cuda.is_available() else None
print(slug(device_name("cuda")))
PYTHON
) || exit 2
rows=$out/$device.jsonl

tests=none
if has pytest; then
  # Only files with tests of a GPU are collected: what the others import may not be there.
  mapfile -t files < <(grep -lE 'mark\.cuda|device: torch\.device' tests/test_*.py)
  if ! has hypothesis; then
    mapfile -t without < <(grep -LE '^from hypothesis' "${files[@]}")
    echo "hypothesis is not installed: $((${#files[@]} - ${#without[@]})) of ${#files[@]} files of GPU tests are left out"
    files=("${without[@]}")
  fi
  echo "== GPU tests"
  limited 160 "$python" -m pytest -q -rfE -p no:cacheprovider --continue-on-collection-errors -m cuda \
    tests/test_cuda_operators.py tests/test_cuda.py "${files[@]}" >"$out/gpu-tests.log" 2>&1
  tests=$?
  grep -E '^(FAILED|ERROR)' "$out/gpu-tests.log" | cut -c1-150 | head -n 20
  tail -n 1 "$out/gpu-tests.log"
  for tool in memcheck racecheck; do
    if ! command -v compute-sanitizer >/dev/null; then
      echo "compute-sanitizer is not installed: no $tool"
      continue
    fi
    # Without torch's allocator every tensor has an end that memcheck knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_operators.py -k small >"$out/gpu-$tool.log" 2>&1
    echo "$tool: exit $? (124: out of time); $(grep -E 'SUMMARY' "$out/gpu-$tool.log" | tail -n 1)"
  done
else
  echo "pytest is not installed: no GPU tests"
fi

echo "== benchmarks"
limited 35 "$python" -m benchmarks.run --suite percentiles --device cuda >"$out/gpu-percentiles.log" 2>&1
percentiles=$?
stored=benchmarks/results/percentiles/$device.jsonl
[ "$out" -ef benchmarks/results ] || [ ! -f "$stored" ] || cp "$stored" "$out/percentiles/"
# What is left of nine minutes, but for the table.
limited $((515 - SECONDS)) "$python" -m benchmarks.run --device cuda --cases gpu --seconds 2 --output "$rows" \
  >"$out/gpu-bench.log" 2>&1
bench=$?
grep -E '^[a-z0-9-]+/|^  (xentile|torch\.|liger|quack|flash)' "$out/gpu-bench.log" || tail -n 20 "$out/gpu-bench.log"

echo "== targets on $device (tests exit $tests, percentiles $percentiles, benchmark $bench; 124: out of time)"
grep -E 'to reach' "$out/gpu-percentiles.log" || tail -n 3 "$out/gpu-percentiles.log"
[ -f "$rows" ] && limited 15 "$python" -m benchmarks.targets "$rows" gpu
[ "$tests$percentiles$bench" = 000 ]
