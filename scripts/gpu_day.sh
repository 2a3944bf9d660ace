#!/usr/bin/env bash
# What has to be seen on a GPU, in under eight minutes on one card of 80 GB, without a network:
#
#   scripts/gpu_day.sh [OUT.jsonl]      (PYTHON=… for another interpreter than .venv's)
#
# The learner in bf16 with flash attention against float32 on the CPU, packed against unpacked, a
# step under ZeRO-2, states moved out and back, then the update of a 4 B model (bench_gpu.py). Each
# part has its own time limit, and the next one runs whatever becomes of it. JSON lines; status 1
# if something was not as it should be.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=$(realpath -m "${1:-bench/results.jsonl}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

part() {  # part SECONDS NAME command …
  local seconds=$1 name=$2
  shift 2
  echo "== $name" >&2
  timeout --kill-after 10 "$seconds" "$@" || { echo "!! $name: status $?" >&2; failed=1; }
}

part 20 device "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)'
part 90 reference env CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu \
  "$PYTHON" scripts/gpu_checks.py reference "$scratch"
part 100 compare "$PYTHON" scripts/gpu_checks.py compare "$scratch" --out "$OUT"
part 260 update "$PYTHON" scripts/bench_gpu.py --out "$OUT"
exit $failed
