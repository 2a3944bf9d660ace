#!/usr/bin/env bash
# Rebuild assets/chain_warm_start from its seed: a random mini policy, copying drills, demonstrations
# of chains. About ten minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
RUN=runs/chain_warm_start
export OMP_NUM_THREADS=1

$PY -m tapo_train.demo.tiny.model --out runs/mini_policy --size mini --seed 0
rm -rf $RUN
$PY -m tapo_train sft recipes/chain_warm_start.yaml "run.dir=$RUN"
rm -rf assets/chain_warm_start
mv $RUN/export assets/chain_warm_start
