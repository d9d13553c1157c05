#!/usr/bin/env bash
# An encoder-decoder: a small T5, pretrained first by small_t5.py, because its scores need no download. What that is worth
# is said there.
#
#   TEXT=my-texts TASKS=my-tasks examples/recipes/small-t5.sh examples/recipes/general.json outputs
#
# STEPS: those of the pretraining. BASE: another encoder-decoder, a Hub id or a folder, such as google/t5-v1_1-small, and
# nothing is pretrained. Everything else that smollm2-kv.sh reads from the environment is read here too.
set -euo pipefail
: "${TEXT:?name the plain text to pretrain on}"
here=$(dirname "${BASH_SOURCE[0]}")
if [[ -z ${BASE:-} ]]; then
  export BASE=$2/small-t5 BASE_ID=small-t5
  if [[ ! -f $BASE/config.json ]]; then python "$here/small_t5.py" "$TEXT" "$BASE" --num-steps "${STEPS:-1500}"; fi
fi
export BASE_ID=${BASE_ID:-$BASE} VIRTUAL_TOKENS=${VIRTUAL_TOKENS:-32}
export METHODS=${METHODS:-zero-shot;in-context;in-context, cut;MEND;MEND, batch-calibrated}
exec "$here/smollm2-kv.sh" "$1" "$2/t5"
