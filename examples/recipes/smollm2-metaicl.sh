#!/usr/bin/env bash
# What MEND is measured against at the other end: MetaICL, the whole of SmolLM2-135M tuned to read demonstrations as text.
#
#   TASKS=my-tasks examples/recipes/smollm2-metaicl.sh examples/recipes/general.json outputs
#
# TASKS, BASE, TASK_ROWS, QUERIES, LEARNING_RATE, SEEDS and MAX_QUERIES as in smollm2-kv.sh. DTYPE=bfloat16 computes in
# bfloat16; the weights, which are what is trained here, stay in float32.
set -euo pipefail
setting=$1 output=$2/metaicl-$(basename "$1" .json)
: "${TASKS:?name the folder of tasks}"
examples=$(dirname "${BASH_SOURCE[0]}")/..
BASE=${BASE:-$(PYTHONPATH=$examples python -c "from weights import find_weights; print(find_weights())")}
training=(--save-steps 25 --resume) evaluation=()
if [[ ${DTYPE:-} == bfloat16 ]]; then training+=(--arg bf16=true) evaluation+=(--dtype bfloat16); fi
if [[ ! -f $output/config.json ]]; then
  mend finetune --recipe metaicl --base-model "$BASE" "${training[@]}" --tasks "$TASKS" --partition "$setting" \
    --num-demonstrations 4-16 --max-demonstration-tokens 60 --queries-per-demonstrations "${QUERIES:-1}" \
    --num-rows "${TASK_ROWS:-600}" --batch-size 2 --gradient-accumulation-steps 2 --group-by-length \
    --learning-rate "${LEARNING_RATE:-3e-5}" --probe-rows 4 --output-dir "$output"
fi
mend evaluate --base-model "$BASE" "${evaluation[@]}" --tasks "$TASKS" --partition "$setting" --method in-context \
  --seeds "${SEEDS:-13,21,42,87,100}" --max-queries "${MAX_QUERIES:-50}" --compare "MetaICL=$output" \
  --output-dir "$output/scores"
