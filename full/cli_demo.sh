#!/usr/bin/env bash
# Chats in the terminal with a fully trained model; the answer streams.
#     bash cli_demo.sh                                   the newest training
#     CHECKPOINT= MODEL=demo3 bash cli_demo.sh           a base model alone
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT-$ROOT/full/output}               # a training, or a folder of trainings: the newest one
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # for ChatGLM3 and GLM-4

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/cli_demo.py" \
    ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${QUANTIZATION_BIT+--quantization_bit "${QUANTIZATION_BIT:-0}"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    "$@"
