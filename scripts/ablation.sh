#!/usr/bin/env bash
# Three losses by three credit assigners on the demo's world, one seed each, as many steps as the
# demo: trains all nine, with the same aggregation, and prints a table of test accuracies (markdown).
# Runs that are complete are not repeated. About a quarter of an hour each on two cores.
#
#   scripts/ablation.sh                  the nine runs of the demo recipe
#   scripts/ablation.sh run.steps=20     any override goes to all of them
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
WORLD=runs/world
OUT=runs/ablation
export OMP_NUM_THREADS=1

[ -f $WORLD/world.json ] || $PY -m tapo_train world --seed 1 --out $WORLD
echo "| loss | credit=none | credit=tapo | credit=gigpo |"
echo "|---|---|---|---|"
for loss in grpo gspo sapo; do
  row="| $loss |"
  for credit in none tapo gigpo; do
    run=$OUT/$loss-$credit
    log=$run.log
    mkdir -p "$OUT"
    $PY -m torch.distributed.run --standalone --nproc-per-node 2 -m tapo_train train \
      recipes/demo_cpu.yaml "run.dir=$run" run.wandb=disabled "algo/loss=$loss" \
      "credit=$credit" algo.aggregation=token-mean "$@" >"$log" 2>&1
    accuracy=$($PY -m tapo_train eval --model "$run/export" --tasks $WORLD/test.jsonl 2>>"$log" |
      sed -n 's/^accuracy: //p')
    row="$row $accuracy |"
  done
  echo "$row"
done
