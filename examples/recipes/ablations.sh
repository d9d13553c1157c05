#!/usr/bin/env bash
# Takes the recipe apart: trains small distillers that differ from one another in one thing each, and measures all of
# them on tasks that neither training nor any table of results has (`validation` in general.json).
#
#   TEXT=my-texts TASKS=my-tasks examples/recipes/ablations.sh outputs [VARIANT ...]
#
# TEXT, TASKS, BASE and DTYPE as in smollm2-kv.sh; SETTING: another JSON file than general.json. ROWS (120) is the size of
# every training. Beside the scores, in outputs/ablations/scores, the last lines show what moves long before a score does:
# the NLL of the targets and the KL from the teacher on PROBE_ROWS (16) rows of the validation tasks, before and after
# training, with the teacher's own NLL. Without names every variant is trained, each in 5 to 10 minutes of one core; one
# that is finished is not trained again.
set -euo pipefail
output=$1; shift
: "${TEXT:?name the plain text for stage 1}" "${TASKS:?name the folder of tasks}"
here=$(dirname "${BASH_SOURCE[0]}")
SETTING=${SETTING:-$here/general.json}
BASE=${BASE:-$(PYTHONPATH=$here/.. python -c "from weights import find_weights; print(find_weights())")}
common=(--base-model "$BASE") training=(--save-steps 10 --resume --base-model-id HuggingFaceTB/SmolLM2-135M-Instruct)
if [[ -n ${DTYPE:-} ]]; then common+=(--dtype "$DTYPE"); fi
if [[ ${DTYPE:-} == bfloat16 ]]; then training+=(--arg bf16=true); fi

# What a variant changes. Those that need other weights at birth are trained without stage 1, to be compared with
# `without-stage-1`; all others start from the same stage 1 as `baseline`.
declare -A born=(
  [without-stage-1]="" [no-placeholders]="--num-virtual-tokens 0" [32-placeholders]="--num-virtual-tokens 32"
  [rank-4]="--set lora_r=4 --set lora_alpha=8" [rank-64]="--set lora_r=64 --set lora_alpha=128"
  [no-anchors]="--num-virtual-tokens 32 --set anchor_tokens=none" [embeds]="--num-virtual-tokens 32 --prefix-form embeds"
)
declare -A changed=(
  [baseline]="" [no-teacher]="--kd-loss-weight 0" [teacher-alone]="--nll-loss-weight 0"
  [reverse-kl]="--arg kd_divergence=reverse_kl" [jensen-shannon]="--arg kd_divergence=jensen_shannon"
  [hidden-loss]="--arg hidden_loss_weight=1" [options]="--option-loss-weight 1"
  [calibrated-options]="--option-loss-weight 1 --arg calibrate_options=true"
  [symbol-labels]="--symbol-labels 0.15" [balanced-queries]="--balance-queries"
  [1-query]="--queries-per-demonstrations 1" [8-queries]="--queries-per-demonstrations 8"
)
order=(baseline without-stage-1 no-teacher teacher-alone embeds no-anchors no-placeholders 32-placeholders hidden-loss
  reverse-kl jensen-shannon symbol-labels balanced-queries options calibrated-options 1-query 8-queries rank-4 rank-64)
if (($#)); then order=("$@"); fi

read_validation='import json, sys; print(*json.load(open(sys.argv[1]))["validation"])'
read -ra validation <<< "$(python -c "$read_validation" "$SETTING")"
mkdir -p "$output/ablations/validation-tasks"
for task in "${validation[@]}"; do ln -sf "$(realpath "$TASKS")/$task".* "$output/ablations/validation-tasks"; done

if [[ ! -f $output/stage1/mend_config.json ]]; then
  mend pretrain "${common[@]}" "${training[@]}" --text "$TEXT" --num-virtual-tokens 8 --num-rows 160 --batch-size 4 \
    --max-tokens 400 --learning-rate 1e-3 --output-dir "$output/stage1"
fi
compared=()
for name in "${order[@]}"; do
  if [[ -v "changed[$name]" ]]; then
    read -ra change <<< "--distiller $output/stage1 ${changed[$name]}"
  elif [[ -v "born[$name]" ]]; then
    read -ra change <<< "--num-virtual-tokens 8 ${born[$name]}"
  else
    echo "Expected variants among ${order[*]}, got $name." >&2; exit 2
  fi
  if [[ ! -f $output/ablations/$name/mend_config.json ]]; then
    mend finetune "${common[@]}" "${training[@]}" --tasks "$TASKS" --partition "$SETTING" \
      --num-demonstrations 4-8 --max-demonstration-tokens 60 --num-rows "${ROWS:-120}" --batch-size 2 \
      --gradient-accumulation-steps 2 --group-by-length --learning-rate 1e-3 "${change[@]}" \
      --eval-tasks "$output/ablations/validation-tasks" --no-load-best-model-at-end --arg eval_strategy=no \
      --probe-rows "${PROBE_ROWS:-16}" --output-dir "$output/ablations/$name"
  fi
  compared+=(--compare "$name=$output/ablations/$name")
done
for task in "${validation[@]}"; do compared+=(--task "$task"); done
mend evaluate "${common[@]}" --tasks "$TASKS" --num-demonstrations 16 --seeds "${SEEDS:-13,21,42}" \
  --max-queries "${MAX_QUERIES:-32}" --method zero-shot "${compared[@]}" --output-dir "$output/ablations/scores"

read_probes='
import json, sys
for name in sys.argv[2:]:
    log = json.load(open(f"{sys.argv[1]}/{name}/training_log.json"))["log"]
    first, *_, last = [entry for entry in log if "probe_kl" in entry]
    nll, kl = (f"{first[key]:.2f} -> {last[key]:.2f}" for key in ("probe_nll", "probe_kl"))
    teacher = first["probe_teacher_nll"]
    print(f"{name}: NLL {nll} (teacher {teacher:.2f}), KL {kl}")
'
python -c "$read_probes" "$output/ablations" "${order[@]}"
