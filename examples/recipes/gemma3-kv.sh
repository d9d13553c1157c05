#!/usr/bin/env bash
# The key/value form for Gemma-3-270m, which has sliding windows, one key/value head and a vocabulary of 262,144.
#
#   TEXT=my-texts TASKS=my-tasks examples/recipes/gemma3-kv.sh examples/recipes/general.json outputs/gemma
#
# BASE: a Hub id, a folder or a .gguf file. Everything that smollm2-kv.sh reads from the environment is read here too.
set -euo pipefail
export BASE=${BASE:-google/gemma-3-270m} BASE_ID=${BASE_ID:-google/gemma-3-270m}
exec "$(dirname "${BASH_SOURCE[0]}")/smollm2-kv.sh" "$@"
