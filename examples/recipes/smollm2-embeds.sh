#!/usr/bin/env bash
# The paper's form for SmolLM2-135M: 64 vectors in front of the query's embeddings, in place of keys and values.
#
#   TEXT=my-texts TASKS=my-tasks examples/recipes/smollm2-embeds.sh examples/recipes/general.json outputs/embeds
#
# Everything that smollm2-kv.sh reads from the environment is read here too.
set -euo pipefail
export FORM=embeds VIRTUAL_TOKENS=${VIRTUAL_TOKENS:-64}
exec "$(dirname "${BASH_SOURCE[0]}")/smollm2-kv.sh" "$@"
