#!/usr/bin/env bash
# A model of its own reads the demonstrations for SmolLM2-135M, and a projection makes vectors of SmolLM2's width of what
# it read.
#
#   TEXT=my-texts TASKS=my-tasks READER=google/gemma-3-270m \
#     examples/recipes/smollm2-separate.sh examples/recipes/general.json outputs/separate
#
# READER: a Hub id or a folder of any causal language model, with a tokenizer and a width of its own. Everything that
# smollm2-kv.sh reads from the environment is read here too; FORM=kv writes keys and values.
set -euo pipefail
export READER=${READER:?name the model that reads the demonstrations}
export FORM=${FORM:-embeds} VIRTUAL_TOKENS=${VIRTUAL_TOKENS:-64}
exec "$(dirname "${BASH_SOURCE[0]}")/smollm2-kv.sh" "$@"
