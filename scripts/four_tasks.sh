#!/usr/bin/env bash
# HotMoE against plain LoRA of equal trainable parameters: all-MiniLM-L6-v2 on four real tasks, three seeds.
#   DATA=path/to/tasks scripts/four_tasks.sh
# Finished runs are kept and unfinished ones continued, so it may be stopped and started again.
# The scores go to results/four-tasks/, from which scripts/results.py writes docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:-../shared/data/tasks}
moesaic=${MOESAIC:-.venv/bin/moesaic}
common=(model=minilm data="$data" tasks=arc_easy,openbookqa,sst2,cola)
mkdir -p results/four-tasks
for seed in ${SEEDS:-0 1 2}; do
  for method in hotmoe lora; do
    run=runs/four-tasks/$method-s$seed
    settings=("${common[@]}" seed="$seed" out="$run")
    [ "$method" = lora ] && settings+=(match="runs/four-tasks/hotmoe-s$seed")
    [ -f "$run/results.json" ] || "$moesaic" train "$method" "${settings[@]}" "$@"
    [ -f "$run/eval-validation.json" ] || "$moesaic" eval "$run"
    cp "$run/results.json" "results/four-tasks/$method-s$seed-train.json"
    cp "$run/eval-validation.json" "results/four-tasks/$method-s$seed-eval.json"
  done
done
