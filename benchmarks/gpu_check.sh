#!/usr/bin/env bash
# Check an accelerator in at most 8 minutes: the tests marked `gpu`, then ours against the reference at 512 and 768
# pixels, batch 1 and 8, eager and compiled. Nothing is downloaded; all weights are random and made on the device.
#   benchmarks/gpu_check.sh [FOLDER FOR RESULTS]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${1:-gpu-check}
mkdir -p "$results"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
begun=$SECONDS
timeout 180 "$python" -m pytest -m gpu -q -x --maxfail=40 --durations=5 -p no:cacheprovider \
  tests 2>&1 | tee "$results/tests.log" | tail -n 60
tests=${PIPESTATUS[0]}
echo "tests: exit code $tests after $((SECONDS - begun)) s"
timeout 60 "$python" -m benchmarks.gpu_compare --dtype fp32 --sizes 512 --batches 1 --rounds 3 --no-compile \
  --out "$results/fp32.json"
agreement=$?
timeout "$((465 - (SECONDS - begun)))" "$python" -m benchmarks.gpu_compare \
  --minutes "$(awk "BEGIN {print (440 - ($SECONDS - $begun)) / 60}")" --out "$results/bf16.json"
comparison=$?
echo "tests $tests, float32 agreement $agreement, comparison $comparison; $((SECONDS - begun)) s in all"
[ "$tests" = 0 ] && [ "$agreement" = 0 ] && [ "$comparison" = 0 ]
