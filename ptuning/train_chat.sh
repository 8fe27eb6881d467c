#!/usr/bin/env bash
# Trains a prefix on conversations: rows with a question, an answer and the rounds before them. train.sh does the rest.
#     bash train_chat.sh                                 the shipped demo on the shipped conversations
#     MODEL=THUDM/chatglm-6b TRAIN_FILE=chat.json bash train_chat.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ -z "${TRAIN_FILE:-}${TRAIN_DATASETS:-}" ]; then      # the shipped rows
    export TASK=${TASK:-chat} TRAIN_FILE=$HERE/../AdvertiseGen/train_chat.json
fi
export MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256}
case ${MODEL:-demo} in
    demo | demo3) export LR=${LR:-1e-1} ;;
    *) export LR=${LR:-1e-2} ;;
esac

exec bash "$HERE/train.sh" "$@"
