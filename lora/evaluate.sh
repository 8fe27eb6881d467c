#!/usr/bin/env bash
# Answers every row of a file with a trained adapter and scores the answers: generated_predictions.txt, ROUGE, BLEU-4.
#     bash evaluate.sh                                   the newest training: its base, columns, lengths and validation file
#     CHECKPOINT=output/mine/checkpoint-3000 TEST_FILE=test.json bash evaluate.sh
# The variables that you set win over the records of the training; further flags go to main.py.
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT:-$ROOT/lora/output}              # a training, or a folder of trainings: the newest one
TEST_FILE=${TEST_FILE:-${VALIDATION_FILE:-}}

launch "$ROOT/lora/main.py" \
    --checkpoint "$CHECKPOINT" \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${TEST_FILE:+--test_file "$TEST_FILE"} \
    ${PROBE_FILE+--probe_file "$PROBE_FILE"} \
    ${PROMPT_COLUMN:+--prompt_column "$PROMPT_COLUMN"} \
    ${RESPONSE_COLUMN:+--response_column "$RESPONSE_COLUMN"} \
    ${HISTORY_COLUMN+--history_column "$HISTORY_COLUMN"} \
    ${CONVERSATION_COLUMN+--conversation_column "$CONVERSATION_COLUMN"} \
    ${MAX_SOURCE_LENGTH:+--max_source_length "$MAX_SOURCE_LENGTH"} \
    ${MAX_TARGET_LENGTH:+--max_target_length "$MAX_TARGET_LENGTH"} \
    ${QUANTIZATION_BIT+--quantization_bit "${QUANTIZATION_BIT:-0}"} \
    ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} \
    --per_device_eval_batch_size "${EVAL_BATCH_SIZE:-auto}" \
    "$@"
