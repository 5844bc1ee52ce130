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
# Tests of torch.compile take most of the time. They are first and share a worker, because compilers that run side by side
# slow each other down. With pytest-xdist, other workers run the rest meanwhile.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v test_compile | sort)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6 --dist loadfile)
# At the time limit, SIGINT makes pytest print the failures so far.
timeout --signal=INT --kill-after=10 220 "$python" -m pytest -m gpu -v --tb=short -rf --durations=8 -p no:cacheprovider \
  "${parallel[@]}" tests/pipelines/test_compile.py "${files[@]}" 2>&1 | tee "$results/tests.log"
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
