#!/usr/bin/env bash
# HotMoE against plain LoRA of equal trainable parameters: all-MiniLM-L6-v2 on four real tasks, three seeds.
#   DATA=path/to/tasks scripts/four_tasks.sh [key=value ...]
# Two runs at a time, one thread each. Finished runs are kept and unfinished ones continued, so it may be stopped and
# started again. The scores go to results/four-tasks/, from which scripts/results.py writes docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
data=${DATA:-../shared/data/tasks}
moesaic=${MOESAIC:-.venv/bin/moesaic}
mkdir -p results/four-tasks runs/four-tasks

one() { # method seed settings...
  local method=$1 seed=$2 run=runs/four-tasks/$1-s$2
  shift 2
  [ "$method" = lora ] && set -- method=lora adapter.r=16 adapter.lora_alpha=32 adapter.lora_dropout=0.0 \
    match=scripts/four_tasks.yaml "$@"
  [ -f "$run/results.json" ] || "$moesaic" train scripts/four_tasks.yaml data="$data" seed="$seed" out="$run" "$@"
  [ -f "$run/eval-validation.json" ] || "$moesaic" eval "$run"
  cp "$run/results.json" "results/four-tasks/$method-s$seed-train.json"
  cp "$run/eval-validation.json" "results/four-tasks/$method-s$seed-eval.json"
}

for seed in ${SEEDS:-0 1 2}; do
  for method in hotmoe lora; do
    one "$method" "$seed" "$@" >"runs/four-tasks/$method-s$seed.log" 2>&1 &
  done
  wait
done
