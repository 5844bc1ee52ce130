#!/usr/bin/env bash
# Check an accelerator in at most 8 minutes: the tests marked `gpu`, then kandinsky22 against the reference at 512 and 768
# pixels, batch 1 and 8, eager and compiled. Nothing is downloaded: all weights are random and generated on the device.
#   benchmarks/gpu_check.sh [FOLDER FOR RESULTS]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${1:-gpu-check}
mkdir -p "$results"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
start=$SECONDS
# Tests run in the order of the files. Those of torch.compile are last, since they take most of the time.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v test_compile | sort)
# At the time limit, SIGINT makes pytest print the failures so far.
timeout --signal=INT --kill-after=10 200 "$python" -m pytest -m gpu -v --tb=short -rf --durations=5 -p no:cacheprovider \
  "${files[@]}" tests/pipelines/test_compile.py 2>&1 | tee "$results/tests.log"
tests=${PIPESTATUS[0]}
echo "tests: exit code $tests after $((SECONDS - start)) s"
timeout 60 "$python" -m benchmarks.gpu_compare --dtype fp32 --sizes 512 --batches 1 --rounds 3 --no-compile \
  --out "$results/fp32.json"
agreement=$?
timeout "$((475 - (SECONDS - start)))" "$python" -m benchmarks.gpu_compare \
  --minutes "$(awk "BEGIN {print (450 - ($SECONDS - $start)) / 60}")" --out "$results/bf16.json"
comparison=$?
echo "tests $tests, float32 agreement $agreement, comparison $comparison; $((SECONDS - start)) s in total"
[ "$tests" = 0 ] && [ "$agreement" = 0 ] && [ "$comparison" = 0 ]
