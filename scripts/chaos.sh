#!/usr/bin/env bash
# The fault run: the demo's agent trains while its search servers misbehave in every way we know.
# First the same run with a server that only answers, for comparison.
#
#   scripts/chaos.sh [OUT] [STEPS] [RANKS]
#
# Checks the run and writes the table of docs/reliability.md when OUT is the default.
# KINDS=faults leaves the comparison out, WORLD and PORT name another world and port.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=${PYTHON:-.venv/bin/python}
OUT=${1:-runs/chaos}
STEPS=${2:-10}
RANKS=${3:-2}
WORLD=${WORLD:-runs/world}
PORT=${PORT:-18763}
SERVER=
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD

stop_server() {
  if [ -n "$SERVER" ]; then kill "$SERVER" 2>/dev/null || true; wait "$SERVER" 2>/dev/null || true; fi
  SERVER=
}
trap stop_server EXIT

# A server that dies comes back after a second.
serve() {
  (
    trap 'kill $CHILD 2>/dev/null; exit' TERM
    while true; do
      $PY scripts/chaos_server.py "$PORT" "$WORLD" "$1/events.jsonl" ${2:-} & CHILD=$!
      wait $CHILD || true
      sleep 1
    done
  ) &
  SERVER=$!
  for _ in $(seq 120); do
    if $PY -c "import socket; socket.create_connection(('127.0.0.1', $PORT), 1)" 2>/dev/null; then
      return
    fi
    sleep 0.5
  done
  echo "no server on port $PORT" >&2
  exit 1
}

run() {
  CHAOS_OUT=$1 $PY -m torch.distributed.run --standalone --nproc-per-node "$RANKS" \
    scripts/chaos_run.py train recipes/demo_cpu.yaml "run.dir=$1/run" "run.steps=$STEPS" \
    run.resume=never run.wandb=disabled run.eval_every=0 run.save_every=0 \
    data.questions_per_step=8 "data.train=[$WORLD/train.jsonl]" "data.validation=[]" \
    "tools.text_endpoint=http://127.0.0.1:$PORT/text" \
    "tools.image_endpoint=http://127.0.0.1:$PORT/image" \
    tools.corpus=null tools.image_index=null tools.deadline_s=5 \
    tools.limits.text_search_tool.retries=1 rollout.max_failed_fraction=0.9
}

if [ ! -f "$WORLD/world.json" ]; then $PY -m tapo_train world --seed 1 --out "$WORLD"; fi
rm -rf "$OUT"
for kind in ${KINDS:-clean faults}; do
  echo "== $kind: $STEPS steps on $RANKS ranks"
  mkdir -p "$OUT/$kind"
  if [ $kind = clean ]; then serve "$OUT/$kind" --clean; else serve "$OUT/$kind"; fi
  run "$OUT/$kind"
  stop_server
done
if [ "$OUT" = runs/chaos ]; then
  $PY scripts/chaos_table.py "$OUT" --write docs/reliability.md
else
  $PY scripts/chaos_table.py "$OUT"
fi
