#!/usr/bin/env bash
# Trains an adapter on plain text, as a causal language model; prints loss and perplexity before and after. train.sh does
# the rest.
#     bash train_text.sh                                 the shipped demo on the advertisements as plain text
#     MODEL=THUDM/chatglm3-6b TRAIN_FILE=novel.txt bash train_text.sh                  .txt, or rows with a key text
#     MODEL=THUDM/chatglm3-6b TRAIN_FILE='corpus/*.json' TEXT_COLUMN=body bash train_text.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ -z "${TRAIN_FILE:-}${TRAIN_DATASETS:-}" ]; then      # the shipped rows
    export TASK=${TASK:-text} TEXT_COLUMN=${TEXT_COLUMN:-summary}
fi
case ${MODEL:-demo} in
    demo | demo3) export MAX_SOURCE_LENGTH=${BLOCK_SIZE:-128} ;;      # tokens of a training row
    *) export MAX_SOURCE_LENGTH=${BLOCK_SIZE:-1024} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-4} ;;
esac

exec bash "$HERE/train.sh" "$@"
