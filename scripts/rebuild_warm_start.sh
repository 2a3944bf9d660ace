#!/usr/bin/env bash
# Rebuild assets/warm_start from its seed: a random tiny policy, copying drills, demonstrations.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
RUN=runs/warm_start

$PY -m tapo_train.demo.tiny.model --out runs/tiny_policy --seed 0
rm -rf $RUN
$PY -m tapo_train sft recipes/warm_start.yaml "run.dir=$RUN"
rm -rf assets/warm_start
mkdir -p assets
mv $RUN/export assets/warm_start
