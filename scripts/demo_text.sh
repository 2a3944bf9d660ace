#!/usr/bin/env bash
# The second demo: fetch a pretrained language model of 135 M parameters, show it the form of calls
# and answers, train it with reinforcement learning to look things up in a small invented corpus,
# and measure it on questions about things it has never been asked about. CPU only.
#
# What is there is not made again; rm -rf runs/demo_text* runs/smollm2 starts afresh. MODEL=DIR
# starts from any other folder of a text model.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
MODEL=${MODEL:-runs/smollm2}
RECIPE=recipes/demo_text.yaml
WORLD=runs/lookups
START=runs/demo_text_start/export
RUN=runs/demo_text
QUESTIONS=${QUESTIONS:-96}
RANKS=$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))
export OMP_NUM_THREADS=1
# vLLM has a few small functions compiled; on a new machine that takes longer than to run them.
export TORCH_COMPILE_DISABLE=1 TORCH_CPP_LOG_LEVEL=ERROR

launch() { $PY -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m tapo_train "$@"; }

# Asks the first test questions and writes the trajectories to $2.
measure() {
  [ -s "$2" ] || OMP_NUM_THREADS=2 $PY -m tapo_train eval --model "$1" --recipe $RECIPE \
    --tasks $WORLD/test.jsonl --questions "$QUESTIONS" --out "$2"
}

started=$SECONDS
mkdir -p runs
if [ "$MODEL" = runs/smollm2 ]; then
  $PY -c 'import gguf' 2>/dev/null || $PY -m pip install -q -e '.[pretrained]'
  $PY scripts/fetch_smollm2.py $MODEL
fi
[ -f $WORLD/world.json ] ||
  $PY -m tapo_train world --seed 1 --hops 1 --text-only --out $WORLD
echo "== the model as it was published"
measure "$MODEL" runs/demo_text_published.jsonl
if [ ! -d $START ]; then
  echo "== showing it the form"
  launch sft recipes/demo_text_start.yaml "model.path=$MODEL"
fi
echo "== before reinforcement learning"
measure $START runs/demo_text_before.jsonl
echo "== training ($RECIPE; every field: docs/recipe.md)"
launch train $RECIPE "run.dir=$RUN"
echo "== after"
measure $RUN/export runs/demo_text_after.jsonl

echo
$PY scripts/compare_answers.py published=runs/demo_text_published.jsonl \
  before=runs/demo_text_before.jsonl after=runs/demo_text_after.jsonl
echo "policy: $RUN/export, metrics: $RUN/metrics.jsonl, wall time: $((SECONDS - started)) s"
