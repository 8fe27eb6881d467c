#!/usr/bin/env bash
# Tokenizes a training file ahead, on all cores, into a folder of shards for TRAIN_DATASETS=folder bash lora/train.sh.
#     bash common/preprocess.sh                          the shipped rows for the shipped demo, into train_datasets/
#     MODEL=THUDM/chatglm3-6b TRAIN_FILE='data/*.json' OUTPUT_DIR=/data/tokens bash common/preprocess.sh
#     TEXT_COLUMN=summary bash common/preprocess.sh      plain text, for lora/train_text.sh
# MODEL names the tokenizer: demo, demo3, a folder, a short name or a hub id. TRAIN_FILE and the columns are those of
# train.sh. A killed run continues where it stopped; --overwrite_cache starts over.
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# The lengths of lora/train.sh, or for plain text of lora/train_text.sh: the training must use the same lengths.
case ${MODEL:-demo} in
    demo | demo3) QUESTION=64 ANSWER=64 BLOCK=128 ;;
    *) QUESTION=256 ANSWER=512 BLOCK=1024 ;;
esac
TRAIN_FILE=${TRAIN_FILE:-$ROOT/AdvertiseGen/train.json}
if [ -n "${TEXT_COLUMN:-}" ] || [[ $TRAIN_FILE == *.txt ]]; then QUESTION=$BLOCK; fi
add_flags TRAIN_FILE PROMPT_COLUMN RESPONSE_COLUMN HISTORY_COLUMN CONVERSATION_COLUMN TEXT_COLUMN TEXT_UNIT \
    VALIDATION_SPLIT MIX SKIP_BAD_ROWS STRICT_DATA

exec "$PYTHON" "$ROOT/common/preprocess.py" \
    --model_name_or_path "${MODEL:-demo}" \
    "${FLAGS[@]}" \
    --max_source_length "${MAX_SOURCE_LENGTH:-$QUESTION}" \
    --max_target_length "${MAX_TARGET_LENGTH:-$ANSWER}" \
    --num_shards "${NUM_SHARDS:-8}" \
    --output_dir "${OUTPUT_DIR:-$ROOT/train_datasets}" \
    "$@"
