#!/usr/bin/env bash
# Trains an adapter on whole conversations, with system prompts and tools. train.sh does the rest.
#     bash train_chat.sh                                 the shipped ChatGLM3 demo on the shipped conversations
#     MODEL=THUDM/chatglm3-6b TRAIN_FILE=chat.json bash train_chat.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export MODEL=${MODEL:-demo3}
if [ -z "${TRAIN_FILE:-}${TRAIN_DATASETS:-}" ]; then      # the shipped rows
    export TASK=${TASK:-chat} TRAIN_FILE=$HERE/../AdvertiseGen/train_tools.json
fi
export MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256}
case $MODEL in
    # A new skill needs more than a new style: all layers, and more steps.
    demo | demo3)
        export LORA_TARGET=${LORA_TARGET:-all-linear} DEFAULT_STEPS=${DEFAULT_STEPS:-500}
        [ -n "${TOKENS_PER_BATCH:-}" ] || export BATCH_SIZE=${BATCH_SIZE:-8} ;;
esac

exec bash "$HERE/train.sh" "$@"
