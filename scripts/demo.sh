#!/usr/bin/env bash
# The demo: write a search world, measure the warm-started agent on questions it has never seen,
# train it with reinforcement learning, measure again. CPU only, no network.
#
# A run that was stopped goes on where it was; rm -rf runs/demo starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
RECIPE=recipes/demo_cpu.yaml
START=assets/warm_start
WORLD=runs/world
RUN=runs/demo
SEED=1
# One rank per core, two at most; the rest is the same for any number. (Not nproc: it answers
# OMP_NUM_THREADS where that is set.)
RANKS=$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))
export OMP_NUM_THREADS=1
# vLLM has a few small functions compiled; on a new machine that takes longer than to run them.
export TORCH_COMPILE_DISABLE=1 TORCH_CPP_LOG_LEVEL=ERROR

# Prints the evaluation while it runs and leaves its figures in `accuracy` and `questions`.
measure() {
  local log
  log=$(mktemp)
  $PY -m tapo_train eval --model "$1" --tasks $WORLD/test.jsonl --recipe $RECIPE | tee "$log"
  accuracy=$(sed -n 's/^accuracy: \([0-9.]*\).*/\1/p' "$log")
  questions=$(sed -n 's/^accuracy: .*\(n=[0-9]*\).*/\1/p' "$log")
  rm "$log"
}

if [ ! -f $WORLD/world.json ]; then
  echo "== a search world from seed $SEED"
  $PY -m tapo_train world --seed $SEED --out $WORLD
fi
echo "== the warm-started agent on the test split"
measure $START
before=$accuracy
echo "== training ($RECIPE; every field: docs/recipe.md)"
$PY -m torch.distributed.run --standalone --nproc-per-node "$RANKS" \
  -m tapo_train train $RECIPE "run.dir=$RUN"
echo "== the trained agent on the test split"
measure $RUN/export

echo
echo "test accuracy: $(printf '%.2f -> %.2f' "$before" "$accuracy") ($questions)"
echo "policy: $RUN/export"
echo "metrics: $RUN/metrics.jsonl, trajectories: $RUN/rollouts and $RUN/tokens"
echo "look at every attempt: $PY -m tapo_train inspect $RUN, then $RUN/inspect/index.html"
